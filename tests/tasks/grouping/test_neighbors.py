import numpy as np
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from eclectus.tasks.run import Run, activate
from tests.support.topics import make, read_json, topical, unit_vectors, write_documents, write_embeddings


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def lists(artifact):
    return np.load(artifact.file("neighbors.npy")), np.load(artifact.file("similarities.npy"))


def search(store, vectors, counts, **settings):
    documents = write_documents(store, topical(counts))
    embeddings = write_embeddings(store, vectors)
    artifact = make(store, neighbors, documents=documents, embeddings=embeddings, settings=NeighborSettings(**settings))
    return documents, artifact


def test_exact_lists_equal_brute_force_within_each_language(store):
    vectors = unit_vectors(300, 16)
    _, artifact = search(store, vectors, {"en/sea": 200, "el/sea": 100}, neighbors_k=7)
    rows, similarities = lists(artifact)
    labels = np.load(artifact.file("partition.npy"))
    assert read_json(artifact.file("partitions.json")) == ["el", "en"]
    for i in range(300):
        same = np.flatnonzero((labels == labels[i]) & (np.arange(300) != i))
        wanted = same[np.argsort(-(vectors[same] @ vectors[i]), kind="stable")[:7]]
        assert rows[i].tolist() == wanted.tolist()
        assert np.allclose(similarities[i], vectors[wanted] @ vectors[i], atol=1e-6)


def test_shards_threads_and_repetition_change_no_bit(store):
    vectors = unit_vectors(2500, 24)
    first, *others = (
        search(store, vectors, {"en/sea": 2500}, neighbors_shard_rows=shard, neighbors_threads=threads)[1]
        for shard, threads in ((10_000, 2), (1_000, 1), (1_000, 2), (10_000, 2))
    )
    assert all(same_lists(first, other) for other in others)
    assert others[-1] == first


def test_lists_are_padded_where_the_partition_is_smaller_than_k(store):
    _, artifact = search(store, unit_vectors(23, 8), {"en/sea": 20, "el/sea": 3}, neighbors_k=30)
    rows, similarities = lists(artifact)
    labels = np.load(artifact.file("partition.npy"))
    small = read_json(artifact.file("partitions.json")).index("el")
    assert ((rows >= 0).sum(axis=1) == np.where(labels == small, 2, 19)).all()
    assert np.isnan(similarities[rows < 0]).all()
    assert (rows != np.arange(23)[:, None]).all()


def test_documents_without_an_embedding_are_listed_and_are_no_neighbours(store):
    vectors = unit_vectors(40, 8)
    vectors[3] = 0
    vectors[7, 2] = np.nan
    vectors[9] = np.inf
    _, artifact = search(store, vectors, {"en/sea": 40})
    rows, _ = lists(artifact)
    assert np.load(artifact.file("isolated.npy")).tolist() == [3, 7, 9]
    assert artifact.statistics["without_embedding"] == 3
    assert (rows[[3, 7, 9]] == -1).all()
    assert not np.isin(rows, [3, 7, 9]).any()


@pytest.mark.parametrize("count", [0, 1])
def test_no_document_or_one(store, count):
    _, artifact = search(store, unit_vectors(count, 8), {"en/sea": count})
    assert (lists(artifact)[0] == -1).all()
    assert artifact.manifest()["rows"] == count


def test_equal_embeddings_list_the_lowest_rows(store):
    _, artifact = search(store, np.tile([[0.6, 0.8]], (12, 1)), {"en/sea": 12}, neighbors_k=3, neighbors_exact_below=0)
    rows, similarities = lists(artifact)
    assert (rows >= 0).all()
    assert (rows != np.arange(12)[:, None]).all()
    assert np.allclose(similarities, 1)


def test_partition_by_domain_and_by_nothing(store):
    counts = {"en/sea": 10, "en/law": 10, "el/sea": 5}
    _, by_domain = search(store, unit_vectors(25, 8), counts, neighbors_partition="language+domain")
    _, together = search(store, unit_vectors(25, 8), counts, neighbors_partition="none")
    assert read_json(by_domain.file("partitions.json")) == ["el/sea", "en/law", "en/sea"]
    assert read_json(together.file("partitions.json")) == ["all"]


def test_embeddings_of_other_documents_are_refused(store):
    with pytest.raises(EclectusError, match="24 rows"):
        search(store, unit_vectors(24, 8), {"en/sea": 25})


@pytest.fixture
def run(tmp_path):
    home = Home.open(tmp_path / "home")
    with activate(Run("r", home, Journal(home.journal, "r"), KnownKeys(home.keys, home.store))) as run:
        yield run


def grown(store, rows, vectors, **settings):
    """Neighbours of these documents with these vectors, in the run under way; `embedding_key` marks one model."""
    documents = write_documents(store, rows)
    ids = read_table(documents, ["document"])["document"].to_pylist()
    embeddings = write_embeddings(store, vectors, ids, "one model")
    return neighbors(documents=documents, embeddings=embeddings, settings=NeighborSettings(**settings))


def same_lists(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(lists(a), lists(b), strict=True))


@pytest.mark.parametrize("shuffled", [False, True])
def test_lists_of_a_grown_corpus_equal_a_new_search(run, shuffled):
    rows, vectors = topical({"en/sea": 300, "el/sea": 100}), unit_vectors(400, 16)
    before = np.arange(380) if not shuffled else np.random.default_rng(0).permutation(400)[:380]
    first = grown(run.home.store, [rows[i] for i in before], vectors[before], neighbors_k=8)
    second = grown(run.home.store, rows, vectors, neighbors_k=8)
    assert second.statistics["updated_from"] == first.name
    assert sum(each["updated"] for each in second.statistics["partitions"]) == 20
    assert same_lists(second, grown(run.home.store, rows, vectors, neighbors_k=8, neighbors_growth=0))


def test_lists_with_removed_documents_are_searched_again(run):
    rows, vectors = topical({"en/sea": 300}), unit_vectors(300, 16)
    grown(run.home.store, rows, vectors, neighbors_k=8)
    left = np.delete(np.arange(300), [5, 100])
    second = grown(run.home.store, [rows[i] for i in left], vectors[left], neighbors_k=8)
    assert 0 < second.statistics["partitions"][0]["updated"] < 30
    assert same_lists(
        second, grown(run.home.store, [rows[i] for i in left], vectors[left], neighbors_k=8, neighbors_growth=0)
    )


def test_a_corpus_that_grew_much_is_searched_again(run):
    rows, vectors = topical({"en/sea": 300}), unit_vectors(300, 16)
    grown(run.home.store, rows[:200], vectors[:200])
    second = grown(run.home.store, rows, vectors)
    assert "updated" not in second.statistics["partitions"][0]
    assert same_lists(second, grown(run.home.store, rows, vectors, neighbors_growth=0))
