import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.models.training.instances import Instances
from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.tokenizer import END_OF_DOCUMENT, TokenizerSettings, load_tokenizer, tokenizer
from tests.support.topics import TOPICS, make, topical, write_documents, write_embeddings

LENGTH = 64


class World:
    def __init__(self, store, rows):
        self.store = store
        self.documents = write_documents(store, [{"group": "original", **row} for row in rows])
        self.tokenizer = make(
            store, tokenizer, documents=self.documents, settings=TokenizerSettings(tokenizer_vocabulary=500)
        )
        self.words = load_tokenizer(self.tokenizer.path)

    def pack(self, settings=None, **inputs):
        return make(
            self.store,
            pack,
            documents=self.documents,
            tokenizer=self.tokenizer,
            settings=settings or PackSettings(instance_tokens=LENGTH),
            **inputs,
        )

    def ids(self):
        """The token ids of each document, with the end of the document."""
        texts = read_table(self.documents, ["text"])["text"].to_pylist()
        every = self.words(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[*ids, self.words.eos_token_id] for ids in every]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    rows = topical(dict.fromkeys(TOPICS, 12), words=40)
    rows += [
        {"text": "word " * 2000, "language": "en", "domain": "long"},
        {"text": "x y z", "language": "en", "domain": None},
    ]
    return World(ArtifactStore(tmp_path_factory.mktemp("store")), rows)


def grouping_of(store, rows):
    with store.draft("grouping") as out:
        pq.write_table(pa.table({"row": pa.array(rows, pa.int64())}), out.file("order.parquet"))
        return store.commit(out)


@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_every_token_of_every_document_is_where_the_table_says(world, remainder):
    artifact = world.pack(PackSettings(instance_tokens=LENGTH, pack_remainder=remainder))
    tokens = Instances(artifact.path).tokens
    table = pq.read_table(artifact.file("documents.parquet")).to_pylist()
    ids = dict(zip(read_table(world.documents, ["document"])["document"].to_pylist(), world.ids(), strict=True))
    seen = {name: 0 for name in ids}
    for row in table:
        here = tokens[row["instance"], row["instance_offset"] : row["instance_offset"] + row["tokens"]]
        begin = row["document_offset"]
        assert here.tolist() == ids[row["document"]][begin : begin + row["tokens"]]
        seen[row["document"]] += row["tokens"]
    total = sum(map(len, ids.values()))
    statistics = artifact.statistics
    assert (
        sum(seen.values()) == total - statistics["tokens_dropped"] == statistics["tokens"] - statistics["tokens_padded"]
    )
    assert statistics["tokens_dropped"] == (total % LENGTH if remainder == "drop" else 0)
    assert statistics["documents"] + statistics["documents_dropped"] == len(ids)
    assert sum(size > 0 for size in seen.values()) == statistics["documents"]


def test_padding_is_not_trained_on(world):
    artifact = world.pack(PackSettings(instance_tokens=LENGTH, pack_remainder="pad"))
    instances = Instances(artifact.path)
    batch = instances.batch(np.arange(len(instances)))
    padded = artifact.statistics["tokens_padded"]
    assert padded > 0
    assert int((batch.labels < 0).sum()) == padded == int((batch.documents < 0).sum())


def test_documents_follow_each_other_as_the_grouping_says(world):
    rows = np.random.default_rng(3).permutation(len(world.ids()))[:50]
    artifact = world.pack(grouping=grouping_of(world.store, rows))
    table = pq.read_table(artifact.file("documents.parquet"), columns=["document", "instance", "document_offset"])
    documents = read_table(world.documents, ["document"])["document"].to_pylist()
    position = {documents[row]: number for number, row in enumerate(rows)}
    for before, after in zip(table.to_pylist(), table.to_pylist()[1:], strict=False):
        if before["instance"] == after["instance"]:
            assert position[after["document"]] == position[before["document"]] + 1
            assert after["document_offset"] == 0
    assert set(table["document"].to_pylist()) <= set(position)


def test_what_is_left_out_is_padding_and_every_other_token_stays(world):
    whole = world.pack()
    table = pq.read_table(whole.file("documents.parquet")).to_pandas()
    chosen = [table.document.iloc[0], table[table.tokens == LENGTH].document.iloc[0]]
    holed = world.pack(PackSettings(instance_tokens=LENGTH, pack_left_out=[*chosen, "f" * 32]))
    left = pq.read_table(holed.file("documents.parquet")).to_pandas()
    kept = table[~table.document.isin(chosen)]
    assert left.values.tolist() == kept.values.tolist()
    before, after = Instances(whole.path), Instances(holed.path)
    hidden = np.zeros(before.tokens.shape, bool)
    for row in table[table.document.isin(chosen)].itertuples():
        hidden[row.instance, row.instance_offset : row.instance_offset + row.tokens] = True
    assert hidden.any() and np.array_equal(before.tokens[~hidden], after.tokens[~hidden])
    assert (after.tokens[hidden] == world.words.eos_token_id).all()
    labels = after.batch(np.arange(len(after))).labels.numpy()
    assert (labels[hidden] < 0).all() and (labels[~hidden] >= 0).sum() == kept.tokens.sum()
    assert holed.statistics["left_out"] == hidden_spans(table, chosen)
    same = world.pack(PackSettings(instance_tokens=LENGTH, pack_left_out=["f" * 32]))
    assert same.digest == whole.digest, "it names no document that is packed"


def hidden_spans(table, chosen):
    return int(table.document.isin(chosen).sum())


def test_opens_as_a_dataset_as_arrow_and_as_numpy_with_equal_numbers(world):
    from datasets import load_from_disk

    artifact = world.pack()
    folder = artifact.path
    dataset = load_from_disk(folder)
    arrow = pa.ipc.open_stream(pa.memory_map(f"{folder}/data-00000-of-00001.arrow")).read_all()
    at = json.loads(artifact.file("instances.json").read_text())["matrices"]["input_ids"]
    tokens = np.memmap(f"{folder}/{at['file']}", at["dtype"], "r", at["offset"], (at["rows"], at["columns"]))
    assert dataset.column_names == ["input_ids"]
    assert len(dataset) == len(arrow) == len(tokens) == artifact.statistics["instances"]
    assert tokens.dtype == np.uint16
    assert (np.array(dataset["input_ids"]) == tokens).all()
    assert (np.array(arrow["input_ids"].to_pylist()) == tokens).all()
    assert dataset.with_format("torch")[3]["input_ids"].tolist() == tokens[3].tolist()


def test_position_ids_begin_anew_with_every_document(world):
    from datasets import load_from_disk

    artifact = world.pack(PackSettings(instance_tokens=LENGTH, pack_position_ids=True))
    positions = np.array(load_from_disk(artifact.path)["position_ids"])
    documents = Instances(artifact.path).batch(np.arange(len(positions))).documents.numpy()
    for position, document in zip(positions, documents, strict=True):
        starts = np.flatnonzero(np.diff(document, prepend=-2))
        wanted = np.arange(LENGTH) - np.repeat(starts, np.diff(np.append(starts, LENGTH)))
        assert position.tolist() == wanted.tolist()
    assert (Instances(artifact.path).tokens == Instances(world.pack().path).tokens).all()


def test_the_same_bytes_twice_and_other_instances_under_another_seed(world, tmp_path):
    again = make(
        ArtifactStore(tmp_path),
        pack,
        documents=world.documents,
        tokenizer=world.tokenizer,
        settings=PackSettings(instance_tokens=LENGTH),
    )
    assert again.digest == world.pack().digest
    assert world.pack(PackSettings(instance_tokens=LENGTH, seed=1)).digest != again.digest


def test_small_blocks_change_no_bit(world, monkeypatch, tmp_path):
    whole = world.pack()
    # What was tokenised already would be found again.
    monkeypatch.setattr("eclectus.tasks.part_store._temporary_folder", lambda: tmp_path)
    monkeypatch.setattr("eclectus.tasks.packing.instance_part.TOKENS_AT_ONCE", 3 * LENGTH)
    monkeypatch.setattr("eclectus.tasks.packing.document_tokens.TEXTS_AT_ONCE", 7)
    assert world.pack().digest == whole.digest


def test_statistics_say_how_alike_the_documents_of_an_instance_are(world):
    table = read_table(world.documents, ["document", "domain"])
    domains, names = np.unique([str(each) for each in table["domain"].to_pylist()], return_inverse=True)
    vectors = np.eye(len(domains))[names] + 0.1
    chained = grouping_of(world.store, np.argsort(names, kind="stable"))
    shuffled = np.random.default_rng(0).permutation(len(table))
    embeddings = write_embeddings(
        world.store, vectors[shuffled], np.array(table["document"].to_pylist())[shuffled], "key"
    )
    statistics = world.pack(grouping=chained, embeddings=embeddings).statistics
    at_random = world.pack(embeddings=embeddings).statistics
    assert statistics["instance_domain_purity"] > at_random["instance_domain_purity"]
    assert statistics["similarity_within_instances"] > statistics["similarity_across_instances"] + 0.2
    missing = write_embeddings(world.store, vectors[:-1], table["document"].to_pylist()[:-1], "key")
    with pytest.raises(EclectusError, match="lacks documents"):
        world.pack(embeddings=missing)


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    rows = [
        {"text": f"before {END_OF_DOCUMENT} after " * 20, "language": "en"},
        {"text": "plain " * 50, "language": "en"},
    ]
    world = World(ArtifactStore(tmp_path), rows)
    tokens = Instances(world.pack(PackSettings(instance_tokens=16, pack_remainder="pad")).path)
    ends = (tokens.tokens == tokens.end_of_document).sum() - world.pack(
        PackSettings(instance_tokens=16, pack_remainder="pad")
    ).statistics["tokens_padded"]
    assert ends == 2


def test_too_little_text_and_an_empty_group_are_one_clear_line(world):
    with pytest.raises(EclectusError, match="too few for one instance of 100000"):
        world.pack(PackSettings(instance_tokens=100_000))
    with pytest.raises(EclectusError, match="group 'expanded'"):
        world.pack(PackSettings(pack_group="expanded"))
