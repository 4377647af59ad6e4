import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.grouping import duplicates as module
from eclectus.tasks.grouping.duplicates import Overlaps, candidate_pairs
from eclectus.tasks.grouping.group import GroupSettings, _Chained, _joined, group
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from eclectus.tasks.grouping.quality import instance_quality
from tests.support.topics import TOPICS, make, topical, unit_vectors, write_documents, write_embeddings


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def grouped(store, rows, vectors=None, k=5, **settings):
    """The grouping of these rows; by default each document's vector says its topic and something of its own."""
    documents = write_documents(store, rows)
    embeddings = write_embeddings(store, topic_vectors(rows) if vectors is None else vectors)
    nearest = make(
        store,
        neighbors,
        documents=documents,
        embeddings=embeddings,
        settings=NeighborSettings(neighbors_k=k, neighbors_threads=1),
    )
    return make(
        store,
        group,
        documents=documents,
        embeddings=embeddings,
        neighbors=nearest,
        settings=GroupSettings(**settings),
    )


def topic_vectors(rows, dimension=24):
    """Unit vectors by topic; texts that begin alike get the same one."""
    centres = {key: np.random.default_rng(i).standard_normal(dimension) for i, key in enumerate(TOPICS)}
    vectors = []
    for row in rows:
        own = np.random.default_rng(sum(row["text"][:60].encode())).standard_normal(dimension)
        vectors.append(centres[f"{row['language']}/{row['domain']}"] + 0.5 * own)
    return np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True) if vectors else np.empty((0, dimension))


def order_of(grouping):
    return pq.read_table(grouping.file("order.parquet")).to_pydict()


def duplicates_of(grouping):
    return pq.read_table(grouping.file("duplicates.parquet")).to_pylist()


@pytest.mark.parametrize("how", ["similarity", "random", "domain"])
def test_every_document_is_in_the_order_once_or_a_reported_duplicate_or_held_out(store, how):
    rows = topical(dict.fromkeys(TOPICS, 20))
    rows += [{**row, "text": row["text"] + " !"} for row in rows[:7]]
    for i, split in ((11, "heldout"), (30, "heldout"), (31, "apart")):
        rows[i]["split"] = split
    grouping = grouped(store, rows, grouping=how)
    order = order_of(grouping)["row"]
    dropped = [each["row"] for each in duplicates_of(grouping)]
    assert sorted([*order, *dropped, 11, 30, 31]) == list(range(len(rows)))
    assert len(dropped) == 7
    statistics = grouping.statistics
    assert (
        statistics["grouped"] + statistics["duplicates"] + statistics["heldout"] + statistics["apart"]
        == statistics["documents"]
        == len(rows)
    )


def test_the_same_bytes_twice_and_other_orders_under_other_seeds(store, tmp_path):
    rows = topical(dict.fromkeys(TOPICS, 15))
    other = ArtifactStore(tmp_path / "other")
    assert grouped(store, rows).digest == grouped(other, rows).digest
    assert grouped(store, rows, grouping="random").digest == grouped(other, rows, grouping="random").digest
    assert grouped(store, rows, grouping="random", seed=1).digest != grouped(store, rows, grouping="random").digest


def test_adjacent_documents_are_more_alike_than_at_random_and_less_than_the_best_neighbours(store):
    rows = topical(dict.fromkeys(TOPICS, 40))
    statistics = grouped(store, rows).statistics
    assert (
        statistics["random_similarity"] + 0.1
        < statistics["adjacent_similarity"]
        < statistics["best_neighbor_similarity"]
    )
    assert statistics["adjacent_same_domain"] > 0.8 > statistics["random_same_domain"]
    random = grouped(store, rows, grouping="random").statistics
    assert random["adjacent_similarity"] < statistics["adjacent_similarity"]
    domain = grouped(store, rows, grouping="domain").statistics
    assert random["adjacent_similarity"] < domain["adjacent_similarity"] < statistics["adjacent_similarity"]


def test_partitions_follow_each_other_and_chains_are_numbered(store):
    order = order_of(grouped(store, topical({"en/sea": 30, "el/sea": 30, "zh/law": 3})))
    changes = sum(a != b for a, b in zip(order["partition"], order["partition"][1:], strict=False))
    assert changes == 2
    assert set(np.diff(order["chain"])) <= {0, 1}
    assert order["chain"][0] == 0


def test_train_copies_of_held_out_documents_are_dropped_and_the_held_out_ones_stay(store):
    rows = topical({"en/sea": 30})
    rows.append({**rows[4], "text": rows[4]["text"] + " and some more words at the end", "split": "train"})
    rows[4]["split"] = "heldout"
    grouping = grouped(store, rows)
    assert [(each["row"], each["duplicate_of_row"]) for each in duplicates_of(grouping)] == [(30, 4)]
    assert grouping.statistics["duplicates_of_heldout"] == 1


def test_two_held_out_copies_both_stay(store):
    rows = topical({"en/sea": 20})
    rows.append({**rows[4], "text": rows[4]["text"] + " !", "split": "heldout"})
    rows[4]["split"] = "heldout"
    assert duplicates_of(grouped(store, rows)) == []


def test_the_longest_copy_stays_and_more_copies_than_neighbours_are_all_found(store):
    rows = topical({"en/sea": 20})
    base = rows[0]["text"]
    rows += [{**rows[0], "text": base + "." * i} for i in range(1, 41)]
    found = duplicates_of(grouped(store, rows, k=6))
    assert len(found) == 40
    assert {each["duplicate_of_row"] for each in found} == {59}
    assert all(each["overlap"] >= 0.7 and each["similarity"] >= 0.9 for each in found)


def test_a_document_whose_neighbours_were_all_duplicates_is_given_others(store):
    rows = topical({"en/sea": 30})
    rows += [{**rows[0], "text": rows[0]["text"] + "." * i} for i in range(1, 21)]
    grouping = grouped(store, rows, k=5)
    order = order_of(grouping)
    longest = order["row"].index(49)
    adjacent = [order["chain"][i] for i in (longest - 1, longest + 1) if 0 <= i < len(order["row"])]
    assert order["chain"][longest] in adjacent


def test_alike_in_vector_but_not_in_text_is_no_duplicate(store):
    rows = topical({"en/sea": 30})
    assert duplicates_of(grouped(store, rows, vectors=np.tile([[1.0, 0.0]], (30, 1)))) == []
    assert duplicates_of(grouped(store, rows, duplicate_drop=False)) == []


def test_documents_without_an_embedding_are_kept(store):
    rows = topical({"en/sea": 12})
    vectors = unit_vectors(12, 8)
    vectors[2], vectors[5] = 0, np.nan
    grouping = grouped(store, rows, vectors=vectors)
    assert sorted(order_of(grouping)["row"]) == list(range(12))
    assert grouping.statistics["adjacent_similarity"] is not None


@pytest.mark.parametrize("how", ["similarity", "random", "domain"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_document(store, how, count):
    grouping = grouped(store, topical({"en/sea": count}), grouping=how)
    assert sorted(order_of(grouping)["row"]) == list(range(count))
    assert grouping.file("quality.png").stat().st_size > 1000


def test_neighbors_of_other_documents_are_refused(store):
    rows = topical({"en/sea": 12})
    other = grouped(store, rows)
    documents, embeddings = write_documents(store, rows[:11]), write_embeddings(store, unit_vectors(11, 8))
    nearest = next(each for each in store.all() if each.kind == "neighbors")
    with pytest.raises(EclectusError, match="has 12 rows"):
        group.function(documents, embeddings, nearest, settings=GroupSettings(), out=other)


def test_candidate_pairs_are_each_listed_once():
    rows = np.array([[1, 2], [0, -1], [1, 0]])
    similarities = np.array([[0.99, 0.5], [0.99, np.nan], [0.95, 0.5]], np.float32)
    pairs, cosines = candidate_pairs(rows, similarities, 0.9)
    assert pairs.tolist() == [[0, 1], [1, 2]]
    assert np.allclose(cosines, [0.99, 0.95])


def test_overlap_is_the_jaccard_similarity_of_shingles(store):
    texts = ["the quick brown fox jumps", "the quick brown fox sleeps", "法院条款上诉判决法规法官", ""]
    documents = write_documents(store, [{"text": text} for text in texts])
    overlaps = Overlaps(documents, np.array([f"{row:032x}" for row in range(4)], "S32"))
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} or {text} for text in texts]
    pairs = np.array([[0, 1], [0, 0], [0, 2], [3, 3]])
    expected = [len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a, b in pairs]
    assert overlaps.of(pairs).tolist() == pytest.approx(expected)


def test_overlaps_are_measured_once_and_the_order_of_a_grown_corpus_is_that_of_a_fresh_one(run, tmp_path, monkeypatch):
    rows = topical({"en/sea": 40, "en/law": 40})
    rows += [{**row, "text": row["text"] + " end"} for row in rows[:12]]
    more = [{**row, "text": row["text"] + " more"} for row in rows[70:74]]
    grouped(run.home.store, rows)
    shingled, shingle = [], module.Overlaps._shingle
    monkeypatch.setattr(
        module.Overlaps, "_shingle", lambda self, wanted: shingled.extend(wanted.tolist()) or shingle(self, wanted)
    )
    again = grouped(run.home.store, rows + more)
    assert 4 <= len(set(shingled)) < 20
    monkeypatch.undo()
    monkeypatch.setattr(module, "earlier", lambda *_, **__: iter(()))
    fresh = grouped(ArtifactStore(tmp_path / "fresh"), rows + more)
    assert again.digest == fresh.digest
    assert again.statistics["duplicates"] >= 16


@pytest.mark.usefixtures("run")
def test_a_grouping_without_a_pair_is_no_hindrance_to_the_next(home):
    rows = topical({"en/sea": 3})
    first = grouped(home.store, rows)
    assert len(pq.read_table(first.file("overlaps.parquet"))) == 0
    again = grouped(home.store, [*rows, {**rows[0], "text": rows[0]["text"] + " end"}])
    assert again.statistics["duplicates"] == 1


def test_partitions_are_joined_where_their_ends_are_most_alike():
    angles = np.radians([0, 10, 80, 90, 20, 30, 40, 70])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    chained = [
        _Chained(np.array(rows), np.array([True, False]), np.zeros(2)) for rows in ([0, 1], [2, 3], [4, 5], [6, 7])
    ]
    assert [each.rows.tolist() for each in _joined(vectors, chained)] == [[0, 1], [4, 5], [6, 7], [2, 3]]


@pytest.mark.parametrize("how", ["similarity", "random", "domain"])
def test_every_grouping_says_how_alike_its_instances_will_be(store, how):
    statistics = grouped(store, topical({"en/sea": 60, "en/law": 60, "en/code": 60}), grouping=how).statistics
    assert statistics["instance_domain_purity"] >= statistics["random_domain_purity"] - 0.1
    if how == "similarity":
        assert (
            statistics["instance_domain_purity"] > 0.8
            and statistics["similarity_within_instances"] > statistics["similarity_across_random_instances"]
        )
        assert abs(statistics["similarity_across_instances"] - statistics["similarity_across_random_instances"]) < 0.2


def test_instances_of_like_documents_are_purer_and_their_seams_are_random():
    vectors = unit_vectors(400, 16, clusters=4)
    labels = (vectors @ vectors[:1].T > 0.5).ravel().astype(str)
    rows = np.argsort(labels, kind="stable")
    instances = np.random.default_rng(0).permutation(100)
    packed = rows.reshape(100, 4)[instances].ravel()
    statistics = instance_quality(vectors, packed, np.arange(0, 401, 4), np.full(400, 10), labels)
    assert statistics["instance_domain_purity"] > 0.98 > statistics["random_domain_purity"]
    assert statistics["similarity_within_instances"] > statistics["similarity_across_random_instances"] + 0.1
    assert abs(statistics["similarity_across_instances"] - statistics["similarity_across_random_instances"]) < 0.15
