"""Lines of a file that can be read again, and bytes across lines."""

from __future__ import annotations

import io
import re
from collections import deque


class Lines:
    """Lines of a file, at most `longest` bytes at once, which can be pushed back.

    number: of the last line. passed: bytes of all lines so far. ran_out: whether a line was missed by an object that is
    not closed.
    """

    def __init__(self, handle: io.BufferedReader, longest: int) -> None:
        self._handle = handle
        self._pushed: deque[bytes] = deque()
        self._broken: Exception | None = None
        self._start = b""
        self.longest = longest
        self.number = 0
        self.passed = 0
        self.ran_out = False

    def next_line(self) -> bytes:
        """The next line with its end, or its first `longest` bytes; b"" after the last."""
        line = self._pushed.popleft() if self._pushed else self._from_file()
        self.number += bool(line)
        self.passed += len(line)
        return line

    def next_of_object(self) -> bytes:
        """The next line, where the object that began in an earlier one needs one more."""
        line = self.next_line()
        self.ran_out |= not line
        return line

    def _from_file(self) -> bytes:
        self.check()
        start, self._start = self._start, b""
        return start + self._handle.readline(max(0, self.longest - len(start)))

    def begin_with(self, start: bytes) -> None:
        """Takes bytes that were read apart into lines."""
        end = start.rfind(b"\n") + 1
        self._pushed.extend(re.findall(rb"[^\n]*\n", start[:end]))
        self._start = start[end:]

    def push(self, *lines: bytes) -> None:
        self._pushed.extendleft(reversed(lines))
        self.number -= len(lines)
        self.passed -= sum(map(len, lines))

    def is_whole(self, line: bytes) -> bool:
        return len(line) < self.longest or (len(line) == self.longest and line.endswith(b"\n"))

    def skip(self, line: bytes) -> None:
        """Reads on to the end of a line that is not whole."""
        while line and not line.endswith(b"\n"):
            line = self._from_file()

    def read(self, size: int) -> bytes:
        """The next bytes, across lines, as many as there are; `check` tells whether the file breaks off after them."""
        parts: list[bytes] = []
        while size > 0 and not self._broken:
            try:
                parts.append(self._handle.read1(size))
            except Exception as error:
                self._broken = error
                break
            size -= len(parts[-1])
            if not parts[-1]:
                break
        return b"".join(parts)

    def check(self) -> None:
        """Raises the exception with which reading broke off, if it did."""
        if self._broken:
            raise self._broken
