"""The graph of who was made from whom, in arrays: what `upstream` and `downstream` walk through in connections of ours.

    journal/graph/DIGEST/node.npy        [N] uint64, ascending: every artifact and source, as `eclectus.storage.lineage.macros.NODE` numbers it
                         placed.npy      [N] int64, microseconds: when it was first made
                         up.npy          [E] int32: what the nodes were made from, one node after the other
                         up_starts.npy   [N + 1] int64: where each node's begin; down.npy, down_starts.npy: what was made from it
                         graph.json      the parts of the index that it was made of, and the SHA-256 of each array

It copies the index beside the compacted journals (`edges`, `nodes`) and is mapped into memory, so that a question costs what it reaches.
Compaction makes it anew when more than a tenth of the edges are new; newer parts are read beside it. Without one, or where
a part of it is gone, all parts are read. Price: docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import EMPTY, hash_file
from eclectus.storage.home import Home
from eclectus.storage.lineage.macros import EDGES

# Edges that are rather read again with every question than kept, and the share of new ones that makes a graph old.
FEW = 50_000
SHARE = 0.1
# Nodes at a distance from which on NumPy is faster than a loop.
WIDE = 64
UNKNOWN = np.iinfo(np.int64).max
ARRAYS = ("node", "placed", "up", "up_starts", "down", "down_starts")
REACHED = pa.struct([("node", pa.uint64()), ("placed", pa.timestamp("us")), ("away", pa.int32())])


@dataclass
class Graph:
    """The arrays above, and the names of the parts that they were made of."""

    node: np.ndarray
    placed: np.ndarray
    up: np.ndarray
    up_starts: np.ndarray
    down: np.ndarray
    down_starts: np.ndarray
    parts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, edges: np.ndarray, node: np.ndarray, placed: np.ndarray, parts: Iterable[str] = ()) -> Graph:
        """edges [E, 2] uint64: output, input. node, placed [M]: when each was made. A thing may be said several times."""
        said = pa.array(np.concatenate([edges.reshape(-1), node])).dictionary_encode()
        nodes, which = said.dictionary.to_numpy(), said.indices.to_numpy()
        order = np.argsort(nodes)
        rank = np.empty(len(nodes), np.int64)
        rank[order] = np.arange(len(nodes))
        ids = rank[which]
        when = np.full(len(nodes), UNKNOWN)
        np.minimum.at(when, ids[edges.size :], placed)
        output, given = ids[: edges.size : 2], ids[1 : edges.size : 2]
        up = _grouped(output, given, len(nodes))
        return cls(nodes[order], when, *up, *_grouped(given, output, len(nodes)), frozenset(parts))

    def toward(self, up: bool) -> tuple[np.ndarray, np.ndarray]:
        return (self.up, self.up_starts) if up else (self.down, self.down_starts)


def reach(home: Home, start: np.ndarray, live: np.ndarray, up: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(node uint64, placed int64, steps away int32), each [R]: the starts and all that they were made from, or (not up) went into.

    start [S] uint64: where to begin. live [L, 2] uint64: edges output, input that are not compacted yet.
    """
    return walk(*_kept_and_rest(home, live), start, up)


def walk(kept: Graph, rest: Graph, start: np.ndarray, up: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `reach`, in two graphs as if they were one."""
    # Ids: a kept node's own place; after these, the nodes that only the rest knows.
    count = len(kept.node)
    place = np.searchsorted(kept.node, rest.node)
    known = kept.node[np.minimum(place, count - 1)] == rest.node if count else np.zeros(len(place), bool)
    ids = np.where(known, place, count + np.cumsum(~known) - 1)
    nodes = np.concatenate([kept.node, rest.node[~known]]) if len(rest.node) else kept.node
    others, starts = kept.toward(up)
    rest_others, rest_starts = rest.toward(up)
    onward = _Onward(others, starts, ids[rest_others], rest_starts, ids)
    first = _find(nodes, count, start)
    found, away = onward.walk(first, len(nodes))
    placed = np.full(len(found), UNKNOWN)
    old = found < count
    placed[old] = kept.placed[found[old]]
    here, at = onward.rest_of(found)
    placed[here] = np.minimum(placed[here], rest.placed[at])
    return nodes[found], placed, away


def reached(home: Home, start: pa.ChunkedArray, live: pa.ChunkedArray, up: pa.ChunkedArray) -> pa.Array:
    """`reach` as a function of DuckDB: lists of numbers, lists of [output, input], booleans -> lists of REACHED."""
    sizes, columns = [0], []
    for begin, edges, upward in zip(start, live, up, strict=True):
        pairs = edges.values.flatten().to_numpy() if len(edges) else np.zeros(0, np.uint64)
        columns.append(reach(home, begin.values.to_numpy(), pairs.reshape(-1, 2), upward.as_py()))
        sizes.append(sizes[-1] + len(columns[-1][0]))
    node, placed, away = (np.concatenate(each) for each in zip(*columns, strict=True))
    when = pa.array(placed, pa.timestamp("us"), mask=placed == UNKNOWN)
    rows = pa.StructArray.from_arrays([pa.array(node), when, pa.array(away)], fields=list(REACHED))
    return pa.ListArray.from_arrays(pa.array(sizes, pa.int32()), rows)


def renew(home: Home, grace: float) -> None:
    """Makes the kept graph anew if too much is new, and removes older ones after `grace` seconds. A full disk leaves what there is."""
    parts = _parts(home)
    sizes = {part: pq.read_metadata(edges).num_rows for part, (edges, _) in parts.items()}
    kept = _newest(home, parts)
    if sum(rows for part, rows in sizes.items() if part not in kept.parts) > max(FEW, SHARE * len(kept.up)):
        with contextlib.suppress(OSError):
            _keep(home, _read(parts), grace)


def faults(home: Home) -> list[str]:
    """What is wrong with kept graphs, in words."""
    found = []
    for about in (home.journal / "graph").glob("*/graph.json"):
        for name, digest in json.loads(about.read_text())["arrays"].items():
            if hash_file(about.with_name(f"{name}.npy")) != digest:
                found.append(f"{about.parent} changed; remove it: it is a copy, and compaction makes it again")
    return found


class _Onward:
    """Where one may go from a node: by the kept arrays, and by those of the rest, whose nodes have the given ids."""

    def __init__(
        self, others: np.ndarray, starts: np.ndarray, rest: np.ndarray, rest_starts: np.ndarray, ids: np.ndarray
    ) -> None:
        self._kept = (others, starts)
        self._rest = (rest, rest_starts)
        self._count = len(starts) - 1
        self._ids = ids
        self._order = np.argsort(ids)
        self._place = dict(zip(ids.tolist(), range(len(ids)), strict=True))

    def walk(self, first: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, steps away) of all that can be reached from the ids `first`, nearest first."""
        away = np.full(size, -1, np.int32)
        away[first] = 0
        levels = [first]
        while len(levels[-1]):
            one = self._narrow if len(levels[-1]) < WIDE else self._wide
            levels.append(one(levels[-1], away, len(levels)))
        found = np.concatenate(levels)
        return found, away[found]

    def rest_of(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of these ids the rest knows, where it has those)."""
        if not len(self._ids):
            return np.zeros(len(wanted), bool), np.zeros(0, np.int64)
        near = np.minimum(np.searchsorted(self._ids, wanted, sorter=self._order), len(self._ids) - 1)
        at = self._order[near]
        known = self._ids[at] == wanted
        return known, at[known]

    def _narrow(self, level: np.ndarray, away: np.ndarray, steps: int) -> np.ndarray:
        (others, starts), (rest, rest_starts), seen = self._kept, self._rest, memoryview(away)
        new = []
        for each in level.tolist():
            near = others[starts[each] : starts[each + 1]].tolist() if each < self._count else []
            if self._place and (at := self._place.get(each)) is not None:
                near += rest[rest_starts[at] : rest_starts[at + 1]].tolist()
            for other in near:
                if seen[other] < 0:
                    seen[other] = steps
                    new.append(other)
        return np.array(new, np.int64)

    def _wide(self, level: np.ndarray, away: np.ndarray, steps: int) -> np.ndarray:
        near = [_stretches(*self._kept, level[level < self._count])]
        near.append(_stretches(*self._rest, self.rest_of(level)[1]))
        new = np.concatenate(near).astype(np.int64)
        new = _distinct(new[away[new] < 0])
        away[new] = steps
        return new


def _grouped(key: np.ndarray, value: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, one key after the other, each once; where each of `count` keys begins)."""
    pairs = _distinct(key * count + value)
    keys = pairs // max(count, 1)
    return (pairs - keys * count).astype(np.int32), np.searchsorted(keys, np.arange(count + 1))


def _distinct(values: np.ndarray) -> np.ndarray:
    """Every value once, ascending. NumPy's own `unique` hashes, and takes a hundred times as long where hashes collide."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def _stretches(values: np.ndarray, starts: np.ndarray, at: np.ndarray) -> np.ndarray:
    """values[starts[i] : starts[i + 1]] for all i of `at`, one after the other."""
    begins, sizes = starts[at], starts[at + 1] - starts[at]
    return values[np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())]


def _find(nodes: np.ndarray, count: int, wanted: np.ndarray) -> np.ndarray:
    """Ids of nodes: both `nodes[:count]` and `nodes[count:]` are ascending. Unknown ones are left out."""
    found = []
    for first, part in ((0, nodes[:count]), (count, nodes[count:])):
        if len(part):
            at = np.minimum(np.searchsorted(part, wanted), len(part) - 1)
            found.append(first + at[part[at] == wanted])
    return _distinct(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _kept_and_rest(home: Home, live: np.ndarray) -> tuple[Graph, Graph]:
    for last in (False, False, True):
        try:
            parts = _parts(home)
            kept = _newest(home, parts)
            return kept, _read({part: files for part, files in parts.items() if part not in kept.parts}, live)
        except FileNotFoundError:
            # A compaction took a file away between the look and the reading; what replaced it is there by now.
            if last:
                raise
    raise AssertionError


def _parts(home: Home) -> dict[str, tuple[Path, Path]]:
    """Name of a compacted part -> files of its edges and of its nodes."""
    edges, nodes = (
        {
            path.stem.rpartition("-")[0]: path
            for path in (home.journal / name).glob("[!.]*.parquet")
            if not path.stem.startswith(EMPTY)
        }
        for name in ("edges", "nodes")
    )
    return {part: (edges[part], nodes[part]) for part in edges.keys() & nodes.keys()}


def _read(parts: dict[str, tuple[Path, Path]], live: np.ndarray | None = None) -> Graph:
    """The graph of these parts, as `_parts` gives them, and of live edges [L, 2]."""
    edges, node, placed = (
        [np.zeros((0, 2), np.uint64) if live is None else live],
        [np.zeros(0, np.uint64)],
        [np.zeros(0, np.int64)],
    )
    for files in parts.values():
        pair, made = (_table(path, names) for path, names in zip(files, (EDGES, ("node", "placed")), strict=True))
        if pair is None or made is None:
            # Of an earlier version's columns; compaction mends it.
            continue
        edges.append(np.stack([pair[name].to_numpy() for name in EDGES], axis=1))
        node.append(made["node"].to_numpy())
        placed.append(made["placed"].cast(pa.timestamp("us")).cast(pa.int64()).fill_null(UNKNOWN).to_numpy())
    return Graph.of(np.concatenate(edges), np.concatenate(node), np.concatenate(placed), parts)


def _table(path: Path, names: Iterable[str]) -> pa.Table | None:
    with pq.ParquetFile(path) as file:
        return file.read([*names]) if set(names) <= set(file.schema_arrow.names) else None


def _newest(home: Home, parts: Iterable[str]) -> Graph:
    """The newest kept graph whose parts are all there still; else an empty one."""
    for folder in _kept(home):
        try:
            about = json.loads((folder / "graph.json").read_text())
            if set(about["parts"]) <= set(parts):
                arrays = [np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS]
                return Graph(*arrays, frozenset(about["parts"]))
        except (OSError, ValueError, KeyError):
            continue
    return Graph.of(np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))


def _kept(home: Home) -> list[Path]:
    """Folders of kept graphs, newest first."""
    found = []
    for folder in (home.journal / "graph").glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            found.append((folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _keep(home: Home, graph: Graph, grace: float) -> None:
    folder = home.journal / "graph"
    beside = folder / f".{uuid.uuid4().hex}.writing"
    beside.mkdir(parents=True)
    try:
        for name in ARRAYS:
            np.save(beside / f"{name}.npy", getattr(graph, name))
        arrays = {name: hash_file(beside / f"{name}.npy") for name in ARRAYS}
        about = json.dumps({"parts": sorted(graph.parts), "arrays": arrays})
        (beside / "graph.json").write_text(about)
        os.replace(beside, folder / hashlib.sha256(about.encode()).hexdigest()[:16])
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in [*_kept(home)[1:], *folder.glob(".*")]:
        if time.time() - old.stat().st_mtime > grace:
            shutil.rmtree(old, ignore_errors=True)
