"""An array of records, item by item, with one item in memory; a damaged item costs itself.

Where brackets or quotes are missing, the end of an item is not known. The next one then begins on a line of its own
with the same indentation; else after a comma with the field with which the last one began, or after `},`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from eclectus.tasks.documents.readers.json_scan import INCOMPLETE, Grammar, end_of, end_of_blank, end_of_scalar
from eclectus.tasks.documents.readers.json_value import parse
from eclectus.tasks.documents.readers.lines import Lines
from eclectus.tasks.documents.readers.records import Fault, Numbered, Reading, Record, start_of

AT_ONCE = 2**20
INDENTATION = 2**10
_SPACE = re.compile(rb"\s*")
_STRAY = re.compile(rb"[\s}]*")
_SEPARATOR = re.compile(rb"\s*([,\]]|$)")
_OPENS = re.compile(rb'[\s,]*["{\[]')
_FIRST_KEY = re.compile(rb'^\{\s*"[^"\\]*"\s*:')
_NEXT_ITEM = re.compile(rb'\}\s*,\s*(?=\{\s*")')


class Array:
    """The items of an array, with a window of the file that holds one of them at a time."""

    def __init__(self, start: bytes, lines: Lines, reading: Reading) -> None:
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
