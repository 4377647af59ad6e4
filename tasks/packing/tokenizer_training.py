"""Training a byte-level BPE on a sample of the corpus, in time linear in the sample's bytes whatever the text.

The trainer applies every merge inside every word, and a word is what its pattern finds: a run of letters, digits, other
signs or spaces. A run without a break (ACGT, Chinese without punctuation, a megabyte of spaces) is one word, whose
merges cost its length squared: 56 CPU s for 250,000 characters. So words are cut at WORD_BYTES while it is trained.
Ordinary text has no such word, and its tokenizer is the same, byte for byte. The tokenizer itself does not cut: to
encode a word costs n log n (5 million characters in 1 to 7 CPU s).

The sample has an equal number of bytes of every language, in each part of the corpus as many as its share of that
language; texts that are not in the sample are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.table import first_rows, parts, read_part
from eclectus.tasks.documents.text_reader import TextReader

WORD_BYTES = 512
OTHER = "other"
OVER_BYTES = 100_000
"""How far the last text of a language may go over the budget: longer ones are cut, so that the sample is bounded."""


def train_bpe(texts: Iterator[str], vocabulary: int, end_of_document: str) -> Any:
    """A `tokenizers.Tokenizer` of this vocabulary, whose first token is end_of_document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(WORD_BYTES)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end_of_document],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = words
    return bpe


def sample(documents: Artifact, budget: int) -> Iterator[str]:
    """Texts of the training split, up to an equal number of bytes per language. budget: bytes of all languages."""
    return (text for _, text in labelled_sample(documents, budget))


def labelled_sample(
    documents: Artifact, budget: int, split: str = "train", group: str | None = None
) -> Iterator[tuple[str | None, str]]:
    """`sample` as (language, text), of any split. group: whose languages; None: all but `other`."""
    labels = [_labels(path, split, group) for path in parts(documents)]
    ahead = Counter[str | None]()
    for each in labels:
        ahead.update(each.bytes)
    left = dict.fromkeys(ahead, budget // max(1, len(ahead)))
    reader, first = TextReader(documents), first_rows(documents)
    for number, each in enumerate(labels):
        allowed = {name: left[name] * size // max(1, ahead[name]) for name, size in each.bytes.items()}
        rows, sizes, most, names = _chosen(each.path, allowed, split, group)
        for name, size in zip(names, sizes.tolist(), strict=True):
            left[name] = max(0, left[name] - size)
        ahead.subtract(each.bytes)
        texts = reader.read(first[number] + rows)
        for name, text, size, limit in zip(names, texts, sizes.tolist(), most.tolist(), strict=True):
            yield name, text if size <= limit else text.encode()[:limit].decode(errors="ignore")


@dataclass(frozen=True)
class _Labels:
    """A part's documents of a split. bytes: by language, of the texts; 1 where they are empty, so that none is lost."""

    path: Path
    bytes: dict[str | None, int]


def _labels(path: Path, split: str, group: str | None) -> _Labels:
    sums = Counter[str | None]()
    where = (("split", "==", split), ("group", "==", group) if group else ("group", "!=", OTHER))
    for batch in read_part(path, ["language", "bytes"], where):
        grouped = pa.table(batch.columns, batch.schema.names).group_by("language").aggregate([("bytes", "sum")])
        for name, size in zip(grouped["language"].to_pylist(), grouped["bytes_sum"].to_pylist(), strict=True):
            sums[name] += max(1, size or 0)
    return _Labels(path, dict(sums))


def _chosen(
    path: Path, allowed: dict[str | None, int], split: str, group: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str | None]]:
    """Rows in the part, ascending, of the first documents of each language until its allowance is used.

    Returns (rows [n], bytes of each [n], bytes of each to take at most [n], language of each).
    """
    row, rows, codes, sizes, names = 0, [], [], [], list(allowed)
    number = {name: code for code, name in enumerate(names)}
    for batch in read_part(path, ["language", "bytes", "split", "group"]):
        of_group = pc.equal(batch["group"], group) if group else pc.not_equal(batch["group"], OTHER)
        wanted = pc.and_(pc.equal(batch["split"], split), of_group).fill_null(False)
        here = np.flatnonzero(wanted.to_numpy(zero_copy_only=False))
        language = batch["language"].dictionary_encode()
        found = np.array([number.get(name, -1) for name in [*language.dictionary.to_pylist(), None]], np.int32)
        indices = language.indices.fill_null(len(found) - 1).to_numpy(zero_copy_only=False)
        rows.append(row + here)
        codes.append(found[indices[here]])
        sizes.append(batch["bytes"].fill_null(0).to_numpy(zero_copy_only=False)[here])
        row += len(batch)
    row_N, code_N, size_N = (np.concatenate(each or [np.empty(0, np.int64)]) for each in (rows, codes, sizes))
    order = np.argsort(code_N, kind="stable")
    before = np.cumsum(size_N[order]) - size_N[order]
    starts = np.searchsorted(code_N[order], np.arange(len(names)))
    limit = np.array(list(allowed.values()), np.int64)[code_N[order]]
    left = limit - (before - before[starts[code_N[order]]]) if len(order) else before
    kept = np.sort(order[left > 0])
    most = np.empty(len(order), np.int64)
    most[order] = np.maximum(left, OVER_BYTES)
    return row_N[kept], size_N[kept], most[kept], [names[code] for code in code_N[kept].tolist()]
