"""Training instances as a trainer reads them: memory-mapped, with document, language and domain of every token.

Files, written by `eclectus.tasks.packing.pack`:
    instances.json   names of languages and domains, and where the tokens lie
    tokens           [M, L] uint16 or uint32, inside an Arrow file at the offset in instances.json
    spans.npy        [S, 5] int64, one row per part of a document inside an instance, sorted by start:
                     (start in the flat token stream, length, document ordinal, language, domain)

Labels of tokens are expanded from the spans only for the batch that is read: 40 bytes per span on disk, not 4 per
token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """B instances of L tokens: all fields [B, L] int64; at padding labels are IGNORED, the fields after them -1."""

    tokens: torch.Tensor
    labels: torch.Tensor
    languages: torch.Tensor
    domains: torch.Tensor
    documents: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


class Instances:
    """The instances in a directory: `len`, `batch(rows)`, `rows_of_step`.

    reordered: the first epoch, too, is read in an order of the training's own seed, not in the stored order.
    """

    def __init__(self, folder: Path | str, reordered: bool = False) -> None:
        folder, self._skipped_epochs = Path(folder), int(reordered)
        about = json.loads((folder / "instances.json").read_text())
        at = about["matrices"]["input_ids"]
        self.tokens = np.memmap(folder / at["file"], at["dtype"], "r", at["offset"], (at["rows"], at["columns"]))
        self.spans = np.load(folder / "spans.npy", mmap_mode="r")
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
        tokens = torch.from_numpy(self.tokens[rows].astype(np.int64))
        documents, languages, domains = (np.full((len(rows), self.length), -1, np.int64) for _ in range(3))
        starts = self.spans[:, 0]
        for i, row in enumerate(rows):
            first, last = np.searchsorted(starts, (row * self.length, (row + 1) * self.length))
            for start, length, document, language, domain in self.spans[first:last]:
                here = slice(start - row * self.length, start - row * self.length + length)
                documents[i, here], languages[i, here], domains[i, here] = document, language, domain
        labels = tokens.masked_fill(torch.from_numpy(documents < 0), IGNORED)
        return Batch(tokens, labels, *(torch.from_numpy(array) for array in (languages, domains, documents)))

    def rows_of_step(self, step: int, size: int, seed: int) -> np.ndarray:
        """The instance numbers [size] of a training step: a pure function of its arguments, for exact resuming."""
        first = step * size + self._skipped_epochs * len(self)
        return rows_at(np.arange(first, first + size), len(self), seed)


def rows_at(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows at these positions of an endless reading of `count` rows.

    The first epoch reads the (already shuffled) stored order, every later one a new permutation.
    """
    epochs, rows = positions // count, positions % count
    for epoch in np.unique(epochs[epochs > 0]):
        here = epochs == epoch
        rows[here] = np.random.default_rng([seed, int(epoch)]).permutation(count)[rows[here]]
    return rows
