"""Texts to token ids: the one way in for every text that is packed, scored, counted or asked.

A text never yields a control token (end of document, beginning, padding, mask, ...), whatever it spells: a document
about tokenizers that quotes "</s>" must not end there, in training or in evaluation. Three ways lead to one:

    added token    the tokenizer cuts "<|endoftext|>" out of the text     -> special tokens are encoded as text
    not marked     it does so for a control token not marked as special   -> a copy of the tokenizer marks it
    vocabulary     Unigram, WordLevel, WordPiece or BPE hold "</s>" as    -> spelled with the fewest other pieces, or
                   a piece like any other                                    the unknown token where there are none

The token of unknown text stays what it is, unless it also ends or begins documents: then unknown text is dropped.

A text of over a million characters is encoded in pieces, cut where the tokens around the cut are the same with and
without it (byte-level tokenizers have such a place nearly everywhere; SentencePiece's, which begin every text with a
space, have none and encode it whole).
Price: what the tokenizer takes, and 2% for the check.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

Ids = Sequence[int]

# A character that no piece holds costs more than any number of pieces.
MISSING = 1_000_000
PIECE = 1_000_000
"""Characters of a text that are encoded at once: the library takes 200 to 300 bytes of memory for each."""
SEARCHED, AROUND = 20_000, 1_000
# Where a piece may end: before the space between two words, after a line, after a sign.
BORDERS = [re.compile(each) for each in (r"(?<=\w)(?= \w)", r"(?<=\S\n)(?=\S)", r"(?<=[^\w\s])(?=\w)")]


class TextTokens:
    """Encodes texts with a transformers tokenizer.

    control: ids that never come out of a text. respelled: control tokens that the vocabulary held as a piece and that
    texts spelled, so far; lost: those among them that the other pieces could not spell.
    """

    def __init__(self, tokenizer: Any) -> None:
        from eclectus.models.checkpoints.tokenizer_files import control_ids

        self.respelled = self.lost = 0
        self._tokenizer, self._model = tokenizer, _model_of(getattr(tokenizer, "backend_tokenizer", None))
        self._unknown = {each for each in (tokenizer.unk_token_id, self._model["unk_id"]) if each is not None}
        self.control = control_ids(tokenizer, self._unknown)
        self._backend = _text_backend(tokenizer, self.control)
        self._instead: dict[int, tuple[list[int], bool]] = {}

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each whole text, without special tokens. Runs on all cores (TOKENIZERS_PARALLELISM)."""
        every = self._encode(texts)
        return [[*ids] if self.control.isdisjoint(ids) else self._respell(ids) for ids in every]

    def flat(self, texts: list[str], kind: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same end to end: (ids, kind [sum of sizes]; sizes, int64 [n]; respelled, int64 [k, 3]).

        kind: unsigned, wide enough for every id. respelled: (text, control tokens in it, those lost) where any were.
        """
        every = self._encode(texts)
        sizes = np.fromiter(map(len, every), np.int64, len(every))
        ids = np.fromiter(chain.from_iterable(every), kind, int(sizes.sum()))
        found = np.flatnonzero(self._is_control[np.minimum(ids, len(self._is_control) - 1)])
        if not len(found):
            return ids, sizes, np.empty((0, 3), np.int64)
        ends, counts = np.cumsum(sizes), []
        for text in np.unique(np.searchsorted(ends, found, side="right")).tolist():
            before = self.respelled, self.lost
            every[text] = self._respell(every[text])
            sizes[text] = len(every[text])
            counts.append((text, self.respelled - before[0], self.lost - before[1]))
        ids = np.fromiter(chain.from_iterable(every), kind, int(sizes.sum()))
        return ids, sizes, np.array(counts, np.int64)

    def _encode(self, texts: list[str]) -> list[Ids]:
        if all(len(text) <= PIECE for text in texts):
            return self._encode_whole(texts)
        every: list[Ids] = []
        for text in texts:
            ids = array("I")
            for piece in self._pieces_of(text):
                ids.extend(self._encode_whole([piece])[0])
            every.append(ids)
        return every

    def _encode_whole(self, texts: list[str]) -> list[Ids]:
        if self._backend is None:
            given = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            every: list[Ids] = self._tokenizer(texts, **given)["input_ids"]
            return every
        # Other users of this tokenizer may have set these.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _pieces_of(self, text: str) -> Iterator[str]:
        """The text in pieces of about PIECE characters, whose tokens are those of the text."""
        begin, end = 0, PIECE
        while end < len(text):
            cut = self._cut_before(text, end)
            if cut > begin:
                yield text[begin:cut]
                begin = cut
            end += PIECE
        yield text[begin:]

    def _cut_before(self, text: str, end: int) -> int:
        """A place where a cut changes no token, as the tokens around it show; 0 if none of some places is one."""
        first = max(0, end - SEARCHED)
        found = [[first + match.start() for match in border.finditer(text[first:end])] for border in BORDERS]
        for place in chain(*(reversed(each[-8:]) for each in found), range(end - 1, end - 17, -1)):
            left, right = text[max(0, place - AROUND) : place], text[place : place + AROUND]
            whole, before, after = self._encode_whole([left + right, left, right])
            if [*before, *after] == [*whole]:
                return place
        return 0

    @cached_property
    def _is_control(self) -> np.ndarray:
        """By id, bool [largest control id + 2]; the last is False."""
        table = np.zeros(max(self.control, default=-1) + 2, bool)
        table[list(self.control)] = True
        return table

    def _respell(self, ids: Ids) -> list[int]:
        result: list[int] = []
        for each in ids:
            if each not in self.control:
                result.append(each)
                continue
            if each not in self._instead:
                self._instead[each] = self._spelling(each)
            pieces, whole = self._instead[each]
            result += pieces
            self.respelled += 1
            self.lost += not whole
        return result

    def _spelling(self, control: int) -> tuple[list[int], bool]:
        """(the fewest other pieces that spell this token, whether they spell all of it)."""
        if control in self._unknown:
            return [], False
        text = self._tokenizer.convert_ids_to_tokens(control)
        filler = sorted(self._unknown - self.control)[:1]
        best: list[tuple[int, list[int]]] = [(0, [])]
        for end in range(1, len(text) + 1):
            ways = []
            for start in range(end):
                if (pieces := self._pieces(text[start:end], start > 0)) is not None:
                    ways.append((best[start][0] + len(pieces), best[start][1] + pieces))
            ways.append((best[end - 1][0] + MISSING, best[end - 1][1] + filler))
            best.append(min(ways, key=lambda way: way[0]))
        cost, pieces = best[-1]
        return pieces, cost < MISSING

    def _pieces(self, text: str, inside: bool) -> list[int] | None:
        """The ordinary piece of the model's alphabet, or the bytes of a single character, None if it has neither."""
        prefix = self._model["continuing_subword_prefix"] or "" if inside else ""
        piece = self._id(prefix + text)
        if piece is not None:
            return [piece]
        if len(text) > 1 or not self._model["byte_fallback"]:
            return None
        every = [self._id(f"<0x{byte:02X}>") for byte in text.encode("utf-8", "replace")]
        pieces = [each for each in every if each is not None]
        return pieces if len(pieces) == len(every) else None

    def _id(self, piece: str) -> int | None:
        """The id of an ordinary piece."""
        found = self._vocabulary.get(piece)
        return None if found in self._not_ordinary else found

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    @cached_property
    def _not_ordinary(self) -> set[int]:
        return {*self.control, *self._unknown, *self._tokenizer.added_tokens_decoder}


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The token ids of each whole text, without control tokens: a text that spells one stays text."""
    return TextTokens(tokenizer)(texts)


def _model_of(backend: Any) -> dict[str, Any]:
    """unk_id, byte_fallback and continuing_subword_prefix of a Rust tokenizer's model."""
    result = dict.fromkeys(("unk_id", "byte_fallback", "continuing_subword_prefix"))
    if backend is None:
        return result
    if type(backend.model).__name__ == "Unigram":
        # The only kind whose settings can be read from its JSON alone.
        return result | {name: value for name, value in json.loads(backend.to_str())["model"].items() if name in result}
    name = getattr(backend.model, "unk_token", None)
    return {key: getattr(backend.model, key, None) for key in result} | {
        "unk_id": None if name is None else backend.token_to_id(name)
    }


def _text_backend(tokenizer: Any, control: frozenset[int]) -> Any:
    """The Rust tokenizer that encodes every control token as text, or None if there is none.

    It is the given one, or a copy if that one does not know all control tokens for special.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or all(
        token.special for number, token in tokenizer.added_tokens_decoder.items() if number in control
    ):
        return backend
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] |= token["id"] in control
    return type(backend).from_str(json.dumps(state))
