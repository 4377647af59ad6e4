"""Matrices on disk that are filled through a memory map."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def create_matrix(path: Path, dtype: Any, shape: tuple[int, int]) -> np.memmap:
    """A new `.npy` file of this shape, mapped for writing. Raises OSError if the disk is full.

    The space is allocated now: a write to a mapped page for which the disk has no room kills the process (SIGBUS).
    """
    matrix = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return matrix


def usable_rows(vectors: np.ndarray) -> np.ndarray:
    """Which rows have an embedding, bool [N]: all finite, and not all zero."""
    usable = np.zeros(len(vectors), bool)
    for begin in range(0, len(vectors), 2**16):
        block = np.asarray(vectors[begin : begin + 2**16])
        usable[begin : begin + len(block)] = np.isfinite(block).all(axis=1) & (block != 0).any(axis=1)
    return usable
