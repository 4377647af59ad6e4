"""One JSON value as a record: by orjson, and by Python's own parser what orjson refuses."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from eclectus.tasks.documents.readers.records import Fault, Reading, Record, brief, not_utf8, repaired, start_of

# Digits that Python converts to a number; a longer one is no number that a label could be.
MOST_DIGITS = 4_000
EXACT = 2**53


def parse(content: bytes, reading: Reading, what: str) -> Record | Fault:
    """The record in `content`, or why it is none. what: "the line", "item 3 of the array".

    Accepts what writers put into JSON and orjson refuses: NaN, halves of surrogate pairs, huge numbers, and bytes that
    are not UTF-8 outside the text.
    """
    try:
        return as_record(orjson.loads(content), content, reading, what)
    except ValueError as error:
        refused = error
    fault = None
    try:
        text = content.decode()
    except UnicodeDecodeError as bad:
        fault, text = not_utf8(what, bad), content.decode("utf-8", "surrogateescape")
    try:
        value = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        return fault or Fault("not JSON", f"{what} is not JSON ({refused})", start_of(content))
    if fault and not (isinstance(value, dict) and _is_text(value.get(reading.text_field))):
        return fault
    record = as_record(value, content, reading, what)
    if isinstance(record, dict):
        record |= {name: repaired(record[name]) for name in _labels(reading) if name in record}
    return record


def as_record(value: Any, content: bytes, reading: Reading, what: str) -> Record | Fault:
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
