"""Lists of a corpus that has grown: as good as those of a search, and only what is new is looked at."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from eclectus.tasks.grouping.cells import corpus, search, tree, update
from eclectus.tasks.grouping.neighbor_update import rows_by_id
from tests.support.neighbor_lists import check, described, grown, lists, recall, recall_within
from tests.support.topics import topical, unit_vectors, write_embeddings


@pytest.mark.parametrize("how", ["appended", "anywhere", "with copies"])
def test_lists_of_a_grown_corpus_are_updated_and_as_good(run, how):
    rows, vectors = topical({"en/sea": 2900, "el/sea": 90}, words=3), unit_vectors(2990, 16, clusters=200)
    before = np.arange(2950)
    if how == "anywhere":
        before = np.sort(np.random.default_rng(0).permutation(2990)[:2950])
    if how == "with copies":
        vectors[2960:2980], vectors[100:104] = vectors[7], vectors[9]
        vectors[2985] = vectors[9]
    first = grown(run.home.store, [rows[i] for i in before], vectors[before])
    second = grown(run.home.store, rows, vectors, 3)
    check(second, vectors)
    assert second.statistics["updated_from"] == first.name
    assert 0 < described(second)["updated"] <= 60 and described(second)["recall"] > 0.97
    fresh = grown(run.home.store, rows, vectors, 3, neighbors_growth=0)
    english = np.load(second.file("partition.npy")) == 1
    assert recall_within(second, vectors, english) > 0.97
    greek = np.flatnonzero(~english)
    assert np.array_equal(lists(second)[0][greek], lists(fresh)[0][greek])
    assert np.allclose(lists(second)[1][greek], lists(fresh)[1][greek], atol=1e-6, equal_nan=True)
    assert described(second, "el")["updated"] == sum(rows[i]["language"] == "el" for i in set(range(2990)) - {*before})
    if how == "with copies":
        assert english[[7, 9, 102, 2960, 2961, 2962, 2985]].all()
        assert lists(second)[0][2960].tolist()[:3] == [7, 2961, 2962] and 2985 in lists(second)[0][102]


def test_documents_whose_neighbours_were_removed_are_searched_again_in_their_cells(run):
    rows, vectors = topical({"en/sea": 3000}, words=3), unit_vectors(3000, 16, clusters=200)
    grown(run.home.store, rows, vectors)
    left = np.delete(np.arange(3000), [5, 100, 2000])
    second = grown(run.home.store, [rows[i] for i in left], vectors[left])
    check(second, vectors[left])
    assert 0 < described(second)["updated"] < 100
    assert recall(second, vectors[left]) > 0.97
    again = grown(run.home.store, rows, vectors, neighbors_growth=0.2)
    assert "updated" not in described(again)


def test_a_partition_that_grew_much_is_searched_again_and_one_without_news_is_kept(run):
    rows, vectors = topical({"en/sea": 2000}, words=3), unit_vectors(2100, 16, clusters=200)
    rows += topical({"el/sea": 100}, words=3)
    some = np.concatenate([np.arange(1000), np.arange(2000, 2100)])
    grown(run.home.store, [rows[i] for i in some], vectors[some])
    second = grown(run.home.store, rows, vectors)
    assert "updated" not in described(second) and described(second, "el")["updated"] == 0
    fresh = grown(run.home.store, rows, vectors, neighbors_growth=0)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(lists(second), lists(fresh), strict=True))
    third = grown(run.home.store, rows, vectors, neighbors_growth=0.05)
    assert third.statistics["updated_from"] is None


@pytest.mark.usefixtures("run")
def test_an_update_of_an_update_keeps_its_recall(run):
    rows, vectors = topical({"en/sea": 3000}, words=3), unit_vectors(3000, 16, clusters=200)
    for count in (2850, 2900, 2950, 3000):
        artifact = grown(run.home.store, rows[:count], vectors[:count])
    check(artifact, vectors)
    assert described(artifact)["updated"] >= 50 and recall(artifact, vectors) > 0.96


def test_the_sample_of_a_grown_corpus_has_exact_neighbours_and_new_documents(run):
    rows, vectors = topical({"en/sea": 3000}, words=3), unit_vectors(3000, 16, clusters=200)
    some = np.delete(np.arange(2800), [5, 100, 2000])
    grown(run.home.store, rows[:2800], vectors[:2800])
    last = np.concatenate([some, np.arange(2800, 3000)])
    second = grown(run.home.store, [rows[i] for i in last], vectors[last])
    assert described(second)["updated"] >= 200
    sample = {name: np.load(second.file(f"sample/0/{name}.npy")) for name in ("rows", "near", "cosines")}
    products = vectors[last] @ vectors[last].T
    np.fill_diagonal(products, -np.inf)
    exact = np.argsort(-products, axis=1, kind="stable")[sample["rows"], :10]
    assert (sample["near"] == exact).mean() > 0.999 and len(np.unique(sample["rows"])) == len(sample["rows"])
    assert np.allclose(sample["cosines"], np.take_along_axis(products[sample["rows"]], exact, axis=1), atol=1e-5)
    assert 10 <= (sample["rows"] >= len(some)).sum() <= 30 and 240 <= len(sample["rows"]) <= 290


def test_small_languages_that_lost_and_won_documents_have_the_lists_of_a_search(run):
    rows = topical({"en/sea": 500, "el/sea": 120, "zh/law": 60}, words=3)
    vectors = unit_vectors(680, 8)
    vectors[1:5], vectors[9] = vectors[0], 0
    order = np.random.default_rng(0).permutation(680)[:670]
    grown(run.home.store, rows[:640], vectors[:640], neighbors_growth=0.9)
    second, fresh = (
        grown(run.home.store, [rows[i] for i in order], vectors[order], 3, neighbors_growth=growth)
        for growth in (0.9, 0)
    )
    assert second.statistics["updated_from"] and fresh.statistics["updated_from"] is None
    assert all(described(second, name)["updated"] > 0 for name in ("en", "el", "zh"))
    small = np.load(second.file("partition.npy")) != 1
    assert np.array_equal(lists(second)[0][small], lists(fresh)[0][small])
    assert np.array_equal(lists(second)[1][small], lists(fresh)[1][small], equal_nan=True)


def test_only_files_of_embeddings_with_news_are_hashed_again(run, monkeypatch):
    rows, vectors, hashed = topical({"en/sea": 600}, words=3), unit_vectors(600, 8), []
    real = corpus.hash_vectors

    def counted(out, embeddings):
        hashed.append(embeddings.name)
        return real(out, embeddings)

    monkeypatch.setattr(corpus, "hash_vectors", counted)
    grown(run.home.store, rows[:590], vectors[:590], ends=[200, 400, 590])
    second = grown(run.home.store, rows, vectors, ends=[200, 400, 600])
    assert hashed == ["part-00000.npy", "part-00001.npy", "part-00002.npy", "part-00002.npy"]
    assert described(second)["updated"] == 10
    check(second, vectors)


def test_new_documents_and_those_of_the_cells_they_probe_find_each_other_as_by_comparing_all(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MOST_MEMBERS", 16)
    random, n, width, probes = np.random.default_rng(0), 400, 5, 3
    vectors, centres = (random.standard_normal((count, 6)).astype(np.float32) for count in (n, 9))
    unit, centres = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, centres))
    cells = np.argsort(-unit @ centres.T, axis=1)[:, :probes].astype(np.int32)
    own = np.where(random.random(n) < 0.3, random.integers(9, size=n), cells[:, 0]).astype(np.int32)
    fresh, last = random.random(n) < 0.05, np.full(n, 0.6, np.float32)
    files = {
        "vectors": vectors, "rows": np.arange(n), "shared/fresh": fresh, "shared/last": last,
        "shared/numbers": np.flatnonzero(fresh), "tree/nodes": centres[:1], "tree/centres": centres,
        "tree/first": np.array([0, 9]), "tree/block": np.zeros(9, np.int32),
    }  # fmt: skip
    for folder in ("shared", "tree", "0", "1", "2", "3", "merged"):
        (tmp_path / folder).mkdir()
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    source = {"embeddings": [tmp_path / "vectors.npy"], "rows": tmp_path / "rows.npy", "shared": tmp_path / "shared"}
    for part, (begin, end) in enumerate([(0, 250), (250, n)]):
        tree.write_by_cell(tmp_path / str(part), own[begin:end, None], np.arange(begin, end))
    for part, (begin, end) in enumerate([(0, 7), (7, int(fresh.sum()))]):
        out = tmp_path / str(2 + part)
        update.probe_cells(out, **source, tree=tmp_path / "tree", begin=begin, end=end, probes=probes)
    folders = {"assigned": [tmp_path / "0", tmp_path / "1"], "probed": [tmp_path / "2", tmp_path / "3"]}
    found = []
    for begin, end in ((0, 4), (4, 9)):
        found.append(out := tmp_path / f"found-{begin}")
        out.mkdir()
        update.compare_fresh(out, **source, **folders, begin=begin, end=end, width=width)
    update.merge_fresh(tmp_path / "merged", found, 0, n, width)
    documents, near = (np.load(tmp_path / "merged" / f"{name}.npy") for name in ("document", "near"))
    wanted = {}
    for i in range(n):
        others = [
            j for j in range(n)
            if j != i and ((fresh[i] and own[j] in cells[i])
            or (fresh[j] and own[i] in cells[j] and (fresh[i] or unit[i] @ unit[j] >= last[i])))
        ]  # fmt: skip
        if others:
            wanted[i] = sorted(others, key=lambda j: -(unit[i] @ unit[j]))[:width]
    assert {d: [j for j in line if j >= 0] for d, line in zip(documents.tolist(), near.tolist(), strict=True)} == wanted


def test_lists_that_miss_the_target_are_searched_again_where_more_cells_would_help(run, monkeypatch):
    rows, vectors = topical({"en/sea": 1500}, words=3), unit_vectors(1500, 32, clusters=200)
    monkeypatch.setattr(tree, "OWN", 20)
    for most, again in ((update.MOST_OVERLAP, True), (2, False)):
        with monkeypatch.context() as patch:
            patch.setattr(tree, "MOST_OVERLAP", 2)
            patch.setattr(update, "MOST_OVERLAP", 2)
            first = grown(run.home.store, rows[:1490], vectors[:1490], neighbors_recall_target=0.99)
        assert described(first)["overlap"] == 2 and described(first)["recall"] < 0.97
        monkeypatch.setattr(update, "MOST_OVERLAP", most)
        second = grown(run.home.store, rows, vectors, neighbors_recall_target=0.99)
        assert ("updated" not in described(second)) == again
        shutil.rmtree(second.path)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_head")
def test_workers_change_no_bit_of_an_update(run):
    """Slow: Ray."""
    rows, vectors = topical({"en/sea": 1500, "el/sea": 120}, words=3), unit_vectors(1620, 16, clusters=100)
    grown(run.home.store, rows[:1590], vectors[:1590])
    alone = grown(run.home.store, rows, vectors, 3)
    for folder in (Path(alone.path), run.home.work / "parts"):
        shutil.rmtree(folder)
    spread = grown(run.home.store, rows, vectors, 3, curation_workers=2)
    assert spread.digest == alone.digest and described(spread)["updated"] > 20


@pytest.mark.parametrize("ends", [[3, 6, 9], [4, 9], [9], [2, 2, 9]])
def test_rows_are_found_again_by_id_in_whatever_part_they_are(store, ends):
    then, now = (
        [f"{each:032d}" for each in (7, 3, 9, 1, 2, 8)],
        [f"{each:032d}" for each in (7, 3, 9, 5, 8, 4, 6, 2, 11)],
    )
    before = write_embeddings(store, unit_vectors(6, 4), then, "one model", [3, 6])
    after = write_embeddings(store, unit_vectors(9, 4), now, "one model", ends)
    assert rows_by_id(before, after).tolist() == [0, 1, 2, -1, 7, 4]
    assert rows_by_id(after, after).tolist() == list(range(9))
