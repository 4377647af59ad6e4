"""Exact search against the index, and an update against a new search: python benchmarks/neighbors.py [N] [dimension]

Vectors around 2,000 centres, unit length; k = 20. The update has 1% new documents.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np

from eclectus.storage.home import Home
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, Partition, search
from eclectus.tasks.grouping.neighbor_update import Earlier, update


def vectors_of(count: int, dimension: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((2_000, dimension), np.float32)
    vectors = centres[random.integers(0, 2_000, count)] + random.standard_normal((count, dimension), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def lists_for(count: int, k: int) -> Lists:
    return Lists(np.full((count, k), -1, np.int32), np.full((count, k), np.nan, np.float32))


def searched(vectors: np.ndarray, count: int, settings: NeighborSettings):
    lists = lists_for(len(vectors), settings.neighbors_k)
    begun = time.perf_counter()
    reported = search(vectors, Partition("all", np.arange(count)), lists, settings)
    return lists, time.perf_counter() - begun, reported


def main(count: int, dimension: int) -> None:
    vectors = vectors_of(count, dimension)
    exact = NeighborSettings(neighbors_exact_below=2 * count)
    index = NeighborSettings(neighbors_exact_below=0)
    truth, seconds, _ = searched(vectors, count, exact)
    print(f"exact   {count} x {dimension}: {seconds:.1f} s")
    found, took, reported = searched(vectors, count, index)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(truth.rows, found.rows, strict=True)])
    print(f"index   {took:.1f} s ({took / seconds:.2f} of exact), recall {recall:.4f}, reported {reported}")
    for name, settings, full, lists_full in (("exact", exact, seconds, truth), ("index", index, took, None)):
        then = count - count // 100
        lists = searched(vectors, then, settings)[0]
        with tempfile.TemporaryDirectory() as folder:
            earlier = earlier_lists(Home.open(folder), name, then)
            begun = time.perf_counter()
            carried = np.arange(count) < then
            update(vectors, Partition("all", np.arange(count)), earlier, carried, lists, settings)
            updated = time.perf_counter() - begun
        same = "" if lists_full is None else f", equal to a new search: {np.array_equal(lists.rows, lists_full.rows)}"
        print(f"update of {name} lists by 1%: {updated:.2f} s ({updated / full:.3f} of a new search){same}")


def earlier_lists(home: Home, method: str, count: int) -> Earlier:
    """What `update` needs to know of the existing lists: by which method they were found."""
    with home.store.draft("neighbors") as out:
        out.file("note.txt").write_text(method)
        out.statistics = {"partitions": [{"partition": "all", "method": "exact" if method == "exact" else "ivf"}]}
        return Earlier(home.store.commit(out), np.arange(count))


if __name__ == "__main__":
    main(*[int(float(value)) for value in sys.argv[1:3]] or [100_000], *([256] if len(sys.argv) < 3 else []))
