"""Matrices on disk: filled through a memory map, or in parts and read as one."""

from __future__ import annotations

import functools
import io
import math
import mmap
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact

RESIDENT_BYTES = 256 * 2**20
AROUND = 16 * 4096
PIECE = 4_096
MAGIC, LONGEST_HEADER = b"\x93NUMPY", 10_000


def create_matrix(path: Path, dtype: Any, shape: tuple[int, int]) -> np.memmap:
    """A new `.npy` file of this shape, mapped for writing. Raises OSError if the disk is full.

    The space is allocated now: a write to a mapped page for which the disk has no room kills the process (SIGBUS).
    """
    matrix = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return matrix


def usable_rows(vectors: np.ndarray | PartMatrix) -> np.ndarray:
    """Which rows have an embedding, bool [N]: all finite, and not all zero."""
    usable = np.zeros(len(vectors), bool)
    for begin in range(0, len(vectors), 2**16):
        block = np.asarray(vectors[begin : begin + 2**16])
        usable[begin : begin + len(block)] = np.isfinite(block).all(axis=1) & (block != 0).any(axis=1)
    return usable


class PartMatrix:
    """Matrices `.npy` of parts [n_i, ...], read as one [N, ...]: `matrix[rows]` for int rows in any order, or a slice.

    The result is always in memory. Pages that were read are given back after RESIDENT_BYTES, so that a matrix larger
    than memory stays on disk. begins: int64 [parts + 1], the first row of each part.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises OSError or ValueError for a file that is none."""
        self._parts = [mapped(path) for path in paths]
        widths = [part.shape[1:] for part in self._parts if len(part)] or [part.shape[1:] for part in self._parts]
        self.begins = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])]).astype(np.int64)
        self.shape = (int(self.begins[-1]), *(widths[0] if widths else ()))
        self.dtype = self._parts[0].dtype if self._parts else np.dtype(np.float32)
        self._touched = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        flat = rows.ravel()
        flat = np.where(flat < 0, flat + len(self), flat)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        # In the order of the file, so that each of its pages is brought in once.
        order = np.argsort(flat, kind="stable") if (flat[1:] < flat[:-1]).any() else None
        flat = flat if order is None else flat[order]
        if len(flat) and not 0 <= flat[0] <= flat[-1] < len(self):
            raise IndexError(f"row {flat[0] if flat[0] < 0 else flat[-1]} of {len(self)}")
        bounds = np.searchsorted(flat, self.begins).tolist()
        for part, begin, (first, last) in zip(self._parts, self.begins.tolist(), pairwise(bounds), strict=False):
            if last > first:
                here = flat[first:last] - begin
                for start in range(0, len(here), PIECE):
                    lines = slice(first + start, min(first + start + PIECE, last))
                    out[lines if order is None else order[lines]] = part[here[start : start + PIECE]]
                # A row brings in its page, and the kernel up to 15 around it.
                around = np.diff(here * (part.nbytes // len(part)) // AROUND) > 0
                self._give_back(min(part.nbytes, AROUND * (1 + int(around.sum()))))
        return out.reshape(*rows.shape, *self.shape[1:])

    def _give_back(self, touched: int) -> None:
        self._touched += touched
        if self._touched < RESIDENT_BYTES:
            return
        self._touched = 0
        for part in self._parts:
            if isinstance(part.base, mmap.mmap):
                part.base.madvise(mmap.MADV_DONTNEED)


def mapped(path: Path) -> np.ndarray:
    """The array of a `.npy` file, mapped for reading. Raises OSError, or ValueError for a file that is none or is cut.

    As `numpy.load` does, in a fifth of its time: an update of neighbours opens ten thousand.
    """
    with open(path, "rb") as file:
        start = file.read(12)
        if start[:6] != MAGIC:
            raise ValueError(f"{path} is no .npy file")
        begins = 10 if start[6] == 1 else 12
        length = int.from_bytes(start[8:begins], "little")
        header = (start + file.read(min(length, LONGEST_HEADER)))[: begins + length]
        shape, fortran, dtype, offset = _described(header)
        if dtype.hasobject:
            raise ValueError(f"{path} holds Python objects")
        size = math.prod(shape) * dtype.itemsize
        missing = offset + size - os.fstat(file.fileno()).st_size
        if missing > 0:
            raise ValueError(f"{path} is cut: {missing:,} bytes are missing")
        if not size:
            return np.empty(shape, dtype)
        content = mmap.mmap(file.fileno(), offset + size, access=mmap.ACCESS_READ)
    return np.ndarray(shape, dtype, content, offset, order="F" if fortran else "C")


@functools.lru_cache(1024)
def _described(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran's order, type and offset of the data of a `.npy` file that begins with these bytes."""
    file = io.BytesIO(header)
    read = np.lib.format.read_array_header_1_0
    if np.lib.format.read_magic(file) != (1, 0):
        read = np.lib.format.read_array_header_2_0
    return *read(file), file.tell()


def matrix_files(artifact: Artifact, name: str) -> list[Path]:
    """The parts of a matrix of an artifact, in order: `<name>/part-*.npy`, or `<name>.npy` where there is only one."""
    whole = artifact.file(f"{name}.npy")
    return [whole] if whole.is_file() else sorted(Path(artifact.path).glob(f"{name}/part-*.npy"))


def open_matrix(artifact: Artifact, name: str) -> PartMatrix:
    """A matrix of an artifact with one row per document: "neighbors", "similarities". Raises OSError if it has none."""
    files = matrix_files(artifact, name)
    if not files:
        raise FileNotFoundError(f"{artifact.name} has no {name}")
    return PartMatrix(files)


def open_embeddings(artifact: Artifact) -> PartMatrix:
    """The embeddings [N, D] of an artifact; row i is that of document i."""
    return open_matrix(artifact, "embeddings")


def open_ids(artifact: Artifact) -> PartMatrix:
    """The ids bytes [N] of the documents of an artifact of embeddings."""
    return open_matrix(artifact, "ids")
