"""Files of weights as they come: what is read is what the index and the headers say, or the file is named."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclectus.models.checkpoints.door import check_checkpoint, open_model
from eclectus.models.checkpoints.side_files import INDEX
from eclectus.models.checkpoints.tensor_files import CheckpointError
from tests.support.dense_bases import logits, tokens, write_base
from tests.support.mutations import some_changes, write_json


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("sharded") / "base", "llama", max_shard_size="20KB")


@pytest.fixture
def base(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "base")


def first_shard(base):
    return sorted(base.glob("model-*.safetensors"))[0]


def test_shards_open_as_one_file_does(sharded):
    with torch.no_grad():
        assert torch.equal(open_model(sharded)(input_ids=tokens()).logits, logits(sharded, tokens()))


def test_a_changed_index_gives_the_same_model_or_one_line_with_its_name(sharded, base):
    index = json.loads((base / INDEX).read_text())
    expected = logits(sharded, tokens())
    refused = 0
    for what, changed in some_changes(index, 60, seed=3):
        write_json(base / INDEX, changed)
        try:
            model = open_model(base)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and str(base) in str(error), what
            continue
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens()).logits, expected), what
    assert refused > 40


def test_a_changed_header_gives_the_same_model_or_one_line_with_its_file(sharded, base):
    path = first_shard(base)
    content, expected = path.read_bytes(), logits(sharded, tokens())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for what, changed in some_changes(header, 50, seed=5):
        made = json.dumps(changed).encode()
        path.write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])
        try:
            model = open_model(base)
        except CheckpointError as error:
            assert "\n" not in str(error) and path.name in str(error), f"{what}: {error}"
            continue
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens()).logits, expected), what


def test_a_file_that_was_cut_or_changed_in_its_header_is_named(base):
    path, numbers = first_shard(base), random.Random(7)
    content = path.read_bytes()
    for _ in range(40):
        path.write_bytes(content[: numbers.randrange(len(content))])
        with pytest.raises(CheckpointError, match=path.name):
            check_checkpoint(base)


@pytest.mark.parametrize("name", ["../model-x.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b"])
def test_an_index_leads_to_no_file_outside_its_directory(base, name):
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    write_json(base / INDEX, index)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map names .* for model\.norm\.weight"):
        check_checkpoint(base)


def test_a_tensor_in_two_shards_is_named_with_both(base):
    shards = sorted(base.glob("model-*.safetensors"))
    weights = load_file(shards[0])
    name = next(iter(weights))
    save_file({**load_file(shards[1]), name: weights[name] + 1}, shards[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} is both in .*{shards[0].name} and in {shards[1].name}"):
        check_checkpoint(base)


def test_two_sets_of_weights_in_one_directory_are_refused(base):
    save_file({"x": torch.ones(1)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two sets of weights, model\.safetensors and the shards"):
        check_checkpoint(base)


def test_an_index_of_one_file_may_stand_beside_it(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    names = load_file(base / "model.safetensors")
    write_json(base / INDEX, {"weight_map": {name: "model.safetensors" for name in names}})
    with torch.no_grad():
        assert torch.equal(open_model(base)(input_ids=tokens()).logits, logits(base, tokens()))


def test_stored_rotary_frequencies_are_passed_over(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    weights = load_file(base / "model.safetensors")
    expected = logits(base, tokens())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(open_model(base)(input_ids=tokens()).logits, expected)
