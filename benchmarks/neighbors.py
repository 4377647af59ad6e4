"""Exact search against search by cells: python benchmarks/neighbors.py [N] [dimension]

Vectors around 2,000 centres, unit length; k = 20; one process. Prints CPU seconds, and the recall of the cells by
cosine, which counts any of equally near documents.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from eclectus.tasks.grouping.cells.corpus import Corpus
from eclectus.tasks.grouping.cells.lists import write_lists
from eclectus.tasks.grouping.cells.partition import search_partition
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, Partition, search
from eclectus.tasks.over_parts import key_of

SETTINGS = NeighborSettings()


def vectors_of(count: int, dimension: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((2_000, dimension), np.float32)
    vectors = centres[random.integers(0, 2_000, count)] + random.standard_normal((count, dimension), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main(count: int, dimension: int) -> None:
    vectors, k = vectors_of(count, dimension), SETTINGS.neighbors_k
    lists = Lists(np.full((count, k), -1, np.int32), np.full((count, k), np.nan, np.float32))
    begun = time.process_time()
    search(vectors, Partition("all", np.arange(count)), lists, SETTINGS)
    seconds = time.process_time() - begun
    print(f"exact   {count} x {dimension}: {seconds:.1f} CPU s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "embeddings.npy")
        np.save(path, vectors)
        key = key_of("benchmark", count, dimension)
        corpus = Corpus([path], [key], np.array([0, count]), SETTINGS, key, 1)
        begun = time.process_time()
        found = search_partition(corpus, "all", np.arange(count), corpus.hashes())
        (part,) = write_lists(corpus, [], [found], count)
        took = time.process_time() - begun
        near = np.load(part.file("similarities.npy")) >= lists.similarities[:, -1:] - 1e-5
    print(f"cells   {took:.1f} CPU s ({took / seconds:.2f} of exact), recall {near.mean():.4f}, {found.statistics}")


if __name__ == "__main__":
    main(*[int(float(value)) for value in sys.argv[1:3]] or [100_000], *([256] if len(sys.argv) < 3 else []))
