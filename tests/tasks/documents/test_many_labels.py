"""Labels as they come: long ones cost nothing per document, very many of them flood no display and stay linear."""

import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents import split as splitting
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_codes, read_ids, read_table
from eclectus.tasks.evaluation import held_out
from eclectus.tasks.grouping import group as grouping
from eclectus.tasks.grouping import neighbors as searching
from eclectus.tasks.grouping.group import GroupSettings, group
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors, rows_by_label
from eclectus.tasks.packing import instance_part, instance_plan
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from eclectus.tasks.report import tables
from tests.support.topics import make, unit_vectors, write_documents, write_embeddings

LONG = "y" * 20_000


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def rows_of(count, domains):
    random = np.random.default_rng(0)
    words = "harbour sail tide anchor vessel captain reef storm gull rope mast island shore wave".split()
    return [
        {
            "text": f"{' '.join(random.choice(words, 12))} {number}",
            "language": "en",
            "domain": domains[number % len(domains)],
            "group": "original",
        }
        for number in range(count)
    ]


def curated(store, rows, **partition):
    """Split, neighbours, grouping and instances of documents with random embeddings."""
    documents = make(store, split, documents=write_documents(store, rows), settings=SplitSettings())
    vectors = write_embeddings(store, unit_vectors(len(rows), 4), read_ids(documents))
    near = make(
        store, neighbors, documents=documents, embeddings=vectors, settings=NeighborSettings(neighbors_k=3, **partition)
    )
    order = make(store, group, documents=documents, embeddings=vectors, neighbors=near, settings=GroupSettings())
    words = make(store, tokenizer, documents=documents, settings=TokenizerSettings(tokenizer_vocabulary=400))
    settings = PackSettings(instance_tokens=32)
    packed = make(
        store, pack, documents=documents, tokenizer=words, settings=settings, grouping=order, embeddings=vectors
    )
    return documents, near, order, words, packed


def test_a_long_label_costs_its_length_once_and_not_for_every_document(store):
    """At 4 bytes per character and document NumPy's strings would take 40 MB here."""
    # What is imported and compiled at first is not of interest, and slow under tracemalloc.
    curated(store, rows_of(60, ["a", "b"]))
    rows = rows_of(500, ["a", "b"])
    for row in rows[:400:10]:
        row["domain"] = row["source"] = LONG
    tracemalloc.start()
    documents, near, _, _, packed = curated(store, rows, neighbors_partition="language+domain")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert LONG in read_table(documents)["domain"].to_pylist()
    assert f"en/{LONG}" in {each["partition"] for each in near.statistics["partitions"]}
    assert LONG in set(pq.read_table(packed.file("documents.parquet"))["domain"].to_pylist())


def test_codes_in_small_row_groups_are_the_texts_that_pyarrow_writes(store, tmp_path, monkeypatch):
    _, _, _, _, packed = curated(store, rows_of(100, ["a", None, "unknown", "Ω", LONG]))
    table = pq.read_table(packed.file("documents.parquet"))
    pq.write_table(table, tmp_path / "whole.parquet", compression="zstd")
    assert packed.file("documents.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    coded = table
    for number, name in enumerate(table.column_names):
        if name in instance_plan.CODED:
            coded = coded.set_column(number, name, table[name].dictionary_encode())
    monkeypatch.setattr(instance_part, "BYTES_PER_GROUP", 10 * 4 * 20_000)
    instance_part.write_texts(coded, tmp_path / "small.parquet")
    assert pq.read_table(tmp_path / "small.parquet") == table
    assert pq.ParquetFile(tmp_path / "small.parquet").num_row_groups > 5


def test_very_many_domains_flood_neither_manifests_nor_tables(store, monkeypatch):
    for module, name in (
        (splitting, "MOST_STRATA"),
        (searching, "MOST_PARTITIONS"),
        (instance_plan, "MOST_LABELS"),
        (tables, "SHOWN_KINDS"),
        (held_out, "MOST_DOMAINS"),
    ):
        monkeypatch.setattr(module, name, 5)
    rows = rows_of(600, [f"domain {number}" for number in range(100)])
    documents, near, order, words, packed = curated(store, rows, neighbors_partition="language+domain")
    by_domain = documents.statistics["by_language"]["en"]
    assert len(by_domain) == 6 and sum(each["train"] for each in by_domain.values()) == documents.statistics["train"]
    assert len(near.statistics["partitions"]) == len(order.statistics["partitions"]) == 5
    assert near.statistics["partitions_searched"] == 100
    tokens = packed.statistics["tokens_by_domain"]
    assert len(tokens) == 6 and sum(tokens.values()) == sum(packed.statistics["tokens_by_language"].values())
    table = tables.documents_table(documents)
    assert len(table.rows) == 6 and table.rows[0][0].text == "English, (other domains)"
    held = held_out.read_held_out(documents, load_tokenizer(words.path), 1000)
    assert len(held.streams) == 6 and len(held.documents) == documents.statistics["heldout"]


def test_rows_by_label_are_what_a_search_for_each_label_finds():
    labels = np.random.default_rng(0).integers(-1, 40, 500)
    labels[labels == 17] = 3
    found = rows_by_label(labels, 40)
    assert len(found) == 40
    assert all(np.array_equal(rows, np.flatnonzero(labels == number)) for number, rows in enumerate(found))


def test_partitions_of_language_and_domain_have_the_names_of_every_document(store):
    rows = [
        {
            "text": f"text {number}",
            "language": ("a", "a/b", None)[number % 3],
            "domain": ("b/c", "c", None)[number // 3],
        }
        for number in range(9)
    ]
    documents = write_documents(store, rows)
    names, labels = searching.partition_labels(documents, "language+domain")
    table = read_table(documents).to_pylist()
    expected = [f"{row['language'] or 'unknown'}/{row['domain'] or 'unknown'}" for row in table]
    assert [names[label] for label in labels] == expected and names == sorted(set(expected))


def test_of_very_many_partitions_the_next_ones_are_joined(monkeypatch):
    vectors = unit_vectors(60, 3)
    chains = [grouping.Chained(np.array([row]), np.array([True]), np.array([1.0])) for row in range(60)]

    def joined(most):
        monkeypatch.setattr(grouping, "JOINED", most)
        return [int(each.rows[0]) for each in grouping._joined(vectors, chains)]

    near, left, last = [0], list(range(1, 60)), 0
    while left:
        last = max(left[:7], key=lambda row: float(vectors[row] @ vectors[last]))
        left.remove(last)
        near.append(last)
    assert joined(7) == near
    assert joined(1) == list(range(60)) and joined(100) == joined(59) and sorted(joined(7)) == list(range(60))


def test_codes_hold_every_label_once(store):
    codes, names = read_codes(write_documents(store, rows_of(50, ["b", None, "a\n", LONG])), "domain", "unknown")
    assert names == sorted(["b", "unknown", "a\n", LONG]) and np.bincount(codes).tolist() == [12, 13, 13, 12]
