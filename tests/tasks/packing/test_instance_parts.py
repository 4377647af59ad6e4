"""Instances in parts: the same as in one, read as one; documents are tokenised once, whatever is killed or damaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclectus.models.training.instances import Instances
from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks import part_store
from eclectus.tasks.documents import table as documents_table
from eclectus.tasks.documents.table import read_table, relabel
from eclectus.tasks.packing import document_tokens, instance_plan
from eclectus.tasks.packing import pack as packing
from eclectus.tasks.packing.instance_file import document_tables
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from tests.support.tokenizers import byte_level, words
from tests.support.topics import TOPICS, make, topical, write_documents

ROOT = Path(__file__).parents[3]
LENGTH = 32
GROUPS = {"en": "original", "el": "expanded", "zh": "other"}


def some_rows():
    rows = topical(dict.fromkeys(TOPICS, 40), words=25)
    return [{"group": GROUPS[row["language"]], "name": f"n{i}" if i % 3 else None} | row for i, row in enumerate(rows)]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Where the results of parts are kept in this test."""
    folder = tmp_path / "parts"
    monkeypatch.setattr(part_store, "_temporary_folder", lambda: folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(store, documents in one part, tokenizer)."""
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    documents = write_documents(store, some_rows())
    words = make(store, tokenizer, documents=documents, settings=TokenizerSettings(tokenizer_vocabulary=400))
    return store, documents, words


@pytest.fixture
def in_parts(world, monkeypatch):
    """The same documents, in parts of 64."""
    monkeypatch.setattr(documents_table, "ROWS_PER_PART", 64)
    return write_documents(world[0], some_rows())


@pytest.fixture
def calls(monkeypatch):
    """The parts that were tokenised."""
    made, original = [], document_tokens.tokens_of_part

    def counted(out, **arguments):
        made.append((arguments["path"].name, arguments["group"]))
        return original(out, **arguments)

    monkeypatch.setattr(document_tokens, "tokens_of_part", counted)
    return made


def packed(world, documents=None, **settings):
    store, whole, words = world
    settings = PackSettings(**{"instance_tokens": LENGTH} | settings)
    return make(store, pack, documents=documents or whole, tokenizer=words, settings=settings)


def by_hand(documents, words, group, length, keep_remainder, seed):
    """The instances, by concatenating, cutting and shuffling lists."""
    table = read_table(documents, ["text", "split", "group"]).to_pylist()
    chosen = [row["text"] for row in table if row["split"] == "train" and (row["group"] == group or group == "all")]
    order = np.random.default_rng([seed, 1]).permutation(len(chosen))
    stream = [
        token
        for number in order
        for token in [*words(chosen[number], add_special_tokens=False)["input_ids"], words.eos_token_id]
    ]
    if keep_remainder:
        stream += [words.eos_token_id] * (-len(stream) % length)
    cut = [stream[begin : begin + length] for begin in range(0, len(stream) - length + 1, length)]
    target = np.random.default_rng([seed, 2]).permutation(len(cut))
    shuffled = [[]] * len(cut)
    for number, instance in zip(target, cut, strict=True):
        shuffled[number] = instance
    return shuffled


@pytest.mark.parametrize(("group", "remainder", "seed"), [("original", "drop", 0), ("expanded", "pad", 5)])
def test_instances_are_the_shuffled_cuts_of_the_stream(world, in_parts, monkeypatch, group, remainder, seed):
    monkeypatch.setattr(instance_plan, "PART_BYTES", 5 * 2 * LENGTH)
    settings = {"pack_group": group, "pack_remainder": remainder, "seed": seed}
    tokens = Instances(packed(world, in_parts, **settings).path).tokens
    expected = by_hand(in_parts, load_tokenizer(world[2].path), group, LENGTH, remainder == "pad", seed)
    assert np.asarray(tokens).tolist() == expected


def test_documents_in_parts_give_the_same_bytes(world, in_parts):
    assert len(documents_table.parts(in_parts)) == 4
    for settings in ({}, {"pack_group": "expanded", "pack_position_ids": True}):
        assert packed(world, in_parts, **settings).digest == packed(world, **settings).digest


def test_instances_in_parts_are_read_as_the_one_part_is(world, monkeypatch):
    from datasets import load_from_disk

    settings = {"pack_remainder": "pad", "pack_position_ids": True}
    one = packed(world, **settings)
    monkeypatch.setattr(instance_plan, "PART_BYTES", 7 * 2 * LENGTH)
    many = packed(world, **settings)
    monkeypatch.setattr("eclectus.models.training.instances.RESIDENT_BYTES", 100)
    whole, parts = Instances(one.path), Instances(many.path)
    files = len(list(Path(many.path).glob("data-*.arrow")))
    assert files == -(-len(whole) // 7) > 3 and len(document_tables(many)) == files
    assert one.statistics == many.statistics and one.manifest()["rows"] == many.manifest()["rows"]
    rows = np.random.default_rng(0).integers(0, len(whole), 50)
    for name, value in vars(whole.batch(rows)).items():
        assert (vars(parts.batch(rows))[name] == value).all(), name
    assert parts.largest_token() == whole.largest_token() and len(parts) == len(whole)
    assert (np.asarray(parts.tokens) == whole.tokens).all() and (parts.tokens[3:20] == whole.tokens[3:20]).all()
    assert (np.asarray(parts.spans) == whole.spans).all() and (parts.spans[:, 2] == whole.spans[:, 2]).all()
    tables = [pq.read_table(path) for path in document_tables(many)]
    assert [row for each in tables for row in each.to_pylist()] == pq.read_table(document_tables(one)[0]).to_pylist()
    dataset, expected = load_from_disk(many.path), load_from_disk(one.path)
    for column in ("input_ids", "position_ids"):
        assert dataset[column][:] == expected[column][:]
    assert dataset._fingerprint != expected._fingerprint


def test_a_part_holds_a_bounded_number_of_spans(world, monkeypatch):
    monkeypatch.setattr(instance_plan, "PART_SPANS", 10)
    many = packed(world)
    spans = [np.load(path) for path in sorted(Path(many.path).glob("spans-*.npy"))]
    assert len(spans) > 3 and max(map(len, spans)) <= 20
    assert sum(map(len, spans)) == sum(pq.read_metadata(path).num_rows for path in document_tables(many))


def test_every_document_is_tokenised_once_for_all_packings(world, in_parts, calls):
    for group in ("original", "expanded", "all"):
        packed(world, in_parts, pack_group=group)
    names = [path.name for path in documents_table.parts(in_parts)]
    assert sorted(calls) == sorted((name, group) for name in names for group in ("original", "expanded"))
    # Another seed, length and split, and a corpus in which other parts are new, find the tokens.
    split = ["heldout" if row % 9 == 0 else "train" for row in range(len(some_rows()))]
    with world[0].draft("documents") as out:
        relabel(in_parts, {"split": documents_table.pa.array(split)}, out)
        other = world[0].commit(out)
    packed(world, other, seed=7, instance_tokens=16)
    assert len(calls) == 2 * len(names)
    more = write_documents(
        world[0], [*some_rows()[:64], *({**row, "text": f"new {row['text']}"} for row in some_rows())]
    )
    packed(world, more)
    assert len(calls) == 2 * len(names) + 2 * (len(documents_table.parts(more)) - 1)


def test_documents_that_a_budget_leaves_out_are_not_tokenised(world, in_parts, calls):
    split = ["apart" if row % 10 else "train" for row in range(len(some_rows()))]
    with world[0].draft("documents") as out:
        relabel(in_parts, {"split": documents_table.pa.array(split)}, out)
        little = world[0].commit(out)
    count, flat = [], document_tokens.TextTokens.flat
    document_tokens.TextTokens.flat = lambda self, texts, kind: (count.append(len(texts)), flat(self, texts, kind))[1]
    try:
        tokens = Instances(packed(world, little, pack_group="original", pack_remainder="pad").path).tokens
    finally:
        document_tokens.TextTokens.flat = flat
    expected = by_hand(little, load_tokenizer(world[2].path), "original", LENGTH, True, 0)
    assert np.asarray(tokens).tolist() == expected and sum(count) < len(some_rows()) / 8


def test_a_run_that_is_cut_short_goes_on_where_it_stood(world, in_parts, calls, monkeypatch):
    expected, before = packed(world), len(calls)
    monkeypatch.setattr(instance_plan, "PART_BYTES", 20 * 2 * LENGTH)
    counted, written = document_tokens.tokens_of_part, packing.write_part

    def stop_at(number, function):
        def stopping(out, **arguments):
            if len(calls) - before == number or arguments.get("number") == number:
                raise KeyboardInterrupt
            return function(out, **arguments)

        return stopping

    monkeypatch.setattr(document_tokens, "tokens_of_part", stop_at(3, counted))
    with pytest.raises(KeyboardInterrupt):
        packed(world, in_parts)
    assert len(calls) - before == 3
    monkeypatch.setattr(document_tokens, "tokens_of_part", counted)
    monkeypatch.setattr(packing, "write_part", stop_at(2, written))
    with pytest.raises(KeyboardInterrupt):
        packed(world, in_parts)
    made = []
    monkeypatch.setattr(
        packing, "write_part", lambda out, **given: made.append(given["number"]) or written(out, **given)
    )
    parts = packed(world, in_parts)
    assert len(calls) - before == len(set(calls[before:])) == 8
    assert made[0] == 2 and made == sorted(set(made)), "what was written is written again"
    assert (np.asarray(Instances(parts.path).tokens) == Instances(expected.path).tokens).all()


def test_a_damaged_part_of_the_tokens_is_made_again_and_nothing_else(world, in_parts, calls, results):
    whole = packed(world, in_parts)
    token_file = sorted(results.glob("*/*/tokens"))[2]
    content = bytearray(token_file.read_bytes())
    content[10] ^= 255
    token_file.write_bytes(content)
    before = len(calls)
    assert packed(world, in_parts).digest == whole.digest and len(calls) == before + 1


def test_nothing_is_left_but_tokens_and_names(world, in_parts, results):
    packed(world, in_parts)
    left = {path.name for path in results.glob("*/*/*")}
    assert left == {"tokens", "sizes.npy", "rows.npy", "control.npy", "names.arrow", part_store.DESCRIPTION}


def test_one_document_of_megabytes_among_tweets(world, tmp_path):
    rows = [{"text": f"tweet {number} of few words", "language": "en", "group": "original"} for number in range(300)]
    rows[150]["text"] = "".join(f"{number:07d} word " for number in range(100_000))
    documents = write_documents(ArtifactStore(tmp_path), rows)
    instances = packed(world, documents, pack_remainder="pad")
    table = pq.read_table(document_tables(instances)[0])
    long = read_table(documents)["document"][150].as_py()
    own = [row for row in table.to_pylist() if row["document"] == long]
    own.sort(key=lambda row: row["document_offset"])
    tokens = Instances(instances.path).tokens
    ids = np.concatenate([tokens[each["instance"], each["instance_offset"] :][: each["tokens"]] for each in own])
    assert len(own) > 10_000 and load_tokenizer(world[2].path).decode(ids[:-1]) == rows[150]["text"]
    assert len(set(table["document"].to_pylist())) == 300


def test_documents_of_control_tokens_only_are_packed_as_text_and_counted(tmp_path):
    store = ArtifactStore(tmp_path)
    rows = [{"text": "</s>" * (1 + number), "language": "en", "group": "original"} for number in range(40)]
    for number, (kind, spelled) in enumerate(((byte_level, 0), (words, 40 * 41 // 2))):
        chosen = make(
            store, tokenizer, documents=None, settings=TokenizerSettings(tokenizer=str(kind(tmp_path / str(number))))
        )
        documents = write_documents(store, [*rows, {"text": "an html page", "language": "en", "group": "original"}])
        settings = PackSettings(instance_tokens=16, pack_remainder="pad")
        instances = make(store, pack, documents=documents, tokenizer=chosen, settings=settings)
        tokens, end = Instances(instances.path), load_tokenizer(chosen.path).eos_token_id
        assert (np.asarray(tokens.tokens) == end).sum() - instances.statistics["tokens_padded"] == 41
        # The vocabulary of words has no other way to spell it than the unknown token.
        assert instances.statistics["control_tokens_in_texts"] in (0, spelled)


def test_one_instance_only(world, tmp_path):
    documents = write_documents(ArtifactStore(tmp_path), [{"text": "a few words", "group": "original"}])
    instances = packed(world, documents, pack_remainder="pad", instance_tokens=512)
    assert len(Instances(instances.path)) == 1 and instances.statistics["documents"] == 1


PROGRAM = """
import json, sys
from pathlib import Path
from eclectus.storage.artifact import Artifact, ArtifactStore
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.packing import instance_plan
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.run import Run, activate
from tests.support.topics import make
folder, workers, documents, words = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
home = Home.open(folder)
instance_plan.PART_BYTES = 1280
with Journal(home.journal, "run") as journal:
    with activate(Run("run", home, journal, KnownKeys(home.keys, home.store), [], "test")):
        settings = PackSettings(instance_tokens=32, curation_workers=workers)
        made = make(home.store, pack, documents=Artifact(*documents), tokenizer=Artifact(*words), settings=settings)
print("ray" in sys.modules, made.digest)
"""


@pytest.mark.slow  # 30 s: Ray is started
def test_workers_of_ray_give_the_same_bytes(world, in_parts, tmp_path):
    found = []
    for workers in (1, 2):
        given = [json.dumps([each.kind, each.digest, each.path]) for each in (in_parts, world[2])]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / f"home{workers}"), str(workers), *given],
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(done.stdout.split())
    assert [ray for ray, _ in found] == ["False", "True"] and found[0][1] == found[1][1]


@pytest.mark.parametrize("part_bytes", [10**9, 9 * 2 * LENGTH])
def test_a_batch_has_the_document_language_and_domain_of_every_token(world, monkeypatch, part_bytes):
    monkeypatch.setattr(instance_plan, "PART_BYTES", part_bytes)
    instances = Instances(packed(world, pack_remainder="pad").path)
    expected = np.full((3, len(instances) * LENGTH), -1)
    for start, length, *labels in np.asarray(instances.spans).tolist():
        expected[:, start : start + length] = np.array(labels)[:, None]
    expected = expected.reshape(3, len(instances), LENGTH)
    for rows in (np.arange(len(instances)), np.array([5, 0, 5, len(instances) - 1]), np.empty(0, np.int64)):
        batch = instances.batch(rows)
        for found, wanted in zip((batch.documents, batch.languages, batch.domains), expected, strict=True):
            assert (found.numpy() == wanted[rows]).all()
        padding = expected[0][rows] < 0
        assert (batch.labels.numpy() == np.where(padding, -100, batch.tokens.numpy())).all()
