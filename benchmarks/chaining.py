"""Chaining time, memory and adjacent similarity against two peers in one run: python benchmarks/chaining.py [N ...]

    eclectus    eclectus.tasks.grouping.group.chain: symmetrised graph, minimum-degree starts, compiled
    plain       the same algorithm in plain Python; both must give the same order
    published   ICP's released sort (docs/methods.md 1.6): arbitrary starts, the first 9 neighbours of the
                directed lists, chains capped at 21

Points lie on a sphere in 5 dimensions around some centres; their exact neighbours (k = 20) come from a k-d tree.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

K = 20
DIMENSION = 5


def points(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((max(10, count // 1000), DIMENSION))
    vectors = centres[random.integers(0, len(centres), count)] + 0.3 * random.standard_normal((count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def nearest(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.spatial import cKDTree

    distances, rows = cKDTree(vectors).query(vectors, K + 1, workers=-1)
    own = rows == np.arange(len(rows))[:, None]
    own[~own.any(axis=1), -1] = True
    distances, rows = distances[~own].reshape(-1, K), rows[~own].reshape(-1, K)
    return rows.astype(np.int32), (1 - distances**2 / 2).astype(np.float32)


def plain(neighbors: np.ndarray, similarities: np.ndarray) -> list[int]:
    count = len(neighbors)
    reverse: list[list[int]] = [[] for _ in range(count)]
    reverse_similarities: list[list[float]] = [[] for _ in range(count)]
    for i in range(count):
        for j, similarity in zip(neighbors[i].tolist(), similarities[i].tolist(), strict=True):
            reverse[j].append(i)
            reverse_similarities[j].append(similarity)
    degrees = [len({*neighbors[i].tolist(), *reverse[i]}) for i in range(count)]
    starts = iter(sorted(range(count), key=degrees.__getitem__))
    used, order, last = bytearray(count), [], -1
    for _ in range(count):
        best, highest = -1, -np.inf
        if last >= 0:
            near = zip(neighbors[last].tolist(), similarities[last].tolist(), strict=True)
            for j, similarity in [*near, *zip(reverse[last], reverse_similarities[last], strict=True)]:
                if not used[j] and (similarity > highest or (similarity == highest and j < best)):
                    best, highest = j, similarity
        while best < 0:
            start = next(starts)
            best = -1 if used[start] else start
        used[best] = 1
        order.append(best)
        last = best
    return order


def published(neighbors: np.ndarray) -> list[int]:
    used, order = bytearray(len(neighbors)), []
    for start in range(len(neighbors)):
        if used[start]:
            continue
        last, length = start, 0
        while last >= 0 and length < 21:
            used[last] = 1
            order.append(last)
            length += 1
            last = next((j for j in neighbors[last, :9].tolist() if not used[j]), -1)
    return order


def adjacent(vectors: np.ndarray, order: np.ndarray) -> float:
    return float(np.einsum("nd,nd->n", vectors[order[1:]], vectors[order[:-1]]).mean(dtype=np.float64))


def timed(function, *arguments):
    begun = time.perf_counter()
    result = function(*arguments)
    return np.asarray(result), time.perf_counter() - begun


def extra_memory(folder: Path) -> float:
    """Bytes per edge beyond the lists themselves, in a process that does nothing else."""
    program = (
        f"import sys; sys.argv[1:] = ['--memory', {str(folder)!r}]; "
        f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    )
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def measure_memory(folder: Path) -> None:
    from eclectus.tasks.grouping.group import chain

    chain(np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32))
    neighbors, similarities = np.load(folder / "neighbors.npy"), np.load(folder / "similarities.npy")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = high_water_mark()
    chain(neighbors, similarities)
    print((high_water_mark() - before) / neighbors.size)


def high_water_mark() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(counts: list[int]) -> None:
    from eclectus.tasks.grouping.group import chain

    chain(np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32))  # compiles
    print(f"{'documents':>9} {'who':>10} {'seconds':>8} {'ratio':>6} {'adjacent':>9} {'bytes/edge':>10}")
    for count in counts:
        vectors = points(count)
        neighbors, similarities = nearest(vectors)
        ours, seconds = timed(chain, neighbors, similarities)
        theirs, plain_seconds = timed(plain, neighbors, similarities)
        sort, sort_seconds = timed(published, neighbors)
        assert np.array_equal(ours, theirs), "the plain walk gives another order"
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/neighbors.npy", neighbors)
            np.save(f"{folder}/similarities.npy", similarities)
            memory = extra_memory(Path(folder))
        print(f"{count:9} {'eclectus':>10} {seconds:8.2f} {1:6.1f} {adjacent(vectors, ours):9.4f} {memory:10.1f}")
        for who, order, took in (("plain", theirs, plain_seconds), ("published", sort, sort_seconds)):
            print(f"{count:9} {who:>10} {took:8.2f} {took / seconds:6.1f} {adjacent(vectors, order):9.4f}")
        random = np.random.default_rng(1).permutation(count)
        best = float(similarities[:, 0].mean(dtype=np.float64))
        print(f"{count:9} {'random':>10} {'':15} {adjacent(vectors, random):9.4f}")
        print(f"{count:9} {'best':>10} {'':15} {best:9.4f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(Path(sys.argv[2]))
    else:
        main([int(float(value)) for value in sys.argv[1:]] or [10_000, 100_000, 1_000_000])
