"""Training instances as a trainer reads them: memory-mapped, with document, language and domain of every token.

Files, written by `eclectus.tasks.packing.pack`:
    instances.json   names of languages and domains, and where the tokens lie
    tokens           [M, L] uint16 or uint32, inside an Arrow file at the offset in instances.json
    spans.npy        [S, 5] int64, one row per part of a document inside an instance, sorted by start:
                     (start in the flat token stream, length, document ordinal, language, domain)

Large data have several token files and as many files of spans, listed in instances.json; they are read as one.

Labels of tokens are expanded from the spans only for the batch that is read: 40 bytes per span on disk, not 4 per
token.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

IGNORED = -100
RESIDENT_BYTES = 256 * 2**20
PAGE_BYTES, SEARCHED_PAGES = 4096, 20


@dataclass(frozen=True)
class Batch:
    """B instances of L tokens: all fields [B, L] int64; at padding labels are IGNORED, the fields after them -1. Of
    conversations labels are IGNORED wherever the assistant does not speak."""

    tokens: torch.Tensor
    labels: torch.Tensor
    languages: torch.Tensor
    domains: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))

    def without_borders(self) -> Batch:
        """The batch in which no token is predicted from another document: labels where one begins are IGNORED."""
        begins = self.documents != self.documents.roll(1, dims=1)
        return replace(self, labels=self.labels.masked_fill(begins, IGNORED))


class PartedRows:
    """Matrices [n_i, C] in files, read as one [M, C]: `rows[numbers]`, `rows[slice]` and `rows[:, column]` are copies.

    Pages that were read are given back after RESIDENT_BYTES, so that data larger than memory stay on disk.
    """

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._mapped = [mapped for part in parts if (mapped := getattr(part, "_mmap", None)) is not None]
        # Indexing a plain array takes a third of the time of indexing a memory map.
        self.parts = [part.view(np.ndarray) for part in parts]
        self.begins, self._touched = np.cumsum([0, *(len(part) for part in parts)]), 0
        self.shape, self.dtype = (int(self.begins[-1]), parts[0].shape[1]), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype)

    def __getitem__(self, rows: np.ndarray | slice | tuple[slice, int]) -> np.ndarray:
        if isinstance(rows, tuple):
            return np.concatenate([part[:, rows[1]] for part in self.parts])[rows[0]]
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        numbers = np.searchsorted(self.begins, rows, side="right") - 1
        for number in set(numbers.tolist()):
            here = np.flatnonzero(numbers == number)
            out[here] = self.parts[number][rows[here] - self.begins[number]]
        self.touched(out.nbytes + PAGE_BYTES * len(rows))
        return out

    def touched(self, count: int) -> None:
        """Notes that so many bytes of pages were read."""
        self._touched += count
        if self._touched > RESIDENT_BYTES:
            self._touched = 0
            for mapped in self._mapped:
                mapped.madvise(mmap.MADV_DONTNEED)


class Instances:
    """The instances in a directory: `len`, `batch(rows)`, `rows_of_step`.

    reordered: the first epoch, too, is read in an order of the training's own seed, not in the stored order.
    """

    def __init__(self, folder: Path | str, reordered: bool = False) -> None:
        folder, self._skipped_epochs = Path(folder), int(reordered)
        about = json.loads((folder / "instances.json").read_text())
        parts = _mapped(folder, about["matrices"]["input_ids"])
        masks = _mapped(folder, about["matrices"].get("loss_mask", []))
        spans = [np.load(folder / name, mmap_mode="r") for name in about.get("spans", ["spans.npy"])]
        self._part_ends = np.cumsum([len(part) for part in parts])
        self.tokens = _joined(parts)
        # Of conversations only: 1 where the assistant speaks.
        self.loss_mask = _joined(masks) if masks else None
        self.spans = _joined(spans)
        self.length: int = about["length"]
        self.vocabulary: int = about["vocabulary"]
        self.end_of_document: int = about["end_of_document"]
        self.languages: list[str] = about["languages"]
        self.domains: list[str] = about["domains"]

    def __len__(self) -> int:
        return len(self.tokens)

    def largest_token(self) -> int:
        """The largest token id in the instances; reads all of them."""
        return max(int(self.tokens[first : first + 4096].max()) for first in range(0, len(self), 4096))

    def batch(self, rows: np.ndarray) -> Batch:
        """The instances with these numbers [B] int, in that order."""
        rows = np.asarray(rows, np.int64)
        tokens = torch.from_numpy(self.tokens[rows].astype(np.int64))
        spans, place, _ = self._spans_of(rows)
        inside, length = self._inside(rows, spans, place), spans[:, 1]
        columns = []
        for column in (3, 4, 2):
            values = np.full((len(rows), self.length), -1, np.int64)
            values.reshape(-1)[inside] = np.repeat(spans[:, column], length)
            columns.append(torch.from_numpy(values))
        ignored = columns[2] < 0
        if self.loss_mask is not None:
            ignored |= torch.from_numpy(self.loss_mask[rows] == 0)
        return Batch(tokens, tokens.masked_fill(ignored, IGNORED), *columns)

    def spans_of_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(numbers of the spans in these instances [S]; of each the position in `rows` of its instance [S]; of each
        token of these instances, end to end, the position in both of its span [B * L], -1 at padding)."""
        found = self._spans_of(rows)
        # Of several parts they come part by part.
        order = np.argsort(found[1], kind="stable")
        spans, place, numbers = (each[order] for each in found)
        inside = self._inside(rows, spans, place)
        owner = np.full(len(rows) * self.length, -1, np.int64)
        owner[inside] = np.repeat(np.arange(len(numbers)), spans[:, 1])
        return numbers, place, owner

    def _inside(self, rows: np.ndarray, spans: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Where the tokens of these spans stand in the instances `rows`, end to end."""
        start, length = spans[:, 0] - (rows - np.arange(len(rows)))[place] * self.length, spans[:, 1]
        return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())

    def _spans_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the spans of these instances, int64 [S, 5]; of each the position in `rows` of its instance, int64 [S]; their
        numbers, int64 [S])."""
        parts = [self.spans] if isinstance(self.spans, np.ndarray) else self.spans.parts
        begins = np.zeros(1, np.int64) if isinstance(self.spans, np.ndarray) else self.spans.begins
        number = np.searchsorted(self._part_ends, rows, side="right") if len(parts) > 1 else np.zeros_like(rows)
        found, places, numbers = [np.empty((0, 5), np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for part in set(number.tolist()):
            here = np.flatnonzero(number == part)
            borders = np.concatenate([rows[here], rows[here] + 1]) * self.length
            first, last = np.searchsorted(parts[part][:, 0], borders).reshape(2, -1)
            counts = last - first
            chosen = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
            found.append(parts[part][chosen])
            places.append(np.repeat(here, counts))
            numbers.append(begins[part] + chosen)
        if isinstance(self.spans, PartedRows):
            self.spans.touched(len(rows) * SEARCHED_PAGES * PAGE_BYTES)
        return np.concatenate(found), np.concatenate(places), np.concatenate(numbers)

    def rows_of_step(self, step: int, size: int, seed: int) -> np.ndarray:
        """The instance numbers [size] of a training step: a pure function of its arguments, for exact resuming."""
        first = step * size + self._skipped_epochs * len(self)
        return rows_at(np.arange(first, first + size), len(self), seed)


def _mapped(folder: Path, located: dict[str, Any] | list[dict[str, Any]]) -> list[np.ndarray]:
    """The parts of a matrix, where instances.json says that they are."""
    return [
        np.memmap(folder / at["file"], at["dtype"], "r", at["offset"], (at["rows"], at["columns"]))
        for at in (located if isinstance(located, list) else [located])
    ]


def _joined(parts: list[np.ndarray]) -> np.ndarray | PartedRows:
    return parts[0] if len(parts) == 1 else PartedRows(parts)


def rows_at(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows at these positions of an endless reading of `count` rows.

    The first epoch reads the (already shuffled) stored order, every later one a new permutation.
    """
    epochs, rows = positions // count, positions % count
    for epoch in np.unique(epochs[epochs > 0]):
        here = epochs == epoch
        rows[here] = np.random.default_rng([seed, int(epoch)]).permutation(count)[rows[here]]
    return rows
