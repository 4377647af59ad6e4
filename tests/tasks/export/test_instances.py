"""Instances in the files of other trainers, read back by their own readers where these are installed."""

import json
import struct
import sys
import types

import numpy as np
import pytest

from eclectus.flows.cli.main import main
from eclectus.models.training.instances import IGNORED, Instances
from eclectus.storage.errors import EclectusError
from eclectus.tasks.export import instances as exporting
from eclectus.tasks.export.instances import FORMATS, export_instances
from eclectus.tasks.packing.pack import PackSettings, pack
from tests.support.small_world import make_world

LENGTH = 32


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    with world.store.draft("instances") as draft:
        settings = PackSettings(instance_tokens=LENGTH, pack_remainder="pad", pack_fit=8)
        pack.function(world.documents, world.tokenizer, settings, draft)
        return world.store.commit(draft)


@pytest.fixture
def tokens(packed):
    return np.asarray(Instances(packed.path).tokens)


def test_lines_have_tokens_labels_masks_and_positions(packed, tokens, tmp_path):
    done = export_instances(packed.path, tmp_path / "out", "jsonl")
    assert (done.instances, done.tokens, done.files, done.lost) == (
        len(tokens), tokens.size, ["instances.jsonl"], []
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out/instances.jsonl").read_text().splitlines()]
    assert [row["input_ids"] for row in rows] == tokens.tolist()
    batch = Instances(packed.path).batch(np.arange(len(tokens)))
    assert [row["labels"] for row in rows] == batch.labels.tolist()
    padding = batch.labels.numpy() == IGNORED
    assert padding.any() and np.array_equal(np.array([row["attention_mask"] for row in rows]) == 0, padding)
    positions, documents = np.array([row["position_ids"] for row in rows]), batch.documents.numpy()
    assert (positions[:, 0] == 0).all()
    goes_on = documents[:, 1:] == documents[:, :-1]
    assert (positions[:, 1:][goes_on] == positions[:, :-1][goes_on] + 1).all()
    assert (positions[:, 1:][~goes_on] == 0).all() and (~goes_on).any()


@pytest.mark.parametrize("vocabulary", [500, 2**16, 2**16 + 1])
def test_megatron_s_index_says_where_each_instance_is(packed, tokens, tmp_path, monkeypatch, vocabulary):
    monkeypatch.setattr(exporting, "Instances", lambda path: _with(Instances(path), vocabulary))
    export_instances(packed.path, tmp_path / "out", "megatron")
    index, count = (tmp_path / "out/instances.idx").read_bytes(), len(tokens)
    kind, code = (np.uint16, 8) if vocabulary <= 2**16 else (np.int32, 4)
    assert index[:9] == b"MMIDIDX\0\0" and struct.unpack("<QBQQ", index[9:34]) == (1, code, count, count + 1)
    lengths, rest = np.frombuffer(index, np.int32, count, 34), 34 + 4 * count
    pointers, ends = (
        np.frombuffer(index, np.int64, count, rest),
        np.frombuffer(index, np.int64, count + 1, rest + 8 * count),
    )
    assert (lengths == LENGTH).all() and ends.tolist() == list(range(count + 1))
    content = (tmp_path / "out/instances.bin").read_bytes()
    found = [np.frombuffer(content, kind, LENGTH, at) for at in pointers]
    assert np.array_equal(np.stack(found), tokens) and len(content) == tokens.size * np.dtype(kind).itemsize


def _with(data, vocabulary):
    data.vocabulary = vocabulary
    return data


def test_mosaic_s_shards_are_as_their_offsets_say(packed, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD_BYTES", 2000)
    export_instances(packed.path, tmp_path / "out", "mosaic")
    shards = json.loads((tmp_path / "out/index.json").read_text())["shards"]
    assert len(shards) > 2
    found = []
    for shard in shards:
        content = (tmp_path / "out" / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"] <= 2000
        (count,) = struct.unpack("<I", content[:4])
        offsets = np.frombuffer(content, np.uint32, count + 1, 4)
        assert json.loads(content[4 * (count + 2) : offsets[0]])["column_names"] == ["tokens"]
        found += [np.frombuffer(content, np.uint16, LENGTH, at) for at in offsets[:-1]]
        assert count == shard["samples"] and offsets[-1] == len(content)
    assert np.array_equal(np.stack(found), tokens)


def test_what_a_format_does_not_hold_is_said(packed, tmp_path, capsys):
    words = ["export-instances", packed.path, str(tmp_path / "out"), "--format", "megatron"]
    main(["--home", str(tmp_path / "home"), *words])
    said = capsys.readouterr().out
    assert "tokens of padding: padding is trained on like any other token" in said
    assert "lost: where documents begin: the trainer knows it from the token" in said


def test_what_cannot_be_exported_is_one_sentence(packed, tmp_path, monkeypatch, capsys):
    with pytest.raises(EclectusError, match="format 'tfrecord' is unknown; the formats are jsonl, megatron, mosaic"):
        export_instances(packed.path, tmp_path / "out", "tfrecord")
    with pytest.raises(EclectusError, match=r"holds no instances .* give an artifact of kind instances"):
        export_instances(tmp_path, tmp_path / "out", "jsonl")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").write_text("mine")
    with pytest.raises(EclectusError, match="taken exists already: remove it or choose another place"):
        export_instances(packed.path, tmp_path / "taken", "jsonl")
    for name in ("litdata", "array_record"):
        monkeypatch.setitem(sys.modules, name, None)
    for kind in ("litgpt", "grain"):
        with pytest.raises(EclectusError, match=rf"cannot be imported .* pip install 'eclectus\[{kind}\]'"):
            export_instances(packed.path, tmp_path / "out", kind)
        assert not (tmp_path / "out").exists()


# The real readers, with whatever they need in the environment.


def test_megatron_s_own_reader(packed, tokens, tmp_path):
    reader = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    export_instances(packed.path, tmp_path / "out", "megatron")
    data = reader.IndexedDataset(str(tmp_path / "out/instances"))
    assert len(data) == len(tokens)
    assert all(np.array_equal(data[number], tokens[number]) for number in range(len(tokens)))


def test_mosaic_s_own_reader(packed, tokens, tmp_path, monkeypatch):
    # Its package imports torchvision for readers of images.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        monkeypatch.setitem(sys.modules, name, stub := types.ModuleType(name))
        stub.VisionDataset, stub.to_tensor = object, None
    reader = pytest.importorskip("streaming.base.format.mds.reader")
    monkeypatch.setattr(exporting, "SHARD_BYTES", 2000)
    export_instances(packed.path, tmp_path / "out", "mosaic")
    found = []
    for shard in json.loads((tmp_path / "out/index.json").read_text())["shards"]:
        opened = reader.MDSReader.from_json(str(tmp_path / "out"), None, shard)
        found += [opened[number]["tokens"] for number in range(shard["samples"])]
    assert np.array_equal(np.stack(found), tokens)


def test_litgpt_s_own_reader(packed, tokens, tmp_path):
    litdata = pytest.importorskip("litdata")
    export_instances(packed.path, tmp_path / "out", "litgpt")
    loader = litdata.TokensLoader(block_size=LENGTH)
    data = litdata.StreamingDataset(str(tmp_path / "out"), item_loader=loader, shuffle=False)
    assert np.array_equal(np.stack([row.numpy() for row in data]), tokens)


def test_grain_s_own_reader(packed, tokens, tmp_path):
    grain = pytest.importorskip("grain.python")
    pytest.importorskip("array_record")
    export_instances(packed.path, tmp_path / "out", "grain")
    data = grain.ArrayRecordDataSource(str(tmp_path / "out/instances.array_record"))
    assert np.array_equal(np.stack([np.frombuffer(data[n], "<u2") for n in range(len(data))]), tokens)


def test_every_format_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["export-instances", "--help"])
    said = capsys.readouterr().out
    assert all(kind in said for kind in FORMATS)
