"""Where JSON values end, without parsing them: for input in which some values are damaged.

`end_of` only counts brackets outside strings. `Grammar` checks every token, and finds the first one that cannot stand
where it stands: a missing quote turns strings and what is between them around, and then nothing else tells where the
damage begins.
"""

from __future__ import annotations

import re

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_BRACKET_OR_QUOTE = re.compile(rb'["{}\[\]]')
_TOKEN = re.compile(rb'[ \t\r\n]*(?:([{}\[\],:])|("[^"\\\n]*(?:\\[^\n][^"\\\n]*)*")|([^\s{}\[\],:"]+)|(\S))', re.S)
_BLANK = re.compile(rb"[\s\0,]*")
_SCALAR = re.compile(_STRING + rb'|[^\s,\[\]{}"]+|[\]}]+|"[^\n,]*', re.S)
_CLOSES = {0x7B: 0x7D, 0x5B: 0x5D}
INCOMPLETE = -1
BROKEN = -2


def end_of(data: bytes, at: int) -> int:
    """Where the object or array that begins at `at` ends; INCOMPLETE: after `data`; BROKEN: brackets do not match."""
    closes = bytearray()
    while match := _BRACKET_OR_QUOTE.search(data, at):
        at, token = match.end(), data[match.start()]
        if token == 0x22:
            at = _end_of_string(data, at)
            if at == INCOMPLETE:
                return INCOMPLETE
        elif token in _CLOSES:
            closes.append(_CLOSES[token])
        elif closes.pop() != token:
            return BROKEN
        elif not closes:
            return at
    return INCOMPLETE


def _end_of_string(data: bytes, begin: int) -> int:
    """Where a string ends that begins after the quote before `begin`; INCOMPLETE if after `data`."""
    at = data.find(b'"', begin)
    while at >= 0:
        escapes = at
        while escapes > begin and data[escapes - 1] == 0x5C:
            escapes -= 1
        if (at - escapes) % 2 == 0:
            return at + 1
        at = data.find(b'"', at + 1)
    return INCOMPLETE


def end_of_blank(data: bytes, at: int) -> int:
    """Where white space, NUL bytes and commas end."""
    match = _BLANK.match(data, at)
    return match.end() if match else at


def end_of_scalar(data: bytes, at: int) -> int:
    """Where a string, a number, a word or a stray bracket ends."""
    match = _SCALAR.match(data, at)
    return match.end() if match else at + 1


class Grammar:
    """One JSON value, given piece by piece; a piece may not end within a token.

    state: "open", "closed" (the value ended; `end` is where, in the last piece) or "broken" (`end`: the wrong token).
    Words that are no JSON, such as NaN, count as scalars.
    """

    def __init__(self) -> None:
        self._stack = bytearray()
        self._wants = "value"
        self.state = "open"
        self.end = 0

    def feed(self, piece: bytes, at: int = 0) -> str:
        while match := _TOKEN.match(piece, at):
            at = match.end()
            mark, string, scalar, other = match.groups()
            if other or not self._takes(mark, string, scalar):
                self.state, self.end = "broken", match.start(match.lastindex or 0)
                return self.state
            if not self._stack and self._wants == "end":
                self.state, self.end = "closed", at
                return self.state
        return self.state

    def _takes(self, mark: bytes | None, string: bytes | None, scalar: bytes | None) -> bool:
        """Whether the token may come next; if so, what may come after it."""
        wants, inside = self._wants, self._stack[-1:]
        if wants in ("value", "value or ]", "key or }", "key"):
            if mark in (b"}", b"]"):
                return wants.endswith(mark.decode()) and self._close(mark)
            if wants.startswith("key"):
                self._wants = "colon"
                return string is not None
            if mark in (b"{", b"["):
                self._stack += mark
                self._wants = "key or }" if mark == b"{" else "value or ]"
                return True
            self._wants = "end"
            return string is not None or scalar is not None
        if wants == "colon":
            self._wants = "value"
            return mark == b":"
        if mark == b",":
            self._wants = "key" if inside == b"{" else "value"
            return True
        return mark in (b"}", b"]") and self._close(mark)

    def _close(self, mark: bytes) -> bool:
        opened = self._stack.pop()
        self._wants = "end"
        return _CLOSES[opened] == mark[0]
