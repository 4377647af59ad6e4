"""Instances that cut no document which fits in one."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.models.training.instances import Instances
from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.packing import instance_plan
from eclectus.tasks.packing.instance_file import document_tables
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from eclectus.tasks.packing.whole_documents import fit_whole
from tests.support.topics import TOPICS, make, topical, write_documents

LENGTH = 64


def by_lists(sizes, length, window):
    """[(document, offset, size)] with a list of what waits; -1 for a gap."""
    ahead = [
        (document, offset, min(length, size - offset))
        for document, size in enumerate(sizes)
        for offset in range(0, size, length)
    ]
    placed, room = [], length
    while ahead:
        fitting = [piece for piece in ahead[:window] if piece[2] <= room]
        if fitting:
            ahead.remove(fitting[0])
            placed.append(fitting[0])
            room -= fitting[0][2]
        else:
            placed.append((-1, 0, room))
            room = 0
        room = room or length
    return placed


@pytest.mark.parametrize("window", [1, 3, 8, 50])
def test_the_stream_is_that_of_a_list_of_waiting_pieces(window):
    random = np.random.default_rng(window)
    for length in (1, 7, 64):
        sizes = random.integers(0, 3 * length, 200).astype(np.uint32)
        pieces = fit_whole(sizes, length, window)
        found = list(zip(pieces.document.tolist(), pieces.offset.tolist(), pieces.size.tolist(), strict=True))
        assert found == by_lists(sizes.tolist(), length, window)
    assert len(fit_whole(np.empty(0, np.uint32), 8, window).size) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    rows = topical(dict.fromkeys(TOPICS, 12), words=20) + topical(dict.fromkeys(TOPICS, 30), words=4, seed=1)
    rows += [{"text": "harbour sail " * 300, "language": "en", "domain": "long"}]
    documents = write_documents(store, [{"group": "original"} | row for row in rows])
    words = make(store, tokenizer, documents=documents, settings=TokenizerSettings(tokenizer_vocabulary=400))
    return store, documents, words


@pytest.mark.parametrize("remainder", ["pad", "drop"])
@pytest.mark.parametrize("part_bytes", [10**9, 10 * 2 * LENGTH])
def test_documents_that_fit_are_whole_in_one_instance_and_gaps_are_not_trained_on(
    world, monkeypatch, remainder, part_bytes
):
    store, documents, words = world
    monkeypatch.setattr(instance_plan, "PART_BYTES", part_bytes)
    settings = PackSettings(instance_tokens=LENGTH, pack_fit=8, pack_remainder=remainder, pack_position_ids=True)
    artifact = make(store, pack, documents=documents, tokenizer=words, settings=settings)
    instances, own = Instances(artifact.path), load_tokenizer(words.path)
    table = read_table(documents, ["document", "text"]).to_pylist()
    ids = {row["document"]: [*own(row["text"])["input_ids"], own.eos_token_id] for row in table}
    seen = dict.fromkeys(ids, 0)
    rows = [row for path in document_tables(artifact) for row in pq.read_table(path).to_pylist()]
    tokens = np.asarray(instances.tokens)
    for row in rows:
        here = tokens[row["instance"], row["instance_offset"] :][: row["tokens"]]
        document = ids[row["document"]]
        assert here.tolist() == document[row["document_offset"] :][: row["tokens"]]
        assert row["tokens"] == min(LENGTH, len(document) - row["document_offset"])
        seen[row["document"]] += row["tokens"]
    statistics = artifact.statistics
    left = {name for name, count in seen.items() if count < len(ids[name])}
    assert len(left) <= (0 if remainder == "pad" else 9) and statistics["documents_cut"] == 0
    assert sum(seen.values()) == statistics["tokens"] - statistics["tokens_padded"]
    assert statistics["tokens_dropped"] == sum(map(len, ids.values())) - sum(seen.values())
    batch = instances.batch(np.arange(len(instances)))
    assert int((batch.labels < 0).sum()) == statistics["tokens_padded"]
    assert statistics["tokens_padded"] < 0.2 * statistics["tokens"]


def test_the_cut_documents_of_the_usual_packing_are_counted(world):
    store, documents, words = world
    artifact = make(
        store, pack, documents=documents, tokenizer=words, settings=PackSettings(instance_tokens=LENGTH, seed=2)
    )
    table = pq.read_table(document_tables(artifact)[0]).to_pylist()
    spans = {}
    for row in table:
        spans.setdefault(row["document"], []).append(row["tokens"])
    own = load_tokenizer(words.path)
    rows = read_table(documents, ["document", "text"]).to_pylist()
    sizes = {row["document"]: len(own(row["text"])["input_ids"]) + 1 for row in rows}
    cut = [name for name, each in spans.items() if sizes[name] <= LENGTH and each != [sizes[name]]]
    assert artifact.statistics["documents_cut"] == len(cut) > 5
