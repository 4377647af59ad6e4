"""JSON as it comes: one record per line, one array of records of any size, objects over several lines or several on a
line, whatever the file is called.

Lines are read by orjson; a line that it refuses is looked at again: NaN, huge numbers and bytes that are not UTF-8
outside the text are accepted, objects on one line are taken apart, and an object may go on in the next lines. An array
is read item by item. A damaged record costs itself and is one fault: reading goes on with the next line, or where the
next item of the array seems to begin: on a line of its own with the same indentation, else after `},`.
Memory: one record, at most `longest_line` bytes; a larger one is one fault. Price: 300 MB/s of lines, 150 of arrays.
"""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import orjson

from eclectus.tasks.documents.readers.json_scan import (
    INCOMPLETE,
    Grammar,
    end_of,
    end_of_blank,
    end_of_scalar,
)
from eclectus.tasks.documents.readers.records import (
    Fault,
    Numbered,
    Reading,
    Record,
    brief,
    foreign,
    not_utf8,
    repaired,
    start_of,
)

MARK = b"\xef\xbb\xbf"
AT_ONCE = 2**20
INDENTATION = 2**10
BLANK = b" \t\r\n\0"
# Digits that Python converts to a number; a longer one is no number that a label could be.
MOST_DIGITS = 4_000
EXACT = 2**53
_SPACE = re.compile(rb"\s*")
_STRAY = re.compile(rb"[\s}]*")
_SEPARATOR = re.compile(rb"\s*([,\]]|$)")
_OPENS = re.compile(rb'[\s,]*["{\[]')
_FIRST_KEY = re.compile(rb'^\{\s*"[^"\\]*"\s*:')
_NEXT_ITEM = re.compile(rb'\}\s*,\s*(?=\{\s*")')


def read_json(handle: io.BufferedReader, reading: Reading) -> Iterator[Numbered]:
    """Every record or fault: with its line, or its number in the array."""
    lines = _Lines(handle, reading.longest_line)
    start = lines.read(AT_ONCE).removeprefix(MARK)
    fault = foreign(start)
    if fault:
        yield None, fault
        return
    is_array = start.lstrip().startswith(b"[")
    if is_array:
        start, is_array = _is_one_array(start, lines)
    if is_array:
        yield from _Array(start, lines, reading).items()
    else:
        lines.prefix = start
        yield from _read_lines(lines, reading)


class _Lines:
    """Lines of a file, at most `longest` bytes at once, which can be pushed back.

    number: of the last line. prefix: what was read already and is still to be taken apart into lines.
    """

    def __init__(self, handle: io.BufferedReader, longest: int) -> None:
        self._handle = handle
        self._pushed: deque[bytes] = deque()
        self._broken: Exception | None = None
        self.longest = longest
        self.prefix = b""
        self.number = 0

    def next_line(self) -> bytes:
        """The next line with its end, or its first `longest` bytes; b"" after the last."""
        line = self._pushed.popleft() if self._pushed else self._from_file()
        self.number += bool(line)
        return line

    def _from_file(self) -> bytes:
        end = self.prefix.find(b"\n", 0, self.longest) + 1
        if end or len(self.prefix) >= self.longest:
            end = end or self.longest
            line, self.prefix = self.prefix[:end], self.prefix[end:]
            return line
        self.check()
        line, self.prefix = self.prefix, b""
        return line + self._handle.readline(self.longest - len(line))

    def push(self, *lines: bytes) -> None:
        self._pushed.extendleft(reversed(lines))
        self.number -= len(lines)

    def is_whole(self, line: bytes) -> bool:
        return len(line) < self.longest or line.endswith(b"\n")

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


def _is_one_array(start: bytes, lines: _Lines) -> tuple[bytes, bool]:
    """Whether a file that begins with `[` is one array, and not a file of lines that are arrays, with what was read."""
    begin = len(start) - len(start.lstrip())
    while (end := start.find(b"\n", begin)) < 0 and len(start) < lines.longest and (more := lines.read(len(start))):
        start += more
    if end < 0 or end_of(start[:end], begin) < 0:
        return start, True
    while not (rest := start[end:].lstrip(BLANK)) and (more := lines.read(AT_ONCE)):
        start += more
    return start, not rest.startswith((b"[", b"{"))


def _read_lines(lines: _Lines, reading: Reading) -> Iterator[Numbered]:
    while line := lines.next_line():
        number = lines.number
        if not lines.is_whole(line):
            lines.skip(line)
            detail = f"the line is longer than {reading.longest_line:,} bytes"
            yield number, Fault("too long", detail, start_of(line))
            continue
        try:
            record = orjson.loads(line)
        except ValueError as error:
            if line.strip():
                for each in _look_again(line, lines, reading, error):
                    yield number, each
            continue
        yield number, _as_record(record, line, reading, "the line")


def _look_again(line: bytes, lines: _Lines, reading: Reading, error: ValueError) -> Iterator[Record | Fault]:
    """The records or faults of a line that orjson refused, and of following ones if its object goes on in them."""
    record = parse(line, reading, "the line", error)
    start = line.lstrip(BLANK)
    if not isinstance(record, Fault) or not start.startswith((b"{", b"[")):
        yield record
        return
    pieces = _objects(line) if start.startswith(b"{") else []
    if pieces:
        for piece in pieces:
            yield parse(piece, reading, "the object")
        return
    value = _continued(line, lines, reading.longest_line)
    yield record if value is None else parse(value, reading, "the object")


def _objects(line: bytes) -> list[bytes]:
    """The objects that a line holds, apart from commas and NUL bytes; none if it is one object or anything else."""
    pieces, at = [], end_of_blank(line, 0)
    while at < len(line):
        if line[at] != 0x7B:
            return []
        end = end_of(line, at)
        end = len(line) if end < 0 else end
        pieces.append(line[at:end])
        at = end_of_blank(line, end)
    return pieces if len(pieces) > 1 or pieces[0].strip() != line.strip() else []


def _continued(line: bytes, lines: _Lines, longest: int) -> bytes | None:
    """The object that begins in this line and ends in a later one; None if it does not.

    If it breaks off, the lines after the first are read as lines again, unless the object was written over several
    lines: then they are skipped up to the one in which another begins.
    """
    grammar, taken, size = Grammar(), [line], len(line)
    state = grammar.feed(line)
    while state == "open" and size < longest and (more := lines.next_line()):
        taken.append(more)
        size += len(more)
        state = grammar.feed(more)
    if state == "closed" and len(taken) > 1:
        last = taken.pop()
        if last[grammar.end :].strip():
            lines.push(last[grammar.end :])
        return b"".join(taken) + last[: grammar.end]
    rest = taken[1:]
    if line.strip() in (b"{", b"[") or len(rest) > 1:
        begins = line[: len(line) - len(line.lstrip())] + b"{"
        while rest and not rest[0].startswith(begins):
            rest = rest[1:] or [each for each in [lines.next_line()] if each]
    lines.push(*rest)
    return None


class _Array:
    """The items of an array, with a window of the file that holds one of them at a time."""

    def __init__(self, start: bytes, lines: _Lines, reading: Reading) -> None:
        self._data = start
        self._at = 0
        self._lines = lines
        self._reading = reading
        self._ended = False
        self._lost_the_end = False
        # Records mostly have their fields in one order, so that this one tells where another begins.
        self._first_key = b""

    def items(self) -> Iterator[Numbered]:
        number, opened = 0, False
        while (first := self._next_byte()) is not None:
            if first == 0x5B and not opened:
                self._at, opened = self._at + 1, True
            elif first == 0x5D and opened:
                self._at += 1
                opened = self._goes_on()
            else:
                number += 1
                what = f"item {number} of the array"
                yield number, self._container(what) if first in b"{[" else self._scalar(what, opened)
        if opened and not self._lost_the_end:
            yield number + 1, Fault("not JSON", f"the array breaks off after item {number}", start_of(self._data))

    def _goes_on(self) -> bool:
        """Whether a `]` was one of a damaged item, for the array goes on after it."""
        self._skip(_SPACE)
        return self._data[self._at : self._at + 1] in (b",", b"}", b"]")

    def _skip(self, what: re.Pattern[bytes]) -> None:
        """Goes over what matches, which may be nothing."""
        while (match := what.match(self._data, self._at)) and match.end() == len(self._data) and self._fill():
            pass
        match = what.match(self._data, self._at)
        self._at = match.end() if match else self._at

    def _next_byte(self) -> int | None:
        """The first byte that is not blank; None at the end."""
        while True:
            self._at = end_of_blank(self._data, self._at)
            if self._at < len(self._data):
                return self._data[self._at]
            if not self._fill():
                return None

    def _fill(self) -> bool:
        """Reads on, by as much as the window holds already; False at the end of the file."""
        more = b"" if self._ended else self._lines.read(max(AT_ONCE, len(self._data) - self._at))
        if not more:
            self._lines.check()
        self._ended = not more
        # The bytes before the item in its line are its indentation.
        line = self._data.rfind(b"\n", max(0, self._at - INDENTATION), self._at)
        kept = line if line >= 0 else self._at
        self._data, self._at = self._data[kept:] + more, self._at - kept
        return bool(more)

    def _holds_less(self) -> bool:
        """Whether more can be read without holding too much."""
        return not self._ended and len(self._data) - self._at < self._reading.longest_line

    def _scalar(self, what: str, opened: bool) -> Record | Fault:
        """An item that is no object; after the array, the rest of the line."""

        def end() -> int:
            line = self._data.find(b"\n", self._at)
            return end_of_scalar(self._data, self._at) if opened else line if line >= 0 else len(self._data)

        while end() == len(self._data) and self._holds_less():
            self._fill()
        item = self._data[self._at : end()]
        if opened and item.startswith(b'"') and not _SEPARATOR.match(self._data, end()):
            self._go_to_next()
            return Fault("not JSON", f"{what} is not JSON; a quote is missing", start_of(item))
        self._at = end()
        return parse(item, self._reading, what)

    def _container(self, what: str) -> Record | Fault:
        while (end := end_of(self._data, self._at)) == INCOMPLETE and self._holds_less():
            self._fill()
        if end >= 0:
            item = self._data[self._at : end]
            record = parse(item, self._reading, what)
            if not isinstance(record, Fault) or record.reason != "not JSON" or _is_balanced(item):
                self._at = end
                self._skip(_STRAY)
                if not isinstance(record, Fault):
                    key = _FIRST_KEY.match(item)
                    self._first_key = re.escape(key.group()) if key else b""
                return record
        start = start_of(self._data[self._at : self._at + INDENTATION])
        too_long = end == INCOMPLETE and not self._ended
        self._go_to_next()
        if too_long:
            return Fault("too long", f"{what} is longer than {self._reading.longest_line:,} bytes", start)
        return Fault("not JSON", f"{what} is not JSON; brackets or quotes are missing", start)

    def _go_to_next(self) -> None:
        """Goes from the beginning of a damaged item to where the next one seems to begin, or to the end."""
        line = self._data.rfind(b"\n", 0, self._at)
        indentation = self._data[line + 1 : self._at]
        by_line = re.compile(rb"\n" + indentation + rb"(?=\{)") if line >= 0 and not indentation.strip() else None
        self._at += 1
        while True:
            found = by_line.search(self._data, self._at) if by_line else None
            if not found and self._holds_less():
                self._fill()
                continue
            if not found and self._first_key:
                found = re.compile(rb",\s*(?=" + self._first_key + rb")").search(self._data, self._at)
            found = found or _NEXT_ITEM.search(self._data, self._at)
            if found or self._ended:
                break
            self._at = len(self._data) - INDENTATION
        self._lost_the_end = not found
        self._at = found.end() if found else len(self._data)


def _is_balanced(item: bytes) -> bool:
    """Whether only values are wrong in an object, so that its end is where its brackets say.

    Where a quote or a bracket is missing, a quote or an opening bracket is what first cannot stand where it stands.
    """
    grammar = Grammar()
    if grammar.feed(item) != "broken":
        return True
    return not _OPENS.match(item, grammar.end) and item[grammar.end - 1 : grammar.end] != b'"'


def parse(content: bytes, reading: Reading, what: str, error: ValueError | None = None) -> Record | Fault:
    """The record in `content`, or why it is none. what: "the line", "item 3 of the array". error: orjson's, if known.

    Accepts what writers put into JSON and orjson refuses: NaN, halves of surrogate pairs, huge numbers, and bytes that
    are not UTF-8 outside the text.
    """
    if error is None:
        try:
            return _as_record(orjson.loads(content), content, reading, what)
        except ValueError as refused:
            error = refused
    fault = None
    try:
        text = content.decode()
    except UnicodeDecodeError as bad:
        fault, text = not_utf8(what, bad), content.decode("utf-8", "surrogateescape")
    try:
        value = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        return fault or Fault("not JSON", f"{what} is not JSON ({error})", start_of(content))
    if fault and not (isinstance(value, dict) and _is_text(value.get(reading.text_field))):
        return fault
    record = _as_record(value, content, reading, what)
    if isinstance(record, dict):
        record |= {name: repaired(record[name]) for name in _labels(reading) if name in record}
    return record


def _as_record(value: Any, content: bytes, reading: Reading, what: str) -> Record | Fault:
    if not isinstance(value, dict):
        kind = {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
        start = brief(value) if what.startswith("item") else start_of(content)
        return Fault("not a record", f"{what} is a JSON {kind}; expected an object", start)
    for name in _labels(reading):
        number = value.get(name)
        # orjson rounds integers of more than 64 bits.
        if isinstance(number, float) and abs(number) >= EXACT:
            value[name] = json.loads(content, parse_int=_integer).get(name)
    return value


def _labels(reading: Reading) -> list[str]:
    return [name for name in reading.columns if name != reading.text_field]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\udc80-\udcff]", value)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)
