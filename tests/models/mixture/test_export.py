"""Exports load in stock transformers of both generations, with equal logits, and the base is extracted bit by bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.mixture.experts import frozen_digest, set_trainable, split_experts
from eclectus.models.mixture.export import NotTheBaseError, export_checkpoint, extract_base
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import BASES, logits, tokens, write_base


def trained(root, name, stage="post_pretrain", dtype=torch.float32):
    """A base upcycled and trained a few steps, split and live; returns its directories and the model."""
    base = write_base(root / "base", name, dtype)
    upcycle(base, root / "moe", experts=4)
    model = split_experts(AutoModelForCausalLM.from_pretrained(root / "moe", dtype=torch.float32))
    set_trainable(model, stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.2)
    for step in range(3):
        batch = tokens(seed=step)
        out = model(input_ids=batch).logits
        cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    return base, root / "moe", model.eval()


def same_tensors(first, second):
    with CheckpointReader(first) as a, CheckpointReader(second) as b:
        assert a.specs == b.specs
        assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.specs)


@pytest.mark.parametrize("name", BASES)
def test_a_trained_model_exports_to_what_stock_transformers_saves_and_loads(tmp_path, name):
    base, _moe, model = trained(tmp_path, name)
    with torch.no_grad():
        expected = model(tokens()).logits
    assert (expected - logits(base, tokens())).abs().max() > 0.01
    export_checkpoint(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(tmp_path / "out", tokens()), expected, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "stock")
    same_tensors(tmp_path / "out", tmp_path / "stock")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5")["input_ids"] == [5]
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    assert json.loads((tmp_path / "out" / "upcycle.json").read_text())["experts"] == 4


@pytest.mark.parametrize("name", BASES)
def test_the_base_is_extracted_bit_by_bit_from_a_trained_model(tmp_path, name):
    base, _moe, model = trained(tmp_path, name)
    export_checkpoint(model, tmp_path / "out", max_shard_bytes=40_000)
    extract_base(tmp_path / "out", tmp_path / "back")
    same_tensors(base, tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back", tokens()), logits(base, tokens()))
    original = AutoModelForCausalLM.from_pretrained(base)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is type(original)


def test_a_bf16_base_is_extracted_bit_by_bit_after_training_in_fp32(tmp_path):
    base, _moe, model = trained(tmp_path, "llama", dtype=torch.bfloat16)
    for out, dtype in (("narrow", torch.bfloat16), ("wide", None)):
        export_checkpoint(model, tmp_path / out, dtype=dtype)
        extract_base(tmp_path / out, tmp_path / f"{out}-back")
        same_tensors(base, tmp_path / f"{out}-back")


def test_a_directory_saved_by_transformers_itself_becomes_complete(tmp_path):
    base, moe, model = trained(tmp_path, "qwen3")
    export_checkpoint(model, tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert "rope_theta" not in config
    export_checkpoint(tmp_path / "two", tmp_path / "three", side_files=moe)
    stored = json.loads((tmp_path / "three" / "config.json").read_text())
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] and stored["num_experts"] == 4
    same_tensors(tmp_path / "one", tmp_path / "three")
    extract_base(tmp_path / "three", tmp_path / "back")
    same_tensors(base, tmp_path / "back")


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_expert_names_are_those_that_servers_map(tmp_path, name):
    _base, _moe, model = trained(tmp_path, name)
    export_checkpoint(model, tmp_path / "out")
    block, matrices = (
        ("block_sparse_moe", ("w1", "w2", "w3"))
        if name == "mistral"
        else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    expected = {f"model.layers.1.{block}.experts.{e}.{m}.weight" for e in range(4) for m in matrices}
    with CheckpointReader(tmp_path / "out") as reader:
        assert expected <= set(reader.specs)
        assert f"model.layers.1.{block}.gate.weight" in reader.specs
        # vLLM fails on tensors without elements (an empty shared expert).
        assert all(spec.nbytes for spec in reader.specs.values())


def test_exporting_does_not_change_the_loaded_model(tmp_path):
    _base, _moe, model = trained(tmp_path, "llama")
    digest, before = frozen_digest(model), model(tokens()).logits
    export_checkpoint(model, tmp_path / "out")
    assert frozen_digest(model) == digest and torch.equal(model(tokens()).logits, before)


def test_an_export_generates_text(tmp_path):
    _base, _moe, model = trained(tmp_path, "llama tied")
    export_checkpoint(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generate(tokens(5, 1), max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_a_base_whose_weights_were_trained_is_not_extracted(tmp_path):
    _base, _moe, model = trained(tmp_path, "llama", stage="all")
    export_checkpoint(model, tmp_path / "out")
    with pytest.raises(NotTheBaseError, match="no longer the base's"):
        extract_base(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_misuse_is_refused_with_the_remedy(tmp_path):
    base, moe, model = trained(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match="expected an upcycled one"):
        export_checkpoint(base, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="expected an upcycled one"):
        extract_base(base, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(model, moe)
    config = json.loads((moe / "config.json").read_text())
    del config["upcycled_from"]
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotTheBaseError, match="upcycled_from"):
        extract_base(moe, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("upcycle.json", "{", r"moe/upcycle\.json is not JSON"),
        ("upcycle.json", "[]", r"moe/upcycle\.json"),
        ("upcycle.json", "{}", r"moe/upcycle\.json has no base_digest"),
        ("tokenizer_config.json", "{", r"moe/tokenizer_config\.json is not a JSON object"),
        ("tokenizer_config.json", "[1]", r"moe/tokenizer_config\.json is not a JSON object \(it is a list\)"),
        ("config.json", '{"model_type": 3}', r"moe/config\.json"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, name, content, complaint):
    upcycle(write_base(tmp_path / "base", "llama"), tmp_path / "moe", experts=2)
    (tmp_path / "moe" / name).write_text(content)
    for make in (export_checkpoint, extract_base):
        with pytest.raises(ValueError, match=complaint):
            make(tmp_path / "moe", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "moe"]


def test_a_mixture_that_lacks_a_tensor_is_not_exported(tmp_path):
    upcycle(write_base(tmp_path / "base", "llama"), tmp_path / "moe", experts=2)
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    save_file(weights, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    for make in (export_checkpoint, extract_base):
        with pytest.raises(ValueError, match=r"experts\.1\.w2\.weight"):
            make(tmp_path / "moe", tmp_path / "out")


def test_an_extracted_base_that_computes_something_else_is_not_written(tmp_path):
    upcycle(write_base(tmp_path / "base", "llama"), tmp_path / "moe", experts=2)
    path = tmp_path / "moe" / "config.json"
    config = json.loads(path.read_text())
    config["upcycled_from"]["rope_parameters"]["rope_theta"] = 500000.0
    path.write_text(json.dumps(config))
    with pytest.raises(StepZeroError, match="other rotary positions"):
        extract_base(tmp_path / "moe", tmp_path / "back")
    assert not (tmp_path / "back").exists()
