"""Tokens of documents, part by part: each part of the corpus is tokenised once, for every packing that needs it.

    tokens       begin, text, end of every document, end to end, uint16 or uint32
    rows.npy     uint32 [n], the documents' rows in their part, ascending
    sizes.npy    uint32 [n], tokens of each
    control.npy  int64 [k, 3], of documents that spell control tokens: position in `rows`, how many, how many were lost

The unit is the documents of one group (original, expanded) in one part, so that packing first the original and then the
expanded languages tokenises each once. It is keyed by the part's content, these rows and the tokenizer, not by the
split: held-out documents are tokenised too (1%), and another split, seed or grouping, or a corpus that has grown, finds
the tokens. Where more than half of a group is not trained on (budgets), its training documents are the unit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.table import labels_of, parts, read_part
from eclectus.tasks.over_parts import Done, Part, key_of, over_parts
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import load_tokenizer

TEXTS_AT_ONCE = 512
BYTES_AT_ONCE = 4 * 2**20
SECONDS_PER_BYTE = 4e-7
OTHER = "other"


@dataclass(frozen=True)
class Form:
    """How documents become tokens: a function on a part, its own arguments, and the version in its key."""

    function: Callable[..., dict[str, Any]]
    version: str
    arguments: dict[str, Any]


def framed(begin: list[int], end: int) -> Form:
    """Documents as text. begin, end: tokens around each."""
    return Form(tokens_of_part, "tokens 1", {"begin": begin, "end": end})


def tokenize(
    documents: Artifact, tokenizer: Artifact, group: str, form: Form, kind: np.dtype, workers: int
) -> list[tuple[int, Done]]:
    """(number of the documents part, its tokens) for all training documents of a group; none if there are none.

    group: or `all`, which is every group but `other`. kind: of the tokens.
    """
    wanted, numbers, size = [], [], 0
    digests = documents.digests()
    for number, path in enumerate(parts(documents)):
        for name, chosen, only_training in _units(path, group):
            rows = hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest()
            content = digests[f"documents/{path.name}"], len(chosen), rows, tokenizer.digest
            arguments = {
                "path": path,
                "labels": labels_of(path),
                "group": name,
                "only_training": only_training,
                "tokenizer": Path(tokenizer.path),
                "kind": kind.name,
                **form.arguments,
            }
            key = key_of(form.version, *content, *form.arguments.values(), kind.name)
            wanted.append(Part(key, arguments, int(chosen.sum()), f"the tokens of {path.name}"))
            numbers.append(number)
        size += path.stat().st_size
    documents_in_all = max(1, sum(int(part.size) for part in wanted))
    # A part's file is compressed to about a third.
    seconds = 3 * SECONDS_PER_BYTE * size / documents_in_all
    done = over_parts(form.function, wanted, "tokenising", "documents", seconds, workers)
    return list(zip(numbers, done, strict=True))


def coded(column: pa.Array) -> tuple[np.ndarray, list[str | None]]:
    """A column of labels as codes, int [n], and the names that they index; the last name is None."""
    column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names = [*column.dictionary.to_pylist(), None]
    return column.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False), names


def groups_and_training(path: Path) -> tuple[np.ndarray, list[str | None], np.ndarray]:
    """(group of each document of a part as a code, int [n]; names of the groups; whether it is trained on, bool [n])"""
    names: list[str | None] = []
    groups, training = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for batch in read_part(path, ["group", "split"], rows=2**20, dictionary=["group", "split"]):
        codes, here = coded(batch["group"])
        names += [name for name in here if name not in names]
        groups.append(np.array([names.index(name) for name in here])[codes])
        codes, here = coded(batch["split"])
        training.append(np.array([name == "train" for name in here])[codes])
    return np.concatenate(groups), names, np.concatenate(training)


def belongs(name: str | None, group: str | None) -> bool:
    """Whether documents of the group `name` are packed as `group`, which may be `all`."""
    return name != OTHER if group == "all" else name == group


def tokens_of_part(
    out: Path,
    path: Path,
    labels: Path | None,
    group: str | None,
    only_training: bool,
    tokenizer: Path,
    begin: list[int],
    end: int,
    kind: str,
) -> dict[str, Any]:
    """Tokenises the documents of a group in a part. labels: of the part, which must be here when it is read."""
    encode, dtype = encoder_of(tokenizer), np.dtype(kind)
    chosen = chosen_rows(path, group, only_training)
    sizes, control, done = [np.empty(0, np.uint32)], [np.empty((0, 3), np.int64)], 0
    around = len(begin) + 1
    with open(out / "tokens", "wb") as handle:
        for texts in texts_of(path, chosen):
            ids, lengths, found = encode.flat(texts, dtype)
            ends = np.cumsum(lengths + around)
            tokens = np.full(ends[-1], end, dtype)
            inside = np.ones(len(tokens), bool)
            inside[ends - 1] = False
            for number, each in enumerate(begin):
                here = ends - lengths - around + number
                tokens[here], inside[here] = each, False
            tokens[inside] = ids
            tokens.tofile(handle)
            sizes.append((lengths + around).astype(np.uint32))
            control.append(found + np.array([done, 0, 0]))
            done += len(texts)
    np.save(out / "rows.npy", np.flatnonzero(chosen).astype(np.uint32))
    np.save(out / "sizes.npy", np.concatenate(sizes))
    np.save(out / "control.npy", np.concatenate(control))
    return {"documents": done, "tokens": int(sum(int(each.sum(dtype=np.int64)) for each in sizes))}


def _units(path: Path, group: str) -> Iterator[tuple[str | None, np.ndarray, bool]]:
    """(group, which rows of the part, whether only training documents), of the groups that have documents to pack."""
    groups, names, training = groups_and_training(path)
    for code, name in enumerate(names):
        of_group = groups == code
        count = int((of_group & training).sum())
        if count and belongs(name, group):
            only_training = 2 * count < int(of_group.sum())
            yield name, of_group & training if only_training else of_group, only_training


def chosen_rows(path: Path, group: str | None, only_training: bool) -> np.ndarray:
    """Which rows of a part are tokenised: bool [n]."""
    groups, names, training = groups_and_training(path)
    of_group = groups == names.index(group)
    return of_group & training if only_training else of_group


def texts_of(path: Path, chosen: np.ndarray) -> Iterator[list[str]]:
    """The texts of these rows of a part, a few at once: at most BYTES_AT_ONCE, or one text."""
    for batch in read_part(path, ["text"], rows=TEXTS_AT_ONCE, chosen=chosen):
        texts = batch["text"].fill_null("")
        ends = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False))
        first = 0
        while first < len(texts):
            used = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, used + BYTES_AT_ONCE, side="right")))
            yield texts.slice(first, last - first).to_pylist()
            first = last


@functools.lru_cache(maxsize=2)
def encoder_of(folder: Path) -> TextTokens:
    """Of an artifact, whose files never change."""
    return TextTokens(load_tokenizer(folder))
