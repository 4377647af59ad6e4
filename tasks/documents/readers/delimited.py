"""CSV and TSV with named columns: the first row names them, every other row is a record of text.

The delimiter is the one with which the first row has the text's column: comma (tab in .tsv), semicolon, tab or |. A
field in double quotes may hold delimiters, quotes (doubled) and line ends. A row that is not written so costs itself:
reading goes on with the next line. In .tsv a quote may also be a character like any other. Memory: one row.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator

from eclectus.tasks.documents.readers.records import (
    Fault,
    Numbered,
    Reading,
    Record,
    foreign,
    not_utf8,
    repaired,
    start_of,
)

DELIMITERS = ",;\t|"
# Opening quotes without a closing one, after which a file is given up: each costs reading up to `longest_line` bytes.
MOST_OPEN_QUOTES = 16


def read_csv(handle: io.BufferedReader, reading: Reading) -> Iterator[Numbered]:
    return _read(handle, reading, DELIMITERS)


def read_tsv(handle: io.BufferedReader, reading: Reading) -> Iterator[Numbered]:
    return _read(handle, reading, "\t")


def _read(handle: io.BufferedReader, reading: Reading, delimiters: str) -> Iterator[Numbered]:
    rows = _Rows(handle, reading.longest_line)
    fault = foreign(rows.start())
    if fault:
        yield None, fault
        return
    names = rows.header(delimiters, (reading.text_field, *reading.nested))
    text_field = reading.text_among(names)
    if text_field is None:
        there = ", ".join(names[:20]) or "nothing"
        detail = f"there is no column '{reading.text_field}'; the columns are {there}"
        yield None, Fault("no text", start_of(detail))
        return
    wanted = {name: place for place, name in enumerate(names) if name in reading.columns}
    for number, row in rows.rows(len(names)):
        yield number, row if isinstance(row, Fault) else _as_record(row, wanted, text_field)


class _Rows:
    """The rows of a file, as lists of fields."""

    def __init__(self, handle: io.BufferedReader, longest: int) -> None:
        self._handle = handle
        self._longest = longest
        self._pushed: deque[bytes] = deque()
        self._taken: list[bytes] = []
        self._number = 0
        self._delimiter = ","
        self._tabs_only = False
        self._open_quotes = 0

    def start(self) -> bytes:
        first = self._handle.readline(self._longest)
        self._pushed.append(first.removeprefix(b"\xef\xbb\xbf"))
        return first

    def header(self, delimiters: str, wanted: Iterable[str]) -> list[str]:
        """The names of the columns, of which one is wanted; sets the delimiter."""
        self._tabs_only = delimiters == "\t"
        found: list[str] = []
        first = self._pushed[0] if self._pushed else b""
        for delimiter in delimiters:
            self._delimiter = delimiter
            try:
                names = [
                    name.strip() for name in next(csv.reader([_text(first)], delimiter=delimiter, strict=True), [])
                ]
            except csv.Error:
                continue
            found = found or names
            if any(each in names for each in wanted):
                self._line()
                return names
        return found

    def rows(self, width: int) -> Iterator[tuple[int, list[str] | Fault]]:
        """(number of its first line, fields) of every row that is not blank."""
        csv.field_size_limit(max(csv.field_size_limit(), self._longest))
        while True:
            number, self._taken = self._number + 1, []
            row = self._row(width)
            if not self._taken:
                return
            if row:
                yield number, row
            if self._open_quotes > MOST_OPEN_QUOTES:
                detail = f"too many quotes are not closed; nothing is read after line {number}"
                yield number + 1, Fault("not CSV", detail)
                return

    def _row(self, width: int) -> list[str] | Fault:
        reader = csv.reader(self._lines(), delimiter=self._delimiter, strict=True)
        try:
            row = next(reader, [])
            why = f"{len(row)} fields; the first row names {width}"
        except csv.Error as error:
            row, why = [], f"wrong quotes: {error}"
            self._open_quotes += "unexpected end" in why or sum(map(len, self._taken)) >= self._longest
        if len(row) == width or (not row and not "".join(map(_text, self._taken)).strip()):
            return row
        # The lines that a quote swallowed are rows of their own.
        first, rest = self._taken[0], self._taken[1:]
        self._pushed.extendleft(reversed(rest))
        self._number -= len(rest)
        self._taken = [first]
        fields = _text(first).rstrip("\r\n").split("\t")
        if self._tabs_only and len(fields) == width:
            return fields
        return Fault("not CSV", f"the row has {why}", start_of(first))

    def _lines(self) -> Iterator[str]:
        """Lines for one row, at most `longest` bytes of them."""
        size = 0
        while size < self._longest and (line := self._line()):
            self._taken.append(line)
            size += len(line)
            yield _text(line)

    def _line(self) -> bytes:
        line = self._pushed.popleft() if self._pushed else self._handle.readline(self._longest)
        self._number += bool(line)
        return line


def _text(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _as_record(row: list[str], wanted: dict[str, int], text_field: str) -> Record | Fault:
    text = row[wanted[text_field]]
    content = text.encode("utf-8", "surrogateescape")
    try:
        content.decode()
    except UnicodeDecodeError as fault:
        return not_utf8("the text of the row", fault)
    return {name: text if name == text_field else repaired(row[place]) for name, place in wanted.items()}
