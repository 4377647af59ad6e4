from itertools import permutations

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.near_duplicates.overlaps import TextOverlaps
from eclectus.tasks.documents.shingles import overlap, shingles
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping.duplicates import near_duplicates
from eclectus.tasks.grouping.group import Chained, GroupSettings, _joined, group
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
    for i, side in ((11, "heldout"), (30, "heldout"), (31, "apart")):
        rows[i]["split"] = side
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


def test_overlap_is_the_jaccard_similarity_of_shingles(store):
    texts = ["the quick brown fox jumps", "the quick brown fox sleeps", "法院条款上诉判决法规法官", ""]
    overlaps = TextOverlaps(write_documents(store, [{"text": text} for text in texts]), workers=1)
    overlaps.read(np.arange(4))
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} or {text} for text in texts]
    pairs = np.array([[0, 1], [0, 0], [0, 2], [3, 3], [2, 1]])
    expected = [len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a, b in pairs]
    assert overlaps.of(*pairs.T).tolist() == pytest.approx(expected)


def copied(random, count, words=60):
    """Rows of pages with copies and copies of copies of other lengths, some of them held out."""
    vocabulary = np.array(["".join(random.choice(list("abcdefghij"), 6)) for _ in range(500)], object)
    rows = []
    for _ in range(count):
        text = list(vocabulary[random.integers(0, 500, words)])
        for copy in range(random.integers(1, 8)):
            split = random.choice(["train", "heldout", "apart"], p=[0.85, 0.08, 0.07])
            rows.append({"text": " ".join(text) + f" {copy}", "split": split, "language": "en", "domain": "sea"})
            text = list(np.where(random.random(len(text)) < 0.04, vocabulary[random.integers(0, 500, len(text))], text))
            text += list(vocabulary[random.integers(0, 500, random.integers(0, 3))])
    return [rows[i] for i in random.permutation(len(rows))]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_dropped_is_near_to_what_stays_and_what_stays_is_not_near_to_an_earlier_one(store, seed):
    random = np.random.default_rng(seed)
    rows = copied(random, 40)
    documents = write_documents(store, rows)
    vectors = unit_vectors(len(rows), 8) * 0.1 + np.array([1] + [0] * 7)
    vectors[random.random(len(rows)) < 0.05] = 0
    split, sizes = np.array([row["split"] for row in rows]), np.array([len(row["text"]) for row in rows])
    train, heldout = split == "train", split == "heldout"
    found = near_duplicates(documents, vectors.astype(np.float32), train, heldout, sizes, 0.95, 0.7, 1)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    sets = [shingles(row["text"]) for row in rows]
    usable = (train | heldout) & vectors.any(axis=1)
    near = {
        (a, b): overlap(sets[a], sets[b])
        for a, b in permutations(np.flatnonzero(usable).tolist(), 2)
        if unit[a] @ unit[b] >= 0.95 and overlap(sets[a], sets[b]) >= 0.7 and not heldout[[a, b]].all()
    }
    stay: list[int] = []
    for row in sorted(np.flatnonzero(usable).tolist(), key=lambda row: (not heldout[row], -sizes[row], row)):
        if heldout[row] or not any((row, other) in near for other in stay):
            stay.append(row)
    assert sorted(found.rows.tolist()) == sorted(set(np.flatnonzero(usable).tolist()) - set(stay))
    for row, original, measured in zip(found.rows, found.originals, found.overlaps, strict=True):
        assert original in stay and near[row, original] == measured
    assert len(found) > 50


def test_a_cluster_of_a_thousand_copies_and_templates_keep_few(store):
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("abcdefghij"), 6)) for _ in range(500)], object)
    page = words[random.integers(0, 500, 60)]
    rows = [{"text": f"{' '.join(page)} copy {i}"} for i in range(1000)]
    rows += [
        {"text": " ".join(np.where(random.random(60) < 0.08, words[random.integers(0, 500, 60)], page[::-1]))}
        for _ in range(200)
    ]
    documents, everything = write_documents(store, rows), np.ones(len(rows), bool)
    sizes = np.array([len(row["text"]) for row in rows])
    ones = np.ones((len(rows), 4), np.float32)
    found = near_duplicates(documents, ones, everything, ~everything, sizes, 0.9, 0.7, 1)
    kept = np.setdiff1d(np.arange(len(rows)), found.rows)
    assert (kept < 1000).sum() == 1
    sets = [shingles(row["text"]) for row in rows]
    fewest: list[int] = []
    for row in sorted(range(1000, len(rows)), key=lambda row: (-sizes[row], row)):
        if not any(overlap(sets[row], sets[other]) >= 0.7 for other in fewest):
            fewest.append(row)
    assert 16 < len(fewest) < 100 and len(kept) - 1 < 1.3 * len(fewest)
    assert np.isin(found.originals, kept).all()
    assert all(
        overlap(sets[a], sets[b]) == measured >= 0.7
        for a, b, measured in zip(found.rows, found.originals, found.overlaps, strict=True)
    )


@pytest.mark.usefixtures("run")
def test_the_pairs_of_the_split_give_what_a_search_gives_and_a_grown_corpus_what_a_fresh_one_does(home, tmp_path):
    rows = copied(np.random.default_rng(1), 30)
    for each in rows:
        each["split"], each["group"] = "train", "original"
    more = [{**row, "text": row["text"] + " more"} for row in rows[10:14]]

    def dropped(store, rows):
        divided = make(store, split, documents=write_documents(store, rows), settings=SplitSettings())
        labels = read_table(divided, ["split"])["split"].to_numpy(zero_copy_only=False)
        args = labels == "train", labels == "heldout", np.array([len(row["text"]) for row in rows]), 0.9, 0.7, 1
        return divided, args, near_duplicates(divided, np.ones((len(rows), 2), np.float32), *args)

    dropped(home.store, rows)
    divided, args, found = dropped(home.store, rows + more)
    divided.file("near_duplicates.parquet").unlink()
    searched = near_duplicates(divided, np.ones((len(rows) + 4, 2), np.float32), *args)
    _, _, fresh = dropped(ArtifactStore(tmp_path / "fresh"), rows + more)
    assert found.rows.tolist() == searched.rows.tolist() == fresh.rows.tolist() and len(found) > 30
    assert found.originals.tolist() == fresh.originals.tolist()


def test_a_document_without_embedding_is_no_duplicate(store):
    rows = topical({"en/sea": 30})
    rows += [{**row, "text": row["text"] + " end"} for row in rows[:4]]
    vectors = np.ones((34, 4), np.float32)
    vectors[[0, 31]] = 0
    everything, sizes = np.ones(34, bool), np.array([len(row["text"]) for row in rows])
    found = near_duplicates(write_documents(store, rows), vectors, everything, ~everything, sizes, 0.9, 0.7, 1)
    assert found.rows.tolist() == [2, 3] and found.originals.tolist() == [32, 33]


def test_partitions_are_joined_where_their_ends_are_most_alike():
    angles = np.radians([0, 10, 80, 90, 20, 30, 40, 70])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    chained = [
        Chained(np.array(rows), np.array([True, False]), np.zeros(2)) for rows in ([0, 1], [2, 3], [4, 5], [6, 7])
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
