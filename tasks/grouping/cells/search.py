"""Exact search within cells, a block of cells per call, and the lists of all blocks put together part by part.

    a cell       products of its vectors with those before them, ROWS at a time, so that they stay in the cache; a pair
                 is offered to both its documents. On a GPU a product and a top-k by torch: the same lists up to ties
    a block      the union of its cells' documents; their lists go to files, sorted by document
    a part       the lists of its documents in all blocks, merged; then copies (documents with the same embedding, of
                 which one was searched) get their list and stand in the lists of others

Best first, ties to the lower document. A cell holds at most MOST_MEMBERS: of a crowded one those stay to which few
other cells are nearer, and one with too many of its own becomes several.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.grouping.cells.tree import Vectors, order_of, set_one_thread

MOST_MEMBERS = 8_192
MERGED = 65_536
# Of products: 96 x 4,000 x 4 bytes. Twice the speed of one symmetric product, which writes and reads 60 MB.
ROWS = 96


def search_block(
    out: Path,
    embeddings: list[Path],
    rows: Path,
    assigned: list[Path],
    begin: int,
    end: int,
    width: int,
    device: str = "cpu",
) -> dict[str, int]:
    """Searches cells begin to end - 1. assigned: folders of `assign_cells`, in order of documents.

    Writes document.npy int32 [m], ascending, near.npy int32 [m, width] (documents, -1 is padding) and cosine.npy
    float32 [m, width] (-inf there).
    """
    set_one_thread()
    cell, documents, position, place = entries(assigned, begin, end)
    vectors = Vectors(embeddings, rows)(documents)
    near = np.full((len(documents), width), -1, np.int32)
    cosines = np.full((len(documents), width), -np.inf, np.float32)
    largest = 0
    for members in cells_of(cell, position, place):
        largest = max(largest, len(members))
        if device == "cpu":
            _insert_pairs(near, cosines, members, vectors[members])
        else:
            positions, found = within_by_torch(vectors[members], width, device)
            merge_lines(near, cosines, members, members[positions], found)
    np.save(out / "document.npy", documents.astype(np.int32))
    np.save(out / "near.npy", np.where(near < 0, -1, documents[near]).astype(np.int32))
    np.save(out / "cosine.npy", cosines)
    return {"largest": largest}


def entries(assigned: list[Path], begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The entries of cells begin to end - 1, by cell, then place, then document: cell, document (as a position in the
    second result), place. Second: the documents, ascending."""
    cells, positions, places = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    documents, count = [np.empty(0, np.int64)], 0
    for folder in assigned:
        every = mapped(folder / "cell.npy")
        first, last = np.searchsorted(every, (begin, end))
        cell, document, place = (
            np.asarray(mapped(folder / f"{name}.npy")[first:last]) for name in ("cell", "document", "place")
        )
        if len(cell):
            # Documents of a part are close together, so a table numbers them sooner than a sort.
            lowest = int(document.min())
            number = np.zeros(int(document.max()) - lowest + 1, np.int32)
            number[document - lowest] = 1
            there = np.flatnonzero(number)
            number[there] = np.arange(count, count + len(there))
            cells.append(cell)
            positions.append(number[document - lowest])
            places.append(place)
            documents.append(there + lowest)
            count += len(there)
    cell, position, place = np.concatenate(cells), np.concatenate(positions), np.concatenate(places)
    most = int(place.max(initial=0)) + 1
    order = order_of((cell.astype(np.int64) - begin) * most + place, (end - begin) * most)
    return cell[order], np.concatenate(documents), position[order], place[order]


def cells_of(cell: np.ndarray, member: np.ndarray, place: np.ndarray) -> Iterator[np.ndarray]:
    """The members of each cell, ascending; arguments as of `entries`."""
    bounds = np.flatnonzero(np.diff(cell, prepend=-1, append=-1))
    for begin, end in pairwise(bounds.tolist()):
        own = int((place[begin:end] == 0).sum())
        inside = member[begin:end][: max(MOST_MEMBERS, own)]
        for part in np.array_split(inside, -(-len(inside) // MOST_MEMBERS)):
            yield np.sort(part)


def _insert_pairs(near: np.ndarray, cosines: np.ndarray, members: np.ndarray, vectors: np.ndarray) -> None:
    """Offers every pair of members [m] to the lists of both. vectors: float32 [m, D], of unit length."""
    count, lasts = len(members), cosines[members, -1]
    products = np.empty(ROWS * count, np.float32)
    wanted = np.zeros(-(-count // 8) * 8, bool)
    for begin in range(0, count, ROWS):
        end = min(begin + ROWS, count)
        part = products[: (end - begin) * end].reshape(end - begin, end)
        np.matmul(vectors[begin:end], vectors[:end].T, out=part)
        _offer_pairs(near, cosines, members, begin, part, lasts, wanted, wanted.view(np.uint64))


def within_by_torch(vectors: np.ndarray, width: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [m, w] of the nearest within unit vectors [m, D], themselves excluded, and cosines, on
    `device`."""
    import torch

    here = torch.from_numpy(vectors).to(device)
    products = here @ here.T
    products.fill_diagonal_(-torch.inf)
    cosines, positions = products.topk(min(width, max(0, len(vectors) - 1)), dim=1)
    return positions.cpu().numpy(), cosines.cpu().numpy()


@compiled
def offer(near: np.ndarray, cosines: np.ndarray, me: int, other: int, cosine: float) -> None:
    """Offers document `other` to the list of `me`: best first, ties to the lower document, each once.

    near: int [n, width], -1 is padding at the end. cosines: float32 [n, width], -inf there.
    """
    at = near.shape[1] - 1
    if near[me, at] >= 0 and (cosine < cosines[me, at] or (cosine == cosines[me, at] and other > near[me, at])):
        return
    # A pair may have other last bits in another cell; the first ones stay.
    for place in range(at + 1):
        if near[me, place] == other:
            return
        if near[me, place] < 0:
            break
    while at > 0 and (
        near[me, at - 1] < 0
        or cosines[me, at - 1] < cosine
        or (cosines[me, at - 1] == cosine and near[me, at - 1] > other)
    ):
        near[me, at], cosines[me, at] = near[me, at - 1], cosines[me, at - 1]
        at -= 1
    near[me, at], cosines[me, at] = other, cosine


@compiled
def _offer_pairs(
    near: np.ndarray,
    cosines: np.ndarray,
    members: np.ndarray,
    begin: int,
    products: np.ndarray,
    lasts: np.ndarray,
    wanted: np.ndarray,
    eights: np.ndarray,
) -> None:
    """Offers the pairs of members [m] from `begin` on with those before each. products: float32 [r, m or fewer]. lasts:
    float32 [m], what their lists end with. wanted: bool [m, rounded up to 8], and `eights`, the same as uint64: room to
    note which pairs a list may take; most of eight are none."""
    last = near.shape[1] - 1
    for row in range(len(products)):
        i = begin + row
        me, mine = members[i], lasts[i]
        for j in range(i):
            wanted[j] = (products[row, j] >= mine) | (products[row, j] >= lasts[j])
        for j in range(i, (i + 7) // 8 * 8):
            wanted[j] = False
        for eight in range((i + 7) // 8):
            if eights[eight] == 0:
                continue
            for j in range(8 * eight, 8 * eight + 8):
                if not wanted[j]:
                    continue
                cosine, other = products[row, j], members[j]
                if cosine >= mine:
                    offer(near, cosines, me, other, cosine)
                    mine = cosines[me, last]
                if cosine >= lasts[j]:
                    offer(near, cosines, other, me, cosine)
                    lasts[j] = cosines[other, last]
        lasts[i] = mine


@compiled
def insert_fresh(
    near: np.ndarray,
    near_cosines: np.ndarray,
    lists: np.ndarray,
    cosines: np.ndarray,
    documents: np.ndarray,
    queries: np.ndarray,
    products: np.ndarray,
    lasts: np.ndarray,
    numbers: np.ndarray,
    own: np.ndarray,
) -> None:
    """Offers documents [d] to the lists of the queries [q], which are fresh, and queries to documents whose list ends
    with less, `lasts`. products: [d, q]. numbers: of all queries; own: of all documents."""
    last = near.shape[1] - 1
    least = np.empty(len(queries), np.float32)
    for j in range(len(queries)):
        least[j] = cosines[queries[j], last]
    for i in range(len(documents)):
        me = documents[i]
        mine = max(lasts[me], near_cosines[me, last])
        for j in range(len(queries)):
            cosine = products[i, j]
            if cosine < mine and cosine < least[j]:
                continue
            query = queries[j]
            if numbers[query] == own[me]:
                continue
            if cosine >= mine:
                offer(near, near_cosines, me, numbers[query], cosine)
                mine = max(lasts[me], near_cosines[me, last])
            if cosine >= least[j]:
                offer(lists, cosines, query, own[me], cosine)
                least[j] = cosines[query, last]


def merge_blocks(out: Path, blocks: list[Path], begin: int, end: int, width: int) -> dict[str, Any]:
    """Writes near.npy int32 [n, width] and cosine.npy of documents begin to end - 1, from the folders of all blocks."""
    near = np.full((end - begin, width), -1, np.int32)
    cosines = np.full((end - begin, width), -np.inf, np.float32)
    for folder in blocks:
        documents = mapped(folder / "document.npy")
        first, last = np.searchsorted(documents, (begin, end))
        for start in range(first, last, MERGED):
            part = slice(start, min(start + MERGED, last))
            theirs = [np.asarray(mapped(folder / name)[part]) for name in ("near.npy", "cosine.npy")]
            merge_lines(near, cosines, np.asarray(documents[part]) - begin, *theirs)
    np.save(out / "near.npy", near)
    np.save(out / "cosine.npy", cosines)
    return {}


@compiled
def merge_lines(
    near: np.ndarray, cosines: np.ndarray, lines: np.ndarray, others: np.ndarray, found: np.ndarray
) -> None:
    """Merges neighbours `others` [m, w], below 0 is padding at the end, and their cosines `found`, best first, into
    these lines [m] of `near`: best first, ties to the lower document, each once."""
    last = near.shape[1] - 1
    for i in range(len(lines)):
        me = lines[i]
        for c in range(others.shape[1]):
            other, cosine = others[i, c], found[i, c]
            if other < 0 or cosine < cosines[me, last]:
                break
            offer(near, cosines, me, other, cosine)


@compiled
def with_copies(
    near: np.ndarray,
    cosines: np.ndarray,
    owns: np.ndarray,
    documents: np.ndarray,
    starts: np.ndarray,
    copies: np.ndarray,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of these documents [n] out of those of their representatives: int64 [n, width], -1 is padding; cosines.

    near: int32 [n, w], the representatives near each document's own, and cosines. owns: int64 [n], the number of each
    document's representative. starts, copies: the documents of each representative, ascending, as CSR.
    """
    out = np.full((len(documents), width), -1, np.int64)
    found = np.full((len(documents), width), np.nan, np.float32)
    for line in range(len(documents)):
        filled = 0
        for at in range(-1, near.shape[1]):
            if at >= 0 and near[line, at] < 0:
                break
            of = owns[line] if at < 0 else near[line, at]
            cosine = np.float32(1) if at < 0 else min(cosines[line, at], np.float32(1))
            for position in range(starts[of], starts[of + 1]):
                if filled == width:
                    break
                if copies[position] != documents[line]:
                    out[line, filled], found[line, filled] = copies[position], cosine
                    filled += 1
    return out, found
