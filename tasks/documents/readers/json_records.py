"""JSON as it comes: one record per line, one array of records of any size, objects over several lines or several on a
line, whatever the file is called.

Lines are read by orjson; a line that it refuses is looked at again: NaN, huge numbers and bytes that are not UTF-8
outside the text are accepted, objects on one line are taken apart, and an object may go on in the next lines. A
damaged record costs itself and is one fault. Memory: one record, at most `longest_line` bytes; a larger one is one
fault. Price, records of 2 kB: 540 MB/s of lines, 140 of arrays, 40 of objects over several lines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import orjson

from eclectus.tasks.documents.readers.json_array import AT_ONCE, Array
from eclectus.tasks.documents.readers.json_scan import Grammar, end_of, end_of_blank
from eclectus.tasks.documents.readers.json_value import as_record, parse
from eclectus.tasks.documents.readers.lines import Lines
from eclectus.tasks.documents.readers.records import Fault, Numbered, Position, Reading, Record, foreign, start_of

MARK = b"\xef\xbb\xbf"
BLANK = b" \t\r\n\0"


def read_json(handle: io.BufferedReader, reading: Reading, position: Position) -> Iterator[Numbered]:
    """Every record or fault: with its line, or its number in the array."""
    lines = Lines(handle, reading.longest_line)
    start = lines.read(AT_ONCE).removeprefix(MARK)
    fault = foreign(start)
    if fault:
        yield None, fault
        return
    is_array = begins_an_array(start)
    if is_array:
        start, is_array = _is_one_array(start, lines)
    if is_array:
        yield from Array(start, lines, reading).items()
    else:
        lines.begin_with(start)
        yield from _read_lines(lines, reading, position)


def read_lines(handle: io.BufferedReader, reading: Reading, position: Position) -> Iterator[Numbered]:
    """Every record or fault of lines that are not the first of their file, with its line from 1."""
    yield from _read_lines(Lines(handle, reading.longest_line), reading, position)


def begins_an_array(start: bytes) -> bool:
    return start.removeprefix(MARK).lstrip().startswith(b"[")


def _is_one_array(start: bytes, lines: Lines) -> tuple[bytes, bool]:
    """Whether a file that begins with `[` is one array, and not a file of lines that are arrays, with what was read."""
    begin = len(start) - len(start.lstrip())
    while (end := start.find(b"\n", begin)) < 0 and len(start) < lines.longest and (more := lines.read(len(start))):
        start += more
    if end < 0 or end_of(start[:end], begin) < 0:
        return start, True
    while not (rest := start[end:].lstrip(BLANK)) and (more := lines.read(AT_ONCE)):
        start += more
    return start, not rest.startswith((b"[", b"{"))


def _read_lines(lines: Lines, reading: Reading, position: Position) -> Iterator[Numbered]:
    while line := lines.next_line():
        number, position.passed = lines.number, lines.passed
        position.lines = number
        if not lines.is_whole(line):
            lines.skip(line)
            detail = f"the line is longer than {reading.longest_line:,} bytes"
            yield number, Fault("too long", detail, start_of(line))
            continue
        try:
            record = orjson.loads(line)
        except ValueError:
            if line.strip():
                for each in _look_again(line, lines, reading):
                    position.lines, position.goes_on = lines.number, lines.ran_out
                    yield number, each
            continue
        yield number, as_record(record, line, reading, "the line")


def _look_again(line: bytes, lines: Lines, reading: Reading) -> Iterator[Record | Fault]:
    """The records or faults of a line that orjson refused, and of following ones if its object goes on in them."""
    # Files that were joined may each have begun with a mark.
    line = line.removeprefix(MARK)
    record = parse(line, reading, "the line")
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


def _continued(line: bytes, lines: Lines, longest: int) -> bytes | None:
    """The object that begins in this line and ends in a later one; None if it does not.

    If it breaks off, the lines after the first are read as lines again, unless the object was written over several
    lines: then they are skipped up to the one in which another begins.
    """
    grammar, taken, size = Grammar(), [line], len(line)
    state = grammar.feed(line)
    while state == "open" and size < longest and (more := lines.next_of_object()):
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
            rest = rest[1:] or [each for each in [lines.next_of_object()] if each]
    lines.push(*rest)
    return None
