"""Upcycling: equal at step 0 for every family, streamed and reproducible (refusals: test_upcycle_refusals.py)."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config

from eclectus.models.checkpoints.tensor_files import INDEX, CheckpointReader
from eclectus.models.mixture.export import extract_base
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import BASES, VOCABULARY, logits, tokens, write_base, write_gguf

CLASSES = {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}


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


def test_the_directory_is_complete_and_records_how_it_was_made(tmp_path):
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
def test_the_config_has_the_keys_that_both_transformers_generations_and_servers_read(tmp_path, name):
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


def test_noise_is_verified_by_expert_zero_alone_and_changes_the_others_a_little(tmp_path):
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


def test_given_probes_are_used(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    assert upcycle(base, tmp_path / "moe", probes=tokens(11, 5)).probe_shape == (5, 11)


def test_one_expert_per_token_is_noted_as_untrainable_by_the_language_model_loss(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    report = upcycle(base, tmp_path / "moe", top_k=1)
    assert "gives the router no gradient" in report.notes[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() < 1e-7


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


def test_widths_that_grouped_products_refuse_are_verified_and_noted(tmp_path):
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=36, intermediate_size=37, num_hidden_layers=2,
                         num_attention_heads=4, head_dim=10)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    report = upcycle(tmp_path / "base", tmp_path / "moe", experts=3)
    assert report.max_abs_delta <= 1e-5 and 'experts_implementation="eager"' in report.notes[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", experts_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, logits(tmp_path / "base", tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "qwen3"])
def test_layers_with_different_numbers_of_experts_load_in_our_own_class(tmp_path, name):
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


def test_a_base_of_several_dtypes_keeps_each(tmp_path):
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(32)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert upcycle(base, tmp_path / "moe").base_types == {"model.norm.weight": "float32"}
    extract_base(tmp_path / "moe", tmp_path / "back")
    with CheckpointReader(base) as before, CheckpointReader(tmp_path / "back") as after:
        assert before.specs == after.specs


@pytest.mark.slow
def test_peak_memory_is_a_layer_above_the_base_file(tmp_path):
    """A base of 166 MB in 12 layers becomes 0.7 GB, in a process that grows by far less."""
    layers, width, inner = 12, 512, 1536
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    script = (
        "import resource, sys; from eclectus.models.mixture.upcycle import upcycle\n"
        "import eclectus.models.mixture.upcycle as u\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig\n"
        "import transformers.models.mixtral.modeling_mixtral, transformers.models.llama.modeling_llama\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "upcycle(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    root = Path(__file__).resolve().parents[3]
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
