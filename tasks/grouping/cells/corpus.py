"""A corpus whose neighbours are searched in parts, and the documents of one of its partitions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import PartMatrix, mapped, matrix_files, usable_rows
from eclectus.tasks.grouping.cells import tree
from eclectus.tasks.grouping.nearest import NeighborSettings
from eclectus.tasks.over_parts import Done, Part, key_of, over_parts

SECONDS = {"hash": 3e-6, "nodes": 8e-6, "split": 15e-6, "sample": 8e-6, "cells": 15e-6, "search": 60e-6, "merge": 5e-6}
"""CPU seconds per document (256 dimensions), to choose between this process and Ray."""


@dataclass(frozen=True)
class Corpus:
    """What is searched: the files of the embeddings and their digests, rows at which parts begin (int64 [parts + 1]),
    who works.

    key: of everything that decides the lists. made: results of all stages, for `forget`.
    """

    embeddings: list[Path]
    digests: list[str]
    begins: np.ndarray
    settings: NeighborSettings
    key: str
    workers: int = 0
    made: list[Done] = field(default_factory=list)

    @classmethod
    def of(cls, embeddings: Artifact, begins: np.ndarray, labels: np.ndarray, settings: NeighborSettings) -> Corpus:
        """labels: int32 [N], the partition of each document."""
        files = matrix_files(embeddings, "embeddings")
        of_file = embeddings.digests()
        digests = [of_file[path.relative_to(embeddings.path).as_posix()] for path in files]
        partitions = hashlib.sha256(labels.tobytes()).hexdigest()
        key = key_of("neighbours", digests, begins.tolist(), partitions, settings.key_values())
        return cls(files, digests, begins, settings, key, settings.neighbors_threads or settings.curation_workers)

    @property
    def dimension(self) -> int:
        return int(PartMatrix(self.embeddings).shape[1])

    def hashes(self) -> np.ndarray:
        """Of all documents, uint64 [N]: equal for embeddings with the same bits, 0 where there is none. Kept, so that a
        grown corpus hashes only files with news."""
        files = list(zip(self.embeddings, self.digests, strict=True))
        parts = [
            Part(key_of("hashes of vectors 1", digest), {"embeddings": path}, len(mapped(path)), path.name)
            for path, digest in files
        ]
        seconds, workers = SECONDS["hash"], self.workers
        done = over_parts(hash_vectors, parts, "neighbours: hash", seconds=seconds, workers=workers)
        return np.concatenate([np.load(each.file("hash.npy")) for each in done])

    def over(
        self, function: Any, stage: str, name: str, calls: Sequence[tuple[dict[str, Any], int]], gpus: float = 0
    ) -> list[Done]:
        """`over_parts` for one stage of a partition. calls: arguments and documents of each."""
        parts = [
            Part(key_of(f"cells 1 {stage}", self.key, name, number), arguments, size, f"{name}, {stage} {number}")
            for number, (arguments, size) in enumerate(calls)
        ]
        what = f"neighbours of {name}: {stage}" if name else f"neighbours: {stage}"
        done = over_parts(function, parts, what, seconds=SECONDS.get(stage, 0.0), workers=self.workers, gpus=gpus)
        self.made.extend(done)
        return done

    def publish(self, stage: str, name: str, arrays: dict[str, np.ndarray]) -> Path:
        """A folder with these arrays as `.npy`, for the workers."""
        part = Part(key_of(f"cells 1 {stage}", self.key, name), {"arrays": arrays}, 0, f"{name}, {stage}")
        done = over_parts(save_arrays, [part], f"neighbours: {stage}", workers=1)
        self.made.extend(done)
        return done[0].folder


def save_arrays(out: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    return {}


def hash_vectors(out: Path, embeddings: Path) -> dict[str, Any]:
    """Writes hash.npy uint64 [n]: equal for rows of the file with the same bits, 0 for one without an embedding."""
    matrix = PartMatrix([embeddings])
    weights = np.random.default_rng(1).integers(0, 2**63, matrix.shape[1], np.uint64) * 2 + 1
    hashes = np.empty(len(matrix), np.uint64)
    for first in range(0, len(matrix), tree.BATCH):
        block = matrix[first : first + tree.BATCH]
        bits = block.view(f"u{block.dtype.itemsize}").astype(np.uint64)
        found = ((bits * weights).sum(axis=1) << np.uint64(1)) | np.uint64(1)
        hashes[first : first + len(block)] = np.where(usable_rows(block), found, np.uint64(0))
    np.save(out / "hash.npy", hashes)
    return {}


def representatives(rows: np.ndarray, hashes: np.ndarray, vectors: PartMatrix) -> np.ndarray:
    """For each of these rows [n] of `vectors` the position of the first with the same bits, int64 [n].

    hashes: uint64 [n], of `hash_vectors`; rows with the same are compared.
    """
    order = np.argsort(hashes, kind="stable")
    same = np.concatenate([[False], hashes[order[1:]] == hashes[order[:-1]]])[: len(order)]
    maybe = np.flatnonzero(same)
    for begin in range(0, len(maybe), tree.BATCH):
        at = maybe[begin : begin + tree.BATCH]
        same[at] = (vectors[rows[order[at]]] == vectors[rows[order[at - 1]]]).all(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(~same)][np.cumsum(~same) - 1]
    return first


@dataclass(frozen=True)
class Members:
    """The documents of a partition, in a folder: those that are searched, and their copies.

    rows: int64 [n], ascending. own: int32 [n], the number of each one's representative. kept: int64 [R], the rows of
    the representatives. starts, copies: int32, the documents (by position) of each representative, ascending, as CSR.
    """

    folder: Path
    rows: np.ndarray
    own: np.ndarray
    kept: np.ndarray
    starts: np.ndarray
    copies: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> Members:
        names = ("rows", "own", "kept", "starts", "copies")
        return cls(folder, **{name: mapped(folder / f"{name}.npy") for name in names})

    @classmethod
    def find(cls, corpus: Corpus, name: str, rows: np.ndarray, hashes: np.ndarray) -> Members:
        first = representatives(rows, hashes, PartMatrix(corpus.embeddings))
        kept = np.flatnonzero(first == np.arange(len(rows)))
        copies = np.argsort(first, kind="stable")
        arrays = {
            "rows": rows,
            "own": np.searchsorted(kept, first).astype(np.int32),
            "kept": rows[kept],
            "starts": np.searchsorted(first[copies], np.append(kept, len(rows))).astype(np.int32),
            "copies": copies.astype(np.int32),
        }
        return cls.load(corpus.publish("members", name, arrays))

    def ranges(self, begins: np.ndarray) -> list[tuple[int, int]]:
        """The representatives of each part of the corpus, as ranges of their numbers."""
        bounds = np.searchsorted(self.kept, begins).tolist()
        return list(pairwise(bounds))
