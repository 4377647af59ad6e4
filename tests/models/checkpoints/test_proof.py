"""The step-0 proofs: a plain reading of the files agrees with transformers, and notices when something else is read."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from eclectus.models.checkpoints.door import open_model
from eclectus.models.checkpoints.proof import StepZeroError, probes_for, prove_start
from eclectus.models.extension.methods import open_method, prove_method
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining import stages
from eclectus.models.sharding.blueprint import Blueprint, stock_blueprint
from tests.support.dense_bases import BASES, LLAMA3_ROPE, SHAPE, write_base
from tests.support.gguf_files import spread

THETA = {"rope_theta": 20000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 4.0, **THETA}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
CONFIGS = {
    "linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, **THETA}),
    "dynamic": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 4.0, **THETA}),
    "yarn": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "yarn, its own ends": LlamaConfig(**SHAPE, rope_parameters={**YARN, "beta_fast": 8, "beta_slow": 2}),
    "yarn, not truncated": LlamaConfig(**SHAPE, rope_parameters={**YARN, "truncate": False}),
    "yarn, its own temperature": LlamaConfig(**SHAPE, rope_parameters={**YARN, "attention_factor": 1.5}),
    "yarn, two temperatures": LlamaConfig(**SHAPE, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
    "longrope": LlamaConfig(**SHAPE, rope_parameters=LONG | FACTORS),
    "llama3": LlamaConfig(**SHAPE, head_dim=32, rope_parameters=LLAMA3_ROPE),
    "wide heads": LlamaConfig(**SHAPE, head_dim=24, num_key_value_heads=1),
    "gelu": LlamaConfig(**SHAPE, hidden_act="gelu"),
    "tanh gelu": MistralConfig(**SHAPE, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", sliding_window=None),
    "window of mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=5),
    "window of some layers": Qwen2Config(
        **SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "window of all layers": Qwen3Config(
        **SHAPE, num_key_value_heads=2, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "window that is not used": Qwen2Config(**SHAPE, num_key_value_heads=2, sliding_window=5),
}


def saved(directory, config):
    model = spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    model.save_pretrained(directory)
    return directory


def changed(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plain_reading_agrees_with_transformers_at_every_position(tmp_path, name):
    proof = prove_start(open_model(saved(tmp_path, CONFIGS[name])), tmp_path, name, tolerance=2e-5)
    assert proof.probe_shape == (2, 128) and proof.last_position == 127


@pytest.mark.parametrize("name", BASES)
def test_the_plain_reading_agrees_with_transformers_on_each_family(tmp_path, name):
    prove_start(open_model(write_base(tmp_path, name)), tmp_path, name, tolerance=2e-5)


def test_old_config_keys_are_read_as_well(tmp_path):
    saved(tmp_path, CONFIGS["linear"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prove_start(open_model(tmp_path), tmp_path, "old keys", tolerance=2e-5)


WRONG = {
    "another theta": {"rope_theta": 10000.0},
    "another factor": {"rope_type": "linear", "factor": 2.0},
    "no scaling": {"rope_type": "default"},
    "another kind": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("name", WRONG)
def test_positions_that_were_read_otherwise_are_noticed(tmp_path, name):
    model = open_model(saved(tmp_path, CONFIGS["linear"]))
    changed(tmp_path, rope_parameters=THETA | WRONG[name])
    with pytest.raises(StepZeroError, match="other rotary positions"):
        prove_start(model, tmp_path, name)


def test_a_window_that_was_read_otherwise_is_noticed_though_it_is_longer_than_64_tokens(tmp_path):
    config = MistralConfig(**SHAPE | {"max_position_embeddings": 1024}, num_key_value_heads=2, sliding_window=300)
    model = open_model(saved(tmp_path, config))
    changed(tmp_path, sliding_window=None)
    with pytest.raises(StepZeroError, match="in a logit"):
        prove_start(model, tmp_path, "a window")


def test_a_weight_that_was_read_otherwise_is_noticed(tmp_path):
    model = open_model(write_base(tmp_path, "qwen3"))
    model.model.layers[1].self_attn.k_norm.weight.data[3] *= 1.01
    with pytest.raises(StepZeroError, match="in a logit"):
        prove_start(model, tmp_path, "a norm")


def test_probes_of_a_large_model_are_short_and_still_reach_its_last_position():
    config = LlamaConfig(vocab_size=128256, max_position_embeddings=131072)
    probes = probes_for(config, parameters=8_000_000_000)
    assert probes.tokens.shape == (2, 64) and probes.last_position == 131071
    assert probes.positions[0].tolist() == list(range(64))
    small = probes_for(LlamaConfig(vocab_size=96, max_position_embeddings=4096), parameters=10_000)
    assert small.tokens.shape == (2, 2048) and small.last_position == 4095


def test_a_model_is_proved_at_a_hundred_thousand_positions(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    config = Qwen2Config(
        **SHAPE | {"max_position_embeddings": 131072, "vocab_size": 40}, num_key_value_heads=2, rope_parameters=rope
    )
    proof = prove_start(open_model(saved(tmp_path, config)), tmp_path, "far", tolerance=2e-5)
    assert proof.last_position == 131071


@pytest.mark.parametrize("method", ["full", "lora", "llama_pro", "moe_lpr", "moe_all"])
def test_every_method_starts_as_its_checkpoint(tmp_path, method):
    start = write_base(tmp_path / "base", "qwen2 tied")
    if method.startswith("moe"):
        upcycle(start, tmp_path / "moe", experts=3)
        start = tmp_path / "moe"
    assert prove_method(open_method(method, start), method, start).max_abs_delta <= 5e-5


def test_a_new_block_that_adds_something_is_noticed(tmp_path):
    base = write_base(tmp_path, "llama")
    model = open_method("llama_pro", base)
    model.model.layers[-1].mlp.down_proj.weight.data[0, 0] = 0.5
    with pytest.raises(StepZeroError, match="the start of LLaMA-Pro differs from"):
        prove_method(model, "llama_pro", base)


def test_an_adapter_that_is_not_zero_is_noticed(tmp_path):
    base = write_base(tmp_path, "llama")
    model = open_method("lora", base)
    next(value for name, value in model.named_parameters() if "lora_B" in name).data[0, 0] = 1.0
    with pytest.raises(StepZeroError, match="the start of LoRA differs from"):
        prove_method(model, "lora", base)


STAGES = {
    "lory": lambda dense: stages.lory_from_dense(dense, {}, ["a"], 4, segment_length=16),
    "lory, prefix": lambda dense: stages.lory_from_dense(dense, {}, ["a"], 4, segment_length=16, routing="prefix"),
    "lory, dense": lambda dense: stages.lory_from_dense(dense, {}, ["a"], 4, segment_length=16, routing="dense"),
    "top_k": lambda dense: stages.top_k_of_dense(dense, {}, ["a"], 4, 2, seed=0),
    "document_pools": lambda dense: stages.document_pools_of_dense(dense, {}, ["a"], 4, 2, seed=0),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_the_stages_of_pre_training_start_as_the_dense_model(tmp_path, stage, name):
    base = write_base(tmp_path, name)
    model = STAGES[stage](stock_blueprint(base)).blueprint.make()
    assert prove_start(model, base, stage).max_abs_delta <= 5e-5


def test_a_stage_of_pre_training_that_starts_otherwise_is_noticed(tmp_path):
    base = write_base(tmp_path, "llama")
    dense = open_model(base)
    dense.lm_head.weight.data[7] += 0.1
    with pytest.raises(StepZeroError, match="lory differs from"):
        prove_start(STAGES["lory"](Blueprint.of(dense)).blueprint.make(), base, "lory")
