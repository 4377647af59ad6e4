"""Finished embeddings on disk: logs that survive a killed run, and lookup of vectors by document id."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eclectus.tasks.documents.digest_set import positions_of

STALE_SECONDS = 3_600


class Log:
    """The finished work of one process: two files of raw numbers, `NAME.ids` and `NAME.DIMENSION.PRECISION.vectors`.

    A row is complete once its id is written, after its vector; readers ignore a row that a kill cut short.
    """

    def __init__(self, work: Path) -> None:
        self._work, self._name = work, uuid.uuid4().hex

    def append(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids: bytes [n]. vectors: [n, D]."""
        with open(self._work / f"{self._name}.{vectors.shape[1]}.{vectors.dtype.name}.vectors", "ab") as file:
            file.write(np.ascontiguousarray(vectors).tobytes())
        with open(self._work / f"{self._name}.ids", "ab") as file:
            file.write(ids.astype("S32").tobytes())


@dataclass(frozen=True)
class StoredVectors:
    """Vectors on disk [n, D] with the ids of their documents [n]: an earlier artifact, or a log of unfinished work."""

    ids: np.ndarray
    vectors: np.ndarray


def read_logs(work: Path) -> list[StoredVectors]:
    """The complete rows of the logs in a work folder."""
    found = []
    for path in sorted(work.glob("*.vectors")):
        name, dimension, precision, _ = path.name.rsplit(".", 3)
        width = int(dimension) * np.dtype(precision).itemsize
        ids = work / f"{name}.ids"
        count = min(path.stat().st_size // width, ids.stat().st_size // 32) if ids.is_file() else 0
        if count:
            vectors = np.memmap(path, precision, "r", shape=(count, int(dimension)))
            found.append(StoredVectors(np.fromfile(ids, "S32", count), vectors))
    return found


def locate(ids: np.ndarray, known: list[StoredVectors]) -> np.ndarray:
    """Where the vector of each document is: int64 [N, 2] of (index into `known`, row there), or -1."""
    where, missing = np.full((len(ids), 2), -1, np.int64), np.arange(len(ids))
    for number, each in enumerate(known):
        if not len(missing):
            break
        position = positions_of(ids[missing], each.ids)
        hit = position >= 0
        where[missing[hit]] = np.stack([np.full(hit.sum(), number), position[hit]], axis=1)
        missing = missing[~hit]
    return where


def remove_stale_logs(work: Path, known: list[StoredVectors]) -> None:
    """Removes logs that were not written for an hour and whose documents are all in `known`."""
    for path in sorted(work.glob("*.ids")):
        if path.stat().st_mtime > time.time() - STALE_SECONDS:
            continue
        ids = np.fromfile(path, "S32", path.stat().st_size // 32)
        if known and (locate(ids, known)[:, 0] >= 0).all():
            for file in work.glob(f"{path.stem}.*"):
                file.unlink(missing_ok=True)
