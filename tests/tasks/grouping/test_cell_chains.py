"""Chains by blocks of cells: every document once, as alike as chains of the whole partition, joined at fitting ends."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.tasks.disk_matrix import open_matrix
from eclectus.tasks.grouping.cells import tree
from eclectus.tasks.grouping.cells.chains import Chained, join_blocks, nearest_in_cells, positions_in
from eclectus.tasks.grouping.group import GroupSettings, group
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from tests.support.topics import make, topical, unit_vectors, write_documents, write_embeddings


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tree, "block_documents", lambda dimension: 700)


def grouped(store, rows, vectors, parts=2, below=100, **settings):
    documents, embeddings = write_documents(store, rows, parts), write_embeddings(store, vectors)
    nearest = make(
        store,
        neighbors,
        documents=documents,
        embeddings=embeddings,
        settings=NeighborSettings(neighbors_exact_below=below, neighbors_k=10, curation_workers=1),
    )
    ask = GroupSettings(curation_workers=1, **settings)
    return nearest, make(store, group, documents=documents, embeddings=embeddings, neighbors=nearest, settings=ask)


@pytest.mark.usefixtures("small_blocks")
def test_chains_by_blocks_are_as_alike_as_those_of_the_whole_partition(store):
    vectors, rows = unit_vectors(4000, 24, clusters=120), topical({"en/sea": 3900, "el/sea": 100}, words=3)
    nearest, by_blocks = grouped(store, rows, vectors)
    assert len(np.unique(open_matrix(nearest, "block")[:])) > 4
    _, whole = grouped(store, rows, vectors, below=5000)
    order = pq.read_table(by_blocks.file("order.parquet")).to_pydict()
    assert sorted(order["row"]) == list(range(4000))
    assert [order["chain"][0], *np.unique(np.diff(order["chain"])).tolist()] == [0, 0, 1]
    for name in ("adjacent_similarity", "similarity_within_instances"):
        assert by_blocks.statistics[name] > 0.96 * whole.statistics[name]
    block = open_matrix(nearest, "block")[:][order["row"]]
    assert (np.diff(block) != 0).sum() == len(np.unique(block)) - 1
    cosines = (vectors[order["row"][1:]] * vectors[order["row"][:-1]]).sum(axis=1)
    assert np.allclose(order["similarity"][1:], cosines, atol=1e-5)
    spans = by_blocks.statistics["similarity_within_instances"], by_blocks.statistics["adjacent_similarity"]
    assert abs(spans[1] - cosines.mean()) < 0.002 and spans[0] > spans[1] - 0.01


@pytest.mark.usefixtures("small_blocks")
def test_documents_whose_neighbours_were_dropped_and_held_out_ones(store):
    rows = topical({"en/sea": 1500}, words=30)
    rows += [{**rows[0], "text": rows[0]["text"] + "." * i} for i in range(1, 30)]
    rows[3]["split"], rows[4]["split"] = "heldout", "apart"
    vectors = unit_vectors(len(rows), 16, clusters=60)
    vectors[1500:] = vectors[0] + 0.01 * unit_vectors(29, 16, seed=1)
    _, grouping = grouped(store, rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    order = pq.read_table(grouping.file("order.parquet"))["row"].to_pylist()
    dropped = pq.read_table(grouping.file("duplicates.parquet"))["row"].to_pylist()
    assert len(dropped) == 29 and sorted([*order, *dropped, 3, 4]) == list(range(len(rows)))
    statistics = grouping.statistics
    assert (statistics["heldout"], statistics["apart"], statistics["grouped"]) == (1, 1, 1498)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks", "ray_head", "run")
def test_workers_change_no_bit_of_a_grouping(store):
    """Slow: Ray."""
    rows, vectors = topical({"en/sea": 2000}, words=3), unit_vectors(2000, 16, clusters=100)
    _, here = grouped(store, rows, vectors)
    assert grouped(store, rows, vectors, group_threads=2)[1].digest == here.digest


def test_blocks_are_joined_where_their_ends_are_most_alike_and_turned_if_need_be():
    angles = np.radians([0, 10, 80, 90, 40, 20, 50, 70])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    blocks = [
        Chained(np.array(rows), np.array([True, False]), np.array(rows) / 10)
        for rows in ([0, 1], [2, 3], [4, 5], [6, 7])
    ]
    joined = join_blocks(vectors, blocks)
    assert joined.rows.tolist() == [0, 1, 5, 4, 6, 7, 2, 3] and np.allclose(joined.best, joined.rows / 10)


def test_a_block_that_is_turned_has_the_same_chains():
    chained = Chained(np.arange(6), np.array([True, False, True, False, False, True]), np.arange(6.0))
    assert chained.turned().restarts.tolist() == [True, True, False, False, True, False]
    back = chained.turned().turned()
    assert np.array_equal(back.rows, chained.rows) and np.array_equal(back.restarts, chained.restarts)


def test_the_nearest_within_a_cell_are_those_of_brute_force():
    vectors, rows = unit_vectors(300, 8), np.arange(0, 300, 2)
    random = np.random.default_rng(0)
    cells = np.array([random.permutation(4)[:2] for _ in rows], np.int32)
    poor = np.array([3, 50, 149])
    near, cosines = nearest_in_cells(vectors, rows, cells, poor, 5)
    for line, position in enumerate(poor):
        inside = np.flatnonzero((cells == cells[position, 0]).any(axis=1) & (np.arange(150) != position))
        wanted = inside[np.argsort(-(vectors[rows[inside]] @ vectors[rows[position]]))[:5]]
        assert near[line].tolist() == wanted.tolist()
        assert np.allclose(cosines[line], vectors[rows[wanted]] @ vectors[rows[position]], atol=1e-6)


def test_positions_in_a_block_are_those_of_its_rows():
    random = np.random.default_rng(0)
    here = np.sort(random.choice(1000, 300, replace=False))
    lists = random.integers(-1, 1000, (200, 7)).astype(np.int32)
    position = {row: number for number, row in enumerate(here.tolist())}
    wanted = [[position.get(row, -1) for row in line] for line in lists.tolist()]
    assert positions_in(here, lists, 1000).tolist() == wanted
    assert positions_in(here[here == 999], lists, 1000).tolist() == [
        [0 if row == 999 and 999 in position else -1 for row in line] for line in lists.tolist()
    ]


def test_similarities_to_the_document_before_follow_a_chain_that_is_turned_round():
    rows, before = np.arange(4), np.array([np.nan, 0.1, np.nan, 0.3], np.float32)
    chained = Chained(rows, np.array([True, False, True, False]), np.zeros(4), before)
    assert np.array_equal(chained.turned().before, np.array([np.nan, 0.3, np.nan, 0.1], np.float32), equal_nan=True)
    assert np.array_equal(chained.turned().turned().before, before, equal_nan=True)
    assert np.isnan(Chained(rows, np.ones(4, bool), np.zeros(4)).before).all()
