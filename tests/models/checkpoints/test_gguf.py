"""A GGUF file holds the model that it was converted from, or is refused by the name of what is not read."""

import json
from contextlib import ExitStack

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from eclectus.models.checkpoints.dense_base import DenseBase, open_base
from eclectus.models.checkpoints.door import check_checkpoint
from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.gguf.reader import read_gguf
from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.checkpoints.tensor_files import CheckpointError
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import SHAPE, VOCABULARY, logits, tokens
from tests.support.gguf_files import metadata_of, rope_freqs, spread, tensors_of, write_file, write_model

BASE = 20000.0
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.finetuned": False,
}
FAR = {"max_position_embeddings": 131072}
LONG = {"max_position_embeddings": 256}


def model_of(kind: str = "llama", rope: dict | None = None, **changed):
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    own = {"num_key_value_heads": 2} | ({"head_dim": 16} if kind == "qwen3" else {})
    parameters = {"rope_type": "default", "rope_theta": BASE} | (rope or {})
    config = classes[kind](**{**SHAPE, **own, "rope_parameters": parameters, **changed})
    return spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


MODELS = {
    "llama": (model_of(), {}),
    "llama tied": (model_of(tie_word_embeddings=True), {}),
    "llama, wide heads": (model_of(head_dim=16), {}),
    "llama, old file without key_length": (
        model_of(),
        {"attention.key_length": None, "attention.value_length": None, "vocab_size": VOCABULARY},
    ),
    "llama, no head_count_kv": (model_of(num_key_value_heads=4), {"attention.head_count_kv": None}),
    "llama3, no divisor between": (
        model_of(rope={**LLAMA3, "high_freq_factor": 1.5, "original_max_position_embeddings": 60}, **LONG),
        {},
    ),
    "llama3, narrow": (model_of(rope={**LLAMA3, "original_max_position_embeddings": 100}, head_dim=16, **LONG), {}),
    "llama, default base": (model_of(rope={"rope_theta": 10000.0}), {"rope.freq_base": None}),
    "llama, linear": (
        model_of(rope={"rope_type": "linear", "factor": 4.0}, **LONG),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama, linear without a type": (
        model_of(rope={"rope_type": "linear", "factor": 4.0}, **LONG),
        {"rope.scaling.factor": 4.0},
    ),
    "llama, linear of 2023": (
        model_of(rope={"rope_type": "linear", "factor": 2.0}, **LONG),
        {"rope.scale_linear": 2.0},
    ),
    "llama, no scaling though a factor": (model_of(), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama, yarn": (model_of(rope=YARN, **LONG), YARN_KEYS),
    "llama3": (model_of(rope={**LLAMA3, "original_max_position_embeddings": 32}, **LONG), {}),
    "llama3, wide": (model_of(rope={**LLAMA3, "original_max_position_embeddings": 8192}, head_dim=64, **LONG), {}),
    "llama3, other settings": (
        model_of(
            rope={**LLAMA3, "high_freq_factor": 3.0, "factor": 32.0, "original_max_position_embeddings": 500},
            head_dim=64,
            **LONG,
        ),
        {},
    ),
    "qwen2": (model_of("qwen2"), {}),
    "qwen2, wide heads": (model_of("qwen2", head_dim=16), {}),
    "qwen2, yarn": (model_of("qwen2", rope=YARN, **LONG), YARN_KEYS),
    "qwen2, yarn with its own settings": (
        model_of("qwen2", rope={**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, **LONG),
        YARN_KEYS | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "qwen2, window as long as the context": (model_of("qwen2"), {"attention.sliding_window": 128}),
    "qwen3 tied": (model_of("qwen3", tie_word_embeddings=True), {"expert_count": 0, "attention.causal": True}),
    "qwen3, linear": (
        model_of("qwen3", rope={"rope_type": "linear", "factor": 4.0}, **LONG),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_base_computes_what_the_model_it_was_converted_from_computes(tmp_path, name):
    model, metadata = MODELS[name]
    scaled = {"rope_freqs.weight": rope_freqs(model)} if model.config.rope_parameters["rope_type"] == "llama3" else {}
    write_model(tmp_path / "base.gguf", model, metadata=metadata, tensors=scaled)
    report = upcycle(tmp_path / "base.gguf", tmp_path / "moe", experts=2)
    far = tokens(length=model.config.max_position_embeddings)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "moe", far), model(far).logits, rtol=0, atol=5e-5)
    assert report.reference_delta is not None and report.reference_delta <= 1e-4
    assert report.last_position == model.config.max_position_embeddings - 1


def test_llama3_settings_of_published_models_are_found_again(tmp_path):
    model = model_of(rope={**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}, head_dim=128, **FAR)
    write_model(tmp_path / "a.gguf", model, tensors={"rope_freqs.weight": rope_freqs(model)})
    assert read_gguf(tmp_path / "a.gguf").config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_tensors_and_config_are_those_that_transformers_reads(tmp_path, name):
    write_model(tmp_path / "a.gguf", model_of(name, **({"head_dim": 128} if name == "qwen3" else {})))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    ours = read_gguf(tmp_path / "a.gguf")
    for key, value in theirs.named_parameters():
        assert torch.equal(ours.tensors.tensor(key), value), key
    differs = {key for key, value in theirs.config.to_dict().items() if ours.config.to_dict().get(key) != value}
    # Theirs are the defaults of the class; ours are what the file says.
    assert differs <= {
        "quantization_config",
        "bos_token_id",
        "eos_token_id",
        "architectures",
        "_name_or_path",
        "head_dim",
        "dtype",
    }


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_matrices_are_read_as_the_gguf_package_dequantises_them(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    model = model_of(intermediate_size=64)
    write_model(tmp_path / "a.gguf", model, kind=kind)
    read = read_gguf(tmp_path / "a.gguf").tensors
    own = tensors_of(model)["blk.0.ffn_down.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(own, kind), kind)
    np.testing.assert_array_equal(read.tensor("model.layers.0.mlp.down_proj.weight").numpy(), expected)


def write_shards(folder, model, count):
    every = tensors_of(model)
    for number in range(count):
        part = {name: every[name] for name in list(every)[number::count]}
        path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        metadata = metadata_of(model) if number == 0 else {}
        write_file(path, "llama", metadata, part, VOCABULARY, split=(number, count, len(every)))


def test_shards_are_read_as_one_model(tmp_path):
    model = model_of()
    write_shards(tmp_path, model, 3)
    first = tmp_path / "m-00001-of-00003.gguf"
    upcycle(first, tmp_path / "moe", experts=2)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "moe", tokens()), model(tokens()).logits, rtol=0, atol=2e-5)
    with pytest.raises(CheckpointError, match=r"give the first, whose name ends in -00001-of-00003\.gguf"):
        read_gguf(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"shard m-00002-of-00003\.gguf is missing"):
        read_gguf(first)


def test_ids_of_special_tokens_are_the_files(tmp_path):
    ids = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6, "tokenizer.chat_template": "{{ hi }}"}
    write_model(tmp_path / "a.gguf", model_of(), general=ids)
    model = read_gguf(tmp_path / "a.gguf")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (5, 6)
    assert model.tokenizer.eos_token_id == 6 and model.tokenizer.chat_template == "{{ hi }}"


@pytest.mark.parametrize(
    ("split", "pieces"),
    {
        None: ["ab", "Ġ12345", "cd", "'", "LL"],
        "gpt-2": ["ab", "Ġ12345", "cd", "'", "LL"],
        "smollm": ["ab", "Ġ", "1", "2", "3", "4", "5", "cd", "'", "LL"],
        "llama-bpe": ["ab", "Ġ", "123", "45", "cd", "'LL"],
        "qwen2": ["ab", "Ġ", "1", "2", "3", "4", "5", "cd", "'LL"],
    }.items(),
)
def test_text_is_split_as_the_file_says(tmp_path, split, pieces):
    """tokenizer.ggml.pre against llama.cpp's patterns, by hand."""
    write_model(tmp_path / "a.gguf", model_of(), general={"tokenizer.ggml.pre": split} if split else {})
    backend = read_gguf(tmp_path / "a.gguf").tokenizer.backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab 12345cd'LL")] == pieces


REFUSED = {
    "a key that nobody reads": ({"metadata": {"attention.scale": 0.1}}, "attention.scale = 0.1"),
    "a foreign key": ({"general": {"acme.secret_sauce": 3}}, "acme.secret_sauce = 3"),
    "a tensor that nobody reads": ({"tensors": {"blk.0.attn_gate.weight": np.ones((4, 4), "f4")}}, "blk.0.attn_gate"),
    "a bias that the class lacks": ({"tensors": {"blk.0.ffn_up.bias": np.ones(48, "f4")}}, "ffn_up|mlp.up_proj.bias"),
    "longrope": ({"metadata": {"rope.scaling.type": "longrope"}}, "rope.scaling.type = longrope"),
    "longrope tensors": ({"tensors": {"rope_factors_long.weight": np.ones(4, "f4")}}, "rope_factors_long.weight"),
    "unknown divisors": ({"tensors": {"rope_freqs.weight": np.array([1, 3, 2, 5], "f4")}}, "rope_freqs.weight"),
    "divisors of another head": ({"tensors": {"rope_freqs.weight": np.array([1, 8], "f4")}}, "rope_freqs.weight"),
    "divisors and yarn": (
        {"metadata": YARN_KEYS, "tensors": {"rope_freqs.weight": np.array([1, 8, 8, 8], "f4")}},
        "both rope_freqs.weight and yarn",
    ),
    "a sliding window": ({"metadata": {"attention.sliding_window": 16}}, "attention.sliding_window = 16"),
    "partial rotation": ({"metadata": {"rope.dimension_count": 4}}, "rope.dimension_count is 4, the heads are 8 wide"),
    "values of another width": ({"metadata": {"attention.value_length": 4}}, "attention.value_length is 4"),
    "a mixture": ({"metadata": {"expert_count": 8, "expert_used_count": 2}}, "a mixture of 8 experts already"),
    "an adapter": ({"general": {"general.type": "adapter"}}, "a GGUF adapter, expected a whole model"),
    "another architecture": ({"architecture": "gemma2"}, "of architecture 'gemma2'"),
    "clamped attention": ({"metadata": {"attention.clamp_kqv": 8.0}}, "attention.clamp_kqv = 8.0"),
    "attention both ways": ({"metadata": {"attention.causal": False}}, "attention.causal = False"),
    "yarn with another extrapolation": (
        {"metadata": YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5}},
        "yarn_ext_factor",
    ),
    "heads that differ by layer": ({"metadata": {"attention.head_count_kv": [2, 1]}}, r"head_count_kv, has \[2, 1\]"),
    "no epsilon": ({"metadata": {"attention.layer_norm_rms_epsilon": None}}, "layer_norm_rms_epsilon, lacks it"),
    "a text where a number belongs": ({"metadata": {"block_count": "two"}}, "block_count, has two"),
    "more layers than tensors": ({"metadata": {"block_count": 3}}, "has 3 layers, its tensors are of 2"),
    "fewer layers than tensors": ({"metadata": {"block_count": 1}}, "has 1 layers, its tensors are of 2"),
    "other widths": ({"metadata": {"feed_forward_length": 40}}, "its config says"),
    "another vocabulary": ({"metadata": {"vocab_size": 90}}, "96 embeddings, a vocab_size of 90"),
    "more tokens than embeddings": ({"tokens": 100}, "and 100 tokens"),
    "an unknown split of text": ({"general": {"tokenizer.ggml.pre": "acme-bpe"}}, "tokenizer.ggml.pre = 'acme-bpe'"),
    "the default split, which nobody trains with": ({"general": {"tokenizer.ggml.pre": "default"}}, "pre = 'default'"),
    "big-endian": ({"endianness": gguf.GGUFEndian.BIG}, "big-endian"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, name):
    more, message = REFUSED[name]
    write_model(tmp_path / "a.gguf", model_of(), **more)
    with ExitStack() as stack, pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        open_base(tmp_path / "a.gguf", stack)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    write_model(tmp_path / "a.gguf", model_of(intermediate_size=64), kind=gguf.GGMLQuantizationType.Q8_0)
    content = (tmp_path / "a.gguf").read_bytes()
    name = b"blk.0.attn_v.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at] == gguf.GGMLQuantizationType.Q8_0
    (tmp_path / "a.gguf").write_bytes(content[:at] + bytes([gguf.GGMLQuantizationType.Q8_K]) + content[at + 1 :])
    with pytest.raises((UnsupportedModelError, CheckpointError), match=r"a\.gguf.*(Q8_K|shape)"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("kept", [0, 3, 20, 500, -10])
def test_a_file_that_is_cut_short_is_named(tmp_path, kept):
    write_model(tmp_path / "a.gguf", model_of())
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"a\.gguf cannot be read as GGUF"):
        read_gguf(tmp_path / "a.gguf")


def test_damaged_headers_end_in_one_named_error(tmp_path):
    write_model(tmp_path / "a.gguf", model_of(), metadata=YARN_KEYS)
    content = (tmp_path / "a.gguf").read_bytes()
    generator = np.random.default_rng(0)
    header = content.index(b"tokenizer.ggml.model")
    for number in range(60):
        changed = bytearray(content)
        for at in generator.integers(0, header, 2):
            changed[at] = generator.integers(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(bytes(changed))
        try:
            with ExitStack() as stack:
                open_base(path, stack)
        except (CheckpointError, UnsupportedModelError) as error:
            assert path.name in str(error), error
        path.unlink()


def test_the_proof_notices_scaling_that_the_conversion_dropped(tmp_path, monkeypatch):
    model, metadata = MODELS["qwen2, yarn"]
    write_model(tmp_path / "a.gguf", model, metadata=metadata)
    plain = {"rope_type": "default", "rope_theta": BASE}
    monkeypatch.setattr(
        "eclectus.models.checkpoints.gguf.reader.rope_parameters", lambda metadata, *_: _ask(metadata, plain)
    )
    with pytest.raises(StepZeroError, match=r"other rotary positions .* \(yarn\)"):
        upcycle(tmp_path / "a.gguf", tmp_path / "moe", experts=2)
    assert not (tmp_path / "moe").exists()


def _ask(metadata, result):
    for key in YARN_KEYS:
        metadata.get(key)
    metadata.get("rope.freq_base")
    return result


def test_the_proof_notices_rows_in_the_wrong_order(tmp_path, monkeypatch):
    write_model(tmp_path / "a.gguf", model_of())
    own = read_gguf

    def unordered(path):
        model = own(path)
        model.tensors._unpermuted = {}
        return model

    monkeypatch.setattr("eclectus.models.checkpoints.dense_base.read_gguf", unordered)
    with pytest.raises(StepZeroError, match="differs from its base's files"):
        upcycle(tmp_path / "a.gguf", tmp_path / "moe", experts=2)


def test_scaled_positions_reach_the_written_config_in_both_generations(tmp_path):
    model, metadata = MODELS["llama, yarn"]
    write_model(tmp_path / "a.gguf", model, metadata=metadata)
    upcycle(tmp_path / "a.gguf", tmp_path / "moe", experts=2)
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert written["rope_theta"] == BASE and written["rope_scaling"]["factor"] == 4.0
    assert written["rope_parameters"]["original_max_position_embeddings"] == 64


def test_the_door_names_what_is_wrong_with_a_gguf_file_from_its_header(tmp_path):
    write_model(tmp_path / "a.gguf", model_of(), metadata={"attention.scale": 0.1})
    with pytest.raises(UnsupportedModelError, match=r"attention\.scale"):
        check_checkpoint(tmp_path)
    write_model(tmp_path / "a.gguf", MODELS["llama, yarn"][0], metadata=YARN_KEYS)
    assert check_checkpoint(tmp_path).positions == 256


def test_a_folder_of_shards_is_one_model(tmp_path):
    write_shards(tmp_path, model_of(), 2)
    assert check_checkpoint(tmp_path).path.name == "m-00001-of-00002.gguf"
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "n-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match="name one of them"):
        check_checkpoint(tmp_path)


def test_a_saved_gguf_base_is_proved_against_the_file(tmp_path):
    write_model(tmp_path / "a.gguf", MODELS["llama, yarn"][0], metadata=YARN_KEYS)
    base = DenseBase.from_gguf(tmp_path / "a.gguf")
    (tmp_path / "out").mkdir()
    proof = base.save(tmp_path / "out")
    assert proof.max_abs_delta <= 5e-5 and proof.last_position == 255
    base.config_dict["rope_parameters"] = {"rope_type": "default", "rope_theta": BASE}
    with pytest.raises(StepZeroError, match="other rotary positions"):
        base.save(tmp_path / "out")
