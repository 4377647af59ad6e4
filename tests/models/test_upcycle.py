"""Upcycling: equal at step 0 for every family, streamed, reproducible, and refused where it cannot be honest."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_bases import BASES, VOCABULARY, logits, tokens, write_base, write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

from models.checkpoint_io import INDEX, CheckpointError, CheckpointReader
from models.export import extract_base
from models.families import UnsupportedModelError
from models.upcycle import StepZeroError, upcycle

CLASSES = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def experts_of(directory, layer, expert, block="block_sparse_moe", names=("w1", "w3", "w2")):
    with CheckpointReader(directory) as reader:
        prefix = f"model.layers.{layer}.{block}.experts.{expert}"
        return [reader.tensor(f"{prefix}.{name}.weight") for name in names]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_upcycled_model_equals_its_base_in_stock_transformers(tmp_path, name, top_k):
    base = write_base(tmp_path / "base", name)
    report = upcycle(base, tmp_path / "moe", experts=3, top_k=top_k)
    assert report.max_abs_delta <= 1e-5 and report.proof == "as_routed"
    assert report.max_abs_logit > 1
    torch.testing.assert_close(logits(tmp_path / "moe", tokens(100)), logits(base, tokens(100)), rtol=0, atol=1e-5)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == CLASSES[report.base_model_type] + "ForCausalLM"
    assert model.config.num_experts_per_tok == top_k
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == bool(BASES[name].tie_word_embeddings)
    assert report.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_equality_holds_for_any_router(tmp_path, name):
    base = write_base(tmp_path / "base", name)
    upcycle(base, tmp_path / "moe", experts=5, top_k=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=3.0)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, logits(base, tokens()), rtol=0, atol=1e-5)


def test_the_directory_is_complete_and_says_how_it_was_made(tmp_path):
    base = write_base(tmp_path / "base", "qwen3")
    report = upcycle(base, tmp_path / "moe", experts=4, seed=7)
    stored = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(report)))
    assert stored["seed"] == 7 and stored["base_model_type"] == "qwen3"
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("w3 w4")["input_ids"] == [3, 4]
    assert GenerationConfig.from_pretrained(tmp_path / "moe").max_new_tokens == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "moe"]
    for path in (tmp_path / "moe").glob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "qwen2", "qwen3"])
def test_the_config_holds_what_both_transformers_generations_and_servers_read(tmp_path, name):
    base = write_base(tmp_path / "base", name)
    upcycle(base, tmp_path / "moe", experts=4)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    rope = AutoConfig.from_pretrained(base).rope_parameters
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == rope["rope_theta"]
    assert config["num_experts"] == config["num_local_experts"] == 4
    if name == "llama tied":
        assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 4.0
    else:
        assert config["rope_scaling"] is None
    assert config["router_aux_loss_coef"] == 0.0 and config["output_router_logits"] is False
    assert config.get("sliding_window") == (16 if name == "mistral" else None) or name == "qwen2"


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_router(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        upcycle(base, tmp_path / name, experts=3, init="drop", seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert weights[0] == weights[1] != weights[2]


def test_the_router_is_xavier_normal(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    upcycle(base, tmp_path / "moe", experts=64)
    with CheckpointReader(tmp_path / "moe") as reader:
        routers = torch.stack([reader.tensor(f"model.layers.{i}.block_sparse_moe.gate.weight") for i in range(2)])
    assert routers.std().item() == pytest.approx((2 / (32 + 64)) ** 0.5, rel=0.05)
    assert not torch.equal(routers[0], routers[1])


def test_noise_is_proved_by_expert_zero_alone_and_moves_the_others_a_little(tmp_path):
    base = write_base(tmp_path / "base", "qwen3 tied")
    report = upcycle(base, tmp_path / "moe", experts=3, init="noise", noise_scale=0.02)
    assert report.proof == "expert_0" and report.max_abs_delta <= 1e-5 < report.as_routed_delta
    names = ("gate_proj", "up_proj", "down_proj")
    original = experts_of(tmp_path / "moe", 1, 0, "mlp", names)
    others = [experts_of(tmp_path / "moe", 1, e, "mlp", names) for e in (1, 2)]
    for matrix in range(3):
        shift = others[0][matrix] - original[matrix]
        assert shift.std().item() == pytest.approx(0.02 * original[matrix].std().item(), rel=0.1)
        assert not torch.equal(others[0][matrix], others[1][matrix])


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_drop_redraws_the_same_inner_dimensions_in_all_three_matrices(tmp_path, ratio):
    base = write_base(tmp_path / "base", "mistral")
    report = upcycle(base, tmp_path / "moe", experts=3, init="drop", drop_ratio=ratio)
    assert report.proof == "expert_0" and report.max_abs_delta <= 1e-5 < report.as_routed_delta
    redrawn = []
    for expert in (1, 2):
        gate, up, down = experts_of(tmp_path / "moe", 0, expert)
        gate0, up0, down0 = experts_of(tmp_path / "moe", 0, 0)
        moved = (gate != gate0).any(dim=1)
        assert torch.equal(moved, (up != up0).any(dim=1)) and torch.equal(moved, (down != down0).any(dim=0))
        assert moved.sum().item() == round(ratio * 48)
        for fresh, old in ((gate[moved], gate0[moved]), (down[:, moved], down0[:, moved])):
            assert fresh.std().item() == pytest.approx(old.std().item(), rel=0.15)
        redrawn.append(moved)
    assert ratio == 1.0 or not torch.equal(*redrawn)


def test_a_base_in_shards_gives_the_same_bytes_as_in_one_file(tmp_path):
    one = write_base(tmp_path / "one", "qwen2")
    many = write_base(tmp_path / "many", "qwen2", max_shard_size="20KB")
    assert (many / INDEX).is_file()
    upcycle(one, tmp_path / "moe1")
    upcycle(many, tmp_path / "moe2")
    assert (tmp_path / "moe1" / "model.safetensors").read_bytes() == (
        tmp_path / "moe2" / "model.safetensors"
    ).read_bytes()


def test_a_result_in_shards_loads_in_stock_transformers(tmp_path):
    base = write_base(tmp_path / "base", "qwen3", torch.bfloat16)
    upcycle(base, tmp_path / "moe", experts=3, max_shard_bytes=30_000)
    assert len(list((tmp_path / "moe").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits(tmp_path / "moe", tokens()), logits(base, tokens()), rtol=0, atol=1e-5)


def test_a_bf16_base_stays_bf16(tmp_path):
    base = write_base(tmp_path / "base", "mistral", torch.bfloat16)
    upcycle(base, tmp_path / "moe")
    with CheckpointReader(tmp_path / "moe") as reader:
        assert {spec.dtype for spec in reader.specs.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == torch.bfloat16


def test_probes_of_ones_own_are_used(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    assert upcycle(base, tmp_path / "moe", probes=tokens(11, 5)).probe_shape == (5, 11)


def test_one_expert_a_token_is_noted_as_untrainable_by_the_language_model_loss(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    report = upcycle(base, tmp_path / "moe", top_k=1)
    assert "gives the router no gradient" in report.notes[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() < 1e-7


def test_nothing_is_left_when_the_proof_fails(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    with pytest.raises(StepZeroError, match="nothing was written"):
        upcycle(base, tmp_path / "moe", tolerance=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_weights_that_give_nan_do_not_pass_the_proof(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepZeroError):
        upcycle(base, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_old_rotary_buffers_and_a_stored_tied_head_are_ignored(tmp_path):
    base = write_base(tmp_path / "base", "llama tied")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert upcycle(base, tmp_path / "moe").max_abs_delta <= 1e-5


def test_an_old_config_without_rope_parameters_is_read_right(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (base / "config.json").write_text(json.dumps(config))
    assert upcycle(base, tmp_path / "moe").max_abs_delta <= 1e-5
    stored = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert stored["rope_theta"] == 777.0 and stored["rope_scaling"]["factor"] == 2.0
    torch.testing.assert_close(logits(tmp_path / "moe", tokens()), logits(base, tokens()), rtol=0, atol=1e-5)


def test_qwen2_with_a_sliding_window_in_every_layer_keeps_it(tmp_path):
    torch.manual_seed(0)
    shape = {key: BASES["qwen2"].to_dict()[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = Qwen2Config(
        **shape,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert upcycle(tmp_path / "base", tmp_path / "moe").max_abs_delta <= 1e-5
    torch.testing.assert_close(
        logits(tmp_path / "moe", tokens()), logits(tmp_path / "base", tokens()), rtol=0, atol=1e-5
    )


def test_qwen2_that_mixes_windows_keeps_them_layer_by_layer(tmp_path):
    config = Qwen2Config(
        **{key: BASES["qwen2"].to_dict()[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")},
        vocab_size=VOCABULARY,
        num_hidden_layers=3,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    report = upcycle(tmp_path / "base", tmp_path / "moe")
    assert "transformers 4.57" in report.notes[0]
    torch.testing.assert_close(
        logits(tmp_path / "moe", tokens()), logits(tmp_path / "base", tokens()), rtol=0, atol=1e-5
    )


def test_widths_that_grouped_products_refuse_are_proved_and_said(tmp_path):
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=36, intermediate_size=37, num_hidden_layers=2,
                         num_attention_heads=4, head_dim=10)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    report = upcycle(tmp_path / "base", tmp_path / "moe", experts=3)
    assert report.max_abs_delta <= 1e-5 and 'experts_implementation="eager"' in report.notes[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, logits(tmp_path / "base", tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "qwen3"])
def test_layers_with_different_numbers_of_experts_open_in_our_own_class(tmp_path, name):
    base = write_base(tmp_path / "base", name)
    report = upcycle(base, tmp_path / "moe", experts=[3, 5])
    assert report.experts_per_layer == (3, 5) and "in no server" in report.notes[0]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == f"Layered{CLASSES[report.base_model_type]}ForCausalLM"
    output = model(tokens(), output_router_logits=True, labels=tokens())
    assert [layer.shape[1] for layer in output.router_logits] == [3, 5] and output.loss.isfinite()
    torch.testing.assert_close(output.logits, logits(base, tokens()), rtol=0, atol=1e-5)
    assert model.generate(tokens(5, 1), max_new_tokens=3, do_sample=False).shape == (1, 8)
    extract_base(tmp_path / "moe", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back", tokens()), logits(base, tokens()))


def test_one_number_for_all_layers_given_as_a_list_is_stock(tmp_path):
    base = write_base(tmp_path / "base", "mistral")
    assert upcycle(base, tmp_path / "moe", experts=[4, 4]).experts_per_layer is None
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "moe")).__name__ == "MixtralForCausalLM"


OWN_CODE = """
from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM):
    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.mark.parametrize("factor", [1, 2])
def test_trusted_code_of_a_base_is_what_the_proof_is_held_against(tmp_path, monkeypatch, factor):
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


def test_a_base_of_several_types_comes_back_with_each(tmp_path):
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert upcycle(base, tmp_path / "moe").base_types == {"model.norm.weight": "float32"}
    extract_base(tmp_path / "moe", tmp_path / "back")
    with CheckpointReader(base) as before, CheckpointReader(tmp_path / "back") as after:
        assert before.specs == after.specs


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
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "not run unless asked for"),
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
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        upcycle(base, tmp_path / "moe")
    assert not (tmp_path / "moe").exists() and not (tmp_path / "moe.partial").exists()


def test_a_missing_shard_is_named(tmp_path):
    base = write_base(tmp_path / "base", "llama", max_shard_size="20KB")
    missing = sorted(base.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=f"shard {missing.name} is missing"):
        upcycle(base, tmp_path / "moe")


def test_an_occupied_place_is_left_alone(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        upcycle(base, tmp_path / "moe")
    assert (tmp_path / "moe" / "precious").read_text() == "x"


def test_peak_memory_is_a_layer_above_the_base_file(tmp_path):
    """A base of 166 MB in 12 layers becomes 0.7 GB, in a process that grows by far less."""
    layers, width, inner = 12, 512, 1536
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    script = (
        "import resource, sys; from models.upcycle import upcycle; import models.upcycle as u\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig\n"
        "import transformers.models.mixtral.modeling_mixtral, transformers.models.llama.modeling_llama\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "upcycle(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "base"), str(tmp_path / "moe")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    grown = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    base_bytes = (tmp_path / "base" / "model.safetensors").stat().st_size
    moe_bytes = (tmp_path / "moe" / "model.safetensors").stat().st_size
    layer_bytes = 4 * (6 * 3 * width * inner + 4 * width * width)
    assert moe_bytes > 3 * base_bytes
    assert grown < base_bytes + 2 * layer_bytes + 64e6, (grown, base_bytes, layer_bytes)


@pytest.mark.parametrize("named", ["file", "directory"])
def test_a_gguf_base_is_upcycled_from_its_dequantised_weights(tmp_path, named):
    (tmp_path / "base").mkdir()
    path = tmp_path / "base" / "tiny.gguf"
    write_gguf(path)
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    report = upcycle(path if named == "file" else path.parent, tmp_path / "moe", experts=3)
    assert report.max_abs_delta <= 1e-5 and report.base_model_type == "llama"
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "moe", tokens()), base(tokens()).logits, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["rope_theta"] == 20000.0
    assert AutoTokenizer.from_pretrained(tmp_path / "moe").vocab_size == VOCABULARY
    extract_base(tmp_path / "moe", tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "back", tokens()), base(tokens()).logits)
