"""Search by cells against exact search, for corpora of several parts, with every bad kind of partition."""

from types import SimpleNamespace

import numpy as np
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import open_matrix
from eclectus.tasks.grouping.cells import search as module
from eclectus.tasks.grouping.cells import tree
from eclectus.tasks.grouping.cells.corpus import representatives
from eclectus.tasks.grouping.cells.partition import consecutive
from eclectus.tasks.grouping.cells.search import cells_of, entries, merge_lines, search_block, within_by_torch
from eclectus.tasks.grouping.cells.tree import MOST_OVERLAP, order_of, shares_a_cell, write_by_cell
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from tests.support.neighbor_lists import check, lists, recall
from tests.support.topics import make, topical, unit_vectors, write_documents, write_embeddings


def search(store, vectors, counts=None, parts=2, **settings):
    documents = write_documents(store, topical(counts or {"en/sea": len(vectors)}, words=2), parts)
    ask = {"curation_workers": 1, "neighbors_k": 10, "neighbors_exact_below": 100, **settings}
    embeddings = write_embeddings(store, vectors)
    return make(store, neighbors, documents=documents, embeddings=embeddings, settings=NeighborSettings(**ask))


def test_cells_find_the_neighbours_that_the_target_asks_for_and_report_how_many(store):
    vectors = unit_vectors(4000, 24, clusters=300)
    artifact = search(store, vectors, neighbors_recall_target=0.98)
    described = artifact.statistics["partitions"][0]
    check(artifact, vectors)
    assert described["method"] == "cells" and described["cells"] > 10 and described["overlap"] < MOST_OVERLAP
    assert recall(artifact, vectors) > 0.97 and abs(recall(artifact, vectors) - described["recall"]) < 0.02
    fewer = search(store, vectors, neighbors_recall_target=0.7).statistics["partitions"][0]
    assert fewer["overlap"] < described["overlap"] and fewer["recall"] < described["recall"]


def test_parts_change_no_list_and_small_languages_are_searched_exactly(store):
    vectors, counts = unit_vectors(700, 16), {"en/sea": 600, "el/sea": 97, "zh/law": 3}
    one, three = (search(store, vectors, counts, parts) for parts in (1, 3))
    assert [len(open_matrix(each, "neighbors")) for each in (one, three)] == [700, 700]
    assert one.file("neighbors.npy").is_file() and three.file("neighbors/part-00002.npy").is_file()
    assert [each["method"] for each in three.statistics["partitions"]] == ["exact", "cells", "exact"]
    labels = np.load(three.file("partition.npy"))
    exact = search(store, vectors, counts, 1, neighbors_exact_below=1000)
    for row in np.flatnonzero(labels != 1):
        assert lists(three)[0][row].tolist() == lists(exact)[0][row].tolist()
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(lists(one), lists(three), strict=True))
    block = open_matrix(three, "block")[:]
    assert ((block >= 0) == (labels == 1)).all()


@pytest.mark.parametrize("partition", ["language", "language+domain"])
def test_a_corpus_of_several_parts_without_a_large_partition_has_the_lists_of_one_part(store, partition):
    counts, vectors = {"en/sea": 150, "en/law": 30, "el/sea": 20}, unit_vectors(200, 8)
    ask = {"neighbors_exact_below": 1000, "neighbors_partition": partition}
    one, four = (search(store, vectors, counts, parts, **ask) for parts in (1, 4))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(lists(one), lists(four), strict=True))
    assert four.file("neighbors/part-00003.npy").is_file() and not four.file("block").exists()


def test_copies_are_searched_once_and_list_each_other_first(store):
    vectors = unit_vectors(1500, 16)
    vectors[100:1300] = vectors[7]
    vectors[1400] = vectors[3]
    artifact = search(store, vectors)
    check(artifact, vectors)
    rows, similarities = lists(artifact)
    assert rows[7].tolist() == list(range(100, 110)) and rows[104, :5].tolist() == [7, 100, 101, 102, 103]
    assert rows[3, 0] == 1400 and rows[1400, 0] == 3 and (similarities[100:1300] == 1).all()
    described = artifact.statistics["partitions"][0]
    assert described["copies"] == 1201 and described["recall"] > 0.97


@pytest.mark.parametrize("count", [101, 600])
def test_documents_that_are_all_equal(store, count):
    vectors = np.tile(unit_vectors(1, 8), (count, 1))
    rows, similarities = lists(search(store, vectors))
    assert (rows >= 0).all() and (similarities == 1).all()


def test_a_tight_cluster_that_nothing_splits_is_cut(store, monkeypatch):
    monkeypatch.setattr(module, "MOST_MEMBERS", 400)
    random = np.random.default_rng(0)
    vectors = np.tile(unit_vectors(1, 8), (3000, 1)) * random.uniform(0.5, 2, (3000, 1)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    artifact = search(store, vectors)
    check(artifact, unit)
    described = artifact.statistics["partitions"][0]
    assert described["largest_cell"] <= 400 and described["recall"] > 0.99


def test_documents_without_an_embedding_have_no_cell_and_are_no_neighbours(store):
    vectors = unit_vectors(400, 8)
    vectors[[3, 399]], vectors[7, 2], vectors[200] = 0, np.nan, np.inf
    artifact = search(store, vectors)
    rows, gone = lists(artifact)[0], [3, 7, 200, 399]
    assert np.load(artifact.file("isolated.npy")).tolist() == gone and artifact.statistics["without_embedding"] == 4
    assert (rows[gone] == -1).all() and not np.isin(rows, gone).any()
    assert (open_matrix(artifact, "cells")[:][gone] == -1).all()


def test_a_recall_below_the_target_is_reported_with_what_to_set(run, monkeypatch):
    monkeypatch.setattr(tree, "OWN", 40)
    heard = []
    run.displays.append(
        SimpleNamespace(
            step_began=print,
            step_ended=print,
            step_progressed=lambda *_: None,
            notified=lambda name, text: heard.append(text),
        )
    )
    vectors = np.random.default_rng(0).standard_normal((6000, 200), np.float32)
    documents = write_documents(run.home.store, topical({"en/sea": 6000}, words=2))
    settings = NeighborSettings(neighbors_exact_below=10, neighbors_recall_target=1.0, curation_workers=1)
    neighbors(documents=documents, embeddings=write_embeddings(run.home.store, vectors), settings=settings)
    assert "neighbors_recall_target is 100.0%" in heard[0] and "neighbors_exact_below above 6,000" in heard[0]
    assert f"at most {MOST_OVERLAP}" in heard[0] and "CPU hours" in heard[0]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head", "run")
def test_workers_change_no_bit(store, home, tmp_path):
    """Slow: Ray."""
    vectors, counts = unit_vectors(3000, 16, clusters=100), {"en/sea": 2900, "el/sea": 100}
    here = search(store, vectors, counts, 3)
    for folder in (home.work / "parts").glob("*"):
        folder.rename(tmp_path / folder.name)
    assert search(store, vectors, counts, 3, curation_workers=2).digest == here.digest


def test_torch_gives_the_lists_of_the_cpu_up_to_ties():
    vectors = unit_vectors(300, 16)
    positions, cosines = within_by_torch(vectors, 12, "cpu")
    near, found = np.full((300, 12), -1, np.int32), np.full((300, 12), -np.inf, np.float32)
    module._insert_pairs(near, found, np.arange(300), vectors)
    assert np.allclose(cosines, found, atol=1e-6) and (near == positions).mean() > 0.99
    again, cosines_again = np.full_like(near, -1), np.full_like(found, -np.inf)
    merge_lines(again, cosines_again, np.arange(300), positions.astype(np.int32), cosines)
    assert (again == positions).mean() > 0.99
    assert within_by_torch(vectors[:1], 12, "cpu")[0].shape == (1, 0)


def test_a_block_that_is_searched_by_torch_has_the_same_cosines(store, tmp_path):
    artifact = search(store, unit_vectors(500, 8))
    np.save(tmp_path / "rows.npy", np.arange(500))
    write_cells(tmp_path / "assigned", open_matrix(artifact, "cells")[:])
    found = []
    for device in ("cpu", "cpu:0"):
        out = tmp_path / device
        out.mkdir()
        embeddings = [next(store.root.glob("embeddings/*/embeddings.npy"))]
        search_block(out, embeddings, tmp_path / "rows.npy", [tmp_path / "assigned"], 0, 10**6, 10, device)
        found.append(np.load(out / "cosine.npy"))
    assert np.allclose(*found, atol=1e-6)


def write_cells(folder, cells):
    folder.mkdir()
    write_by_cell(folder, cells, np.arange(len(cells)))


def test_shares_a_cell_is_the_smallest_overlap_that_suffices():
    random = np.random.default_rng(0)
    one = np.array([random.permutation(30)[:MOST_OVERLAP] for _ in range(20)])
    others = np.array([[random.permutation(30)[:MOST_OVERLAP] for _ in range(5)] for _ in range(20)])
    least = shares_a_cell(one, others)
    for i in range(20):
        for j in range(5):
            wanted = [n for n in range(1, MOST_OVERLAP + 1) if set(one[i, :n]) & set(others[i, j, :n])]
            assert least[i, j] == (wanted[0] if wanted else MOST_OVERLAP + 1)


def test_a_crowded_cell_keeps_its_own_documents_and_then_the_nearest(monkeypatch):
    monkeypatch.setattr(module, "MOST_MEMBERS", 4)
    cell = np.repeat([0, 1], [6, 6])
    member, place = np.arange(12), np.array([0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 1])
    assert [each.tolist() for each in cells_of(cell, member, place)] == [[0, 1, 2, 3], [6, 7, 8], [9, 10]]


def test_equal_hashes_of_other_vectors_are_no_copies():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 1]], np.float32)
    assert representatives(np.arange(5), np.full(5, 9, np.uint64), vectors).tolist() == [0, 1, 2, 3, 4]
    assert representatives(np.arange(5), np.array([1, 2, 1, 2, 3], np.uint64), vectors).tolist() == [0, 1, 0, 1, 4]


def test_consecutive_items_are_taken_together_up_to_a_limit():
    assert consecutive(np.array([3, 3, 9, 1, 1, 1]), 6) == [(0, 2), (2, 3), (3, 6)]
    assert consecutive(np.array([0]), 6) == [(0, 1)]


def test_a_counting_sort_is_the_stable_order_of_keys_that_are_not_negative():
    keys = np.random.default_rng(0).integers(-2, 40, 3000)
    order = np.argsort(keys, kind="stable")
    assert order_of(keys, 50).tolist() == order[keys[order] >= 0].tolist()
    assert order_of(np.empty(0, np.int64), 0).tolist() == []


def test_entries_of_parts_are_in_order_of_cell_place_and_document(tmp_path):
    random = np.random.default_rng(0)
    cells = np.array([random.permutation(30)[:4] for _ in range(500)], np.int32)
    cells[::7, 3] = -1
    for number, (begin, end) in enumerate([(0, 200), (200, 201), (201, 500)]):
        (tmp_path / str(number)).mkdir()
        write_by_cell(tmp_path / str(number), cells[begin:end], np.arange(begin, end))
    parts = [tmp_path / str(number) for number in range(3)]
    cell, documents, position, place = entries(parts, 5, 20)
    brute = sorted((c, p, d) for d, line in enumerate(cells.tolist()) for p, c in enumerate(line) if 5 <= c < 20)
    assert list(zip(cell.tolist(), place.tolist(), documents[position].tolist(), strict=True)) == brute
    assert (np.diff(documents) > 0).all() and len(np.unique(position)) == len(documents)


def test_a_gpu_that_is_not_there_is_one_clear_line(store, monkeypatch):
    monkeypatch.setattr("eclectus.tasks.ray_cluster.ensure_ray", lambda: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(EclectusError, match="neighbors_device is 'cuda', but Ray has no GPU"):
        search(store, unit_vectors(200, 8), neighbors_device="cuda")
