"""What readers yield: numbered records or faults.

One rule for all formats: the text must be text, and valid; a label (id, language, domain, source, work) that is not is
repaired, or counts as absent (`id_of` in tasks/documents/normalise.py), and never costs the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

START = 200

Record = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Why some input is not a record. reason: category, to count by. detail: message. start: its first characters."""

    reason: str
    detail: str
    start: str = ""


Numbered = tuple[int | None, Record | Fault]
"""Line, item or row number from 1 (None for a whole file), and the record or fault."""


@dataclass(frozen=True)
class Reading:
    """What is read. columns: the fields, `text_field` among them.

    longest_text: in characters; longer text files are not read to their end. longest_line: in bytes; the most of one
    record that is held in memory. nested: columns that may be lists or objects, of which one or more may take the place
    of the text's.
    """

    text_field: str
    columns: list[str]
    longest_text: int
    longest_line: int
    nested: tuple[str, ...] = ()

    def text_among(self, names: Iterable[str]) -> str | None:
        """The column that every record must have, of those that there are."""
        there = set(names)
        return next((name for name in (self.text_field, *self.nested) if name in there), None)


@dataclass(frozen=True)
class Slice:
    """What is read of a source: its bytes, or row groups of Parquet, from `begin` up to `end`; None: all of it.

    first_row: rows of the file before those of the row groups. digest: that of the bytes, of a Parquet file all of it,
    of a data set its own. status: size and times of a Parquet file with this digest, if it has been left alone for long
    enough that they tell of every change. commit: of a data set on the hub.
    """

    begin: int = 0
    end: int | None = None
    first_row: int = 0
    digest: str = ""
    status: tuple[int, ...] | None = None
    commit: str | None = None


class Position:
    """What has been read. digest: of what the slice should hold, once all is read. lines: of a slice of JSON lines.

    goes_on: whether its last record is not whole: an object that began in it goes on after it. share: how much of it
    the records that were taken are, about. passed: bytes of lines, or rows of Parquet, with them; of: rows of all.
    """

    def __init__(self) -> None:
        self.digest = ""
        self.lines = 0
        self.goes_on = False
        self.share = 1.0
        self.passed = 0
        self.of = 0


def start_of(content: bytes | str) -> str:
    """The first 200 characters of some input, as valid UTF-8."""
    text = content[: 4 * START].decode("utf-8", "replace") if isinstance(content, bytes) else content
    return text[:START].encode("utf-8", "replace").decode()


def not_utf8(what: str, fault: UnicodeDecodeError) -> Fault:
    """what: "the line", "the row", ..."""
    where = f"byte {fault.object[fault.start]:#04x} at {fault.start}"
    other = encoding_of(fault.object)
    detail = f"{what} is {other}; convert it to UTF-8 (iconv -f {other} -t UTF-8)" if other else ""
    return Fault("not UTF-8", detail or f"{what} is not UTF-8 ({where})", start_of(fault.object))


def encoding_of(start: bytes) -> str | None:
    """UTF-16 or UTF-32, if input begins like it: with a byte order mark, or ASCII with zeros between."""
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if start.startswith(mark):
            return name
    if re.match(rb"[\t-~]\0[\t-~]\0", start):
        return "UTF-16LE"
    return "UTF-16BE" if re.match(rb"\0[\t-~]\0[\t-~]", start) else None


def foreign(start: bytes, what: str = "the file") -> Fault | None:
    """The fault of a whole file in another encoding than UTF-8."""
    name = encoding_of(start)
    if name is None:
        return None
    text = start[:800].decode(name.replace("UTF-16LE", "utf-16-le").replace("UTF-16BE", "utf-16-be"), "replace")
    return Fault("not UTF-8", f"{what} is {name}; convert it to UTF-8 (iconv -f {name} -t UTF-8)", start_of(text))


def repaired(text: Any) -> Any:
    """Text without halves of surrogate pairs, which stand for bytes that are not UTF-8; other values unchanged."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


def brief(value: Any) -> str:
    """The start of any value, however deeply nested."""
    try:
        return start_of(str(value))
    except (RecursionError, ValueError):
        return type(value).__name__


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
