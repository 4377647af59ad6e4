"""Refusals of upcycling: they name the cause, and leave nothing on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.checkpoints.tensor_files import CheckpointError
from eclectus.models.checkpoints.tokenizer_json import TokenizerError
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import VOCABULARY, write_base


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 1}, "at least 2"),
        ({"experts": 4, "top_k": 5}, "top_k is 5: choose 1 to 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"init": "random"}, "unknown init 'random'"),
        ({"init": "drop", "drop_ratio": 0.0}, "drop_ratio is 0"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"experts": [4, 1]}, "experts is 1: at least 2"),
        ({"experts": [4, 3], "top_k": 4}, "choose 1 to 3"),
        ({"experts": [6]}, "names 1 layers, the base has 2"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, settings, message):
    base = write_base(tmp_path / "base", "llama")
    with pytest.raises(ValueError, match=message):
        upcycle(base, tmp_path / "moe", **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' model; bases that can be upcycled: llama, mistral, qwen2, qwen3"),
        ({"model_type": "mixtral"}, "'mixtral' model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "not run by default"),
        ({"attention_bias": True}, "attention_bias: true"),
        ({"mlp_bias": True}, "mlp_bias: true"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected a causal language model"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "mixes full_attention and sliding_attention"),
    ],
)
def test_bases_that_cannot_be_upcycled_are_refused_with_the_reason(tmp_path, changes, message):
    base = write_base(tmp_path / "base", "llama")
    change_config(base, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        upcycle(base, tmp_path / "moe")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def edit_weights(base, edit):
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "no directory": (lambda b: b.rename(b.with_name("elsewhere")), "does not exist"),
    "no config": (lambda b: (b / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda b: (b / "config.json").write_text("{"), "not JSON"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "neither model.safetensors"),
    "pickled": (lambda b: (b / "model.safetensors").rename(b / "pytorch_model.bin"), "pickled weights"),
    "cut short": (
        lambda b: (b / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-99]),
        "damaged",
    ),
    "missing tensor": (
        lambda b: edit_weights(b, lambda w: w.pop("model.norm.weight")),
        "lacks 1 tensors.*model.norm.weight",
    ),
    "odd tensor": (
        lambda b: edit_weights(b, lambda w: w.update(surplus=torch.ones(2))),
        "does not know, first surplus",
    ),
    "misshapen": (lambda b: edit_weights(b, lambda w: w.update({"model.norm.weight": torch.ones(3)})), "shape"),
    "integer": (
        lambda b: edit_weights(b, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})),
        "quantised",
    ),
    "untied head": (
        lambda b: (change_config(b, tie_word_embeddings=True), None)[1],
        "differs from its embeddings",
    ),
    "foreign tokenizer": (lambda b: change_config_of_tokenizer(b), "this tokenizer is not the model's"),
}


def change_config_of_tokenizer(base):
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["extra"] = VOCABULARY
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_bases_are_refused_by_name(tmp_path, kind):
    base = write_base(tmp_path / "base", "llama")
    damage, message = DAMAGE[kind]
    damage(base)
    with pytest.raises((CheckpointError, UnsupportedModelError, TokenizerError), match=message):
        upcycle(base, tmp_path / "moe")
    assert not (tmp_path / "moe").exists() and not (tmp_path / "moe.partial").exists()


def test_a_missing_shard_is_named(tmp_path):
    base = write_base(tmp_path / "base", "llama", max_shard_size="20KB")
    missing = sorted(base.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"shard {missing.name} is missing"):
        upcycle(base, tmp_path / "moe")


def test_an_existing_directory_is_not_overwritten(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        upcycle(base, tmp_path / "moe")
    assert (tmp_path / "moe" / "precious").read_text() == "x"


def test_nothing_is_left_when_the_check_fails(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    with pytest.raises(StepZeroError, match="nothing was written"):
        upcycle(base, tmp_path / "moe", tolerance=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_weights_that_are_not_finite_are_named(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN in row 0"):
        upcycle(base, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


OWN_CODE = """
from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM):
    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.mark.parametrize("factor", [1, 2])
def test_the_check_compares_with_the_trusted_code_of_a_base(tmp_path, monkeypatch, factor):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = write_base(tmp_path / f"base{factor}", "llama")
    (base / "modeling_own.py").write_text(OWN_CODE.format(factor=factor))
    change_config(base, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(UnsupportedModelError, match="trust-remote-code"):
        upcycle(base, tmp_path / "moe")
    if factor != 1:
        with pytest.raises(StepZeroError):
            upcycle(base, tmp_path / "moe", trust_remote_code=True)
        return
    assert upcycle(base, tmp_path / "moe", trust_remote_code=True).max_abs_delta <= 1e-5
    assert not list((tmp_path / "moe").glob("*.py"))
    assert "auto_map" not in (tmp_path / "moe" / "config.json").read_text()
