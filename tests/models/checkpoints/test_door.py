"""The door into models: what passes is the very model of the files, and what does not is named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from eclectus.models import LoryConfig, LoryForCausalLM
from eclectus.models.checkpoints.dense_base import open_base
from eclectus.models.checkpoints.door import check_checkpoint, check_contents, open_model, read_transformers_config
from eclectus.models.checkpoints.expected_tensors import expected_tensors
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.extension.methods import open_method, save_method
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import BASES, VOCABULARY, logits, tokens, write_base
from tests.support.mutations import some_changes, write_json

# Fields in which another value is another model that somebody may have meant; nothing in the files contradicts it.
MEANT = ("rope_theta", "factor", "high_freq_factor", "original_max_position_embeddings", "sliding_window")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_base(folder / name.replace(" ", "-"), name) for name in BASES}


@pytest.fixture
def base(bases, tmp_path):
    """A copy of an untied Llama that a test may damage."""
    return shutil.copytree(bases["llama"], tmp_path / "base")


def change(base, **changes):
    path = base / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def change_weights(base, edit):
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", BASES)
def test_a_base_of_every_family_opens_as_transformers_opens_it(bases, name):
    assert check_checkpoint(bases[name], to_upcycle=True).kind == "dense"
    with torch.no_grad():
        assert torch.equal(open_model(bases[name])(input_ids=tokens()).logits, logits(bases[name], tokens()))
    ours, theirs = read_transformers_config(bases[name]).to_dict(), AutoConfig.from_pretrained(bases[name]).to_dict()
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 10}, {"attention_bias": True}])
def test_the_expected_tensors_are_those_of_the_class(name, changes):
    config = BASES[name].to_dict() | changes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(BASES[name]).from_dict(config))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    ours = expected_tensors(config, config["model_type"], None)
    assert {key: shape for key, (shape, _) in ours.items()} == theirs


@pytest.mark.parametrize(("name", "experts"), [("llama", 3), ("qwen2", 2), ("qwen3 tied", 3), ("mistral", [2, 4])])
def test_mixtures_pass_the_door_and_lose_no_tensor(bases, tmp_path, name, experts):
    upcycle(bases[name], tmp_path / "moe", experts=experts)
    assert check_checkpoint(tmp_path / "moe").kind == "mixture"
    with torch.no_grad():
        found = open_model(tmp_path / "moe")(input_ids=tokens()).logits
    torch.testing.assert_close(found, logits(bases[name], tokens()), rtol=0, atol=1e-4)
    change_weights(tmp_path / "moe", lambda weights: weights.pop(next(key for key in weights if "experts.1" in key)))
    with pytest.raises(ValueError, match=r"lacks 1 tensors that its class has, first .*experts\.1"):
        open_model(tmp_path / "moe")


@pytest.mark.parametrize("experts", [1, 3])
def test_lory_models_pass_the_door_and_lose_no_tensor(bases, tmp_path, experts):
    dense = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    lory = LoryForCausalLM.from_dense(dense, num_experts=experts, segment_length=8)
    lory.save_pretrained(tmp_path / "lory")
    assert check_checkpoint(tmp_path / "lory").kind == "lory"
    opened = open_model(tmp_path / "lory")
    assert isinstance(opened.config, LoryConfig)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=tokens()).logits, lory.eval()(input_ids=tokens()).logits)
    change_weights(tmp_path / "lory", lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors that its class has, first lm_head\.weight"):
        open_model(tmp_path / "lory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upcycled_from": "x"}, "upcycled_from is 'x'; expected an object"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4; expected at most the number of experts, 2"),
        ({"num_experts": 3}, "num_experts is 3; expected 4, as num_local_experts"),
        ({"experts_per_layer": [2, 10**12]}, "experts_per_layer is .*; expected a list of 2 numbers"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers is .*; expected an empty list"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; expected 1"),
        ({"model_type": 3}, "model_type is 3; expected one such as"),
        ({"experts_per_layer": [2]}, "experts_per_layer is .*; expected a list of 2 numbers"),
        ({"experts_per_layer": [2, 3]}, "the weights|its config says|holds .* tensors that its class does not know"),
    ],
)
def test_numbers_of_experts_that_cannot_be_meant_are_named(bases, tmp_path, changes, message):
    upcycle(bases["llama"], tmp_path / "moe", experts=[2, 4])
    change(tmp_path / "moe", **changes)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "moe")


def test_a_mixture_of_others_is_no_base(base):
    change(base, model_type="mixtral")
    with pytest.raises(ValueError, match=r"'mixtral' model; bases that can be upcycled: llama"):
        check_checkpoint(base, to_upcycle=True)
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json: .* missing tensors"):
        open_model(base)


@pytest.mark.parametrize("name", BASES)
def test_a_changed_config_gives_the_same_model_or_one_line_with_file_and_field(bases, tmp_path, name):
    base = shutil.copytree(bases[name], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    inputs = tokens(48, 2)
    expected = logits(bases[name], inputs)
    refused = 0
    for what, changed in some_changes(config, 60, seed=len(name)):
        write_json(base / "config.json", changed)
        field = what.partition(" = ")[0].split(".")[-1]
        try:
            model = open_model(base)
        except ValueError as error:
            message, refused = str(error), refused + 1
            assert "\n" not in message and str(base) in message, what
            assert field in message or field == "0", f"{what}: {message}"
            continue
        with torch.no_grad():
            same = torch.allclose(model(input_ids=inputs).logits, expected, rtol=0, atol=1e-5)
        assert same or field in MEANT, what
    assert refused > 25


HEADLESS = {"full": {}, "lora": {}, "llama_pro": {}, "moe_lpr": {}}


@pytest.mark.parametrize("method", HEADLESS)
def test_no_method_trains_a_base_without_its_output_layer(base, method):
    change_weights(base, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*lm_head\.weight.*random: set tie_word_embeddings"):
        open_method(method, base)


@pytest.mark.parametrize("method", HEADLESS)
def test_no_method_trains_a_base_with_an_output_layer_that_its_config_does_not_use(base, method):
    change(base, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings: true, but holds a lm_head\.weight that differs"):
        open_method(method, base)


def test_a_tied_base_may_hold_its_output_layer_a_second_time(bases, tmp_path):
    base = shutil.copytree(bases["qwen2 tied"], tmp_path / "base")
    change_weights(base, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    with torch.no_grad():
        assert torch.equal(open_model(base)(input_ids=tokens()).logits, logits(bases["qwen2 tied"], tokens()))
    upcycle(base, tmp_path / "moe", experts=2)
    with CheckpointReader(tmp_path / "moe") as reader:
        assert "lm_head.weight" not in reader.specs


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        (float("nan"), ("model.embed_tokens.weight", VOCABULARY - 1), r"embed_tokens\.weight holds NaN in row 95"),
        (float("inf"), ("lm_head.weight", 3), r"lm_head\.weight holds an infinity in row 3"),
        (-float("inf"), ("model.layers.1.mlp.up_proj.weight", 0), r"up_proj\.weight holds an infinity in row 0"),
    ],
)
def test_weights_that_are_not_finite_are_named_with_tensor_and_row(base, tmp_path, value, where, message):
    name, row = where
    change_weights(base, lambda weights: weights[name][row].fill_(value))
    for enter in (
        open_model,
        lambda path: upcycle(path, tmp_path / "moe"),
        lambda p: check_contents(check_checkpoint(p)),
    ):
        with pytest.raises(ValueError, match=message):
            enter(base)


def check_all(base):
    check_contents(check_checkpoint(base))


def test_finite_weights_whose_sum_overflows_pass(base):
    change_weights(base, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(3e38))
    check_contents(check_checkpoint(base))


def test_an_adapter_in_the_same_directory_is_not_loaded(base, bases):
    write_json(base / "adapter_config.json", {"base_model_name_or_path": "somebody/else", "peft_type": "LORA"})
    save_file({"x": torch.ones(1)}, base / "adapter_model.safetensors")
    save_file({"x": torch.ones(1)}, base / "consolidated.safetensors")
    with torch.no_grad():
        assert torch.equal(open_model(base)(input_ids=tokens()).logits, logits(bases["llama"], tokens()))


def test_a_generation_config_that_transformers_would_not_save_costs_no_training(base, tmp_path):
    write_json(base / "generation_config.json", {"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    save_method(open_method("full", base), tmp_path / "out", base)
    assert torch.equal(logits(tmp_path / "out", tokens()), logits(base, tokens()))


def adapter_alone(base):
    for path in list(base.iterdir()):
        path.unlink()
    write_json(base / "adapter_config.json", {"peft_type": "LORA"})


def emptied(base):
    for path in list(base.iterdir()):
        path.unlink()


def as_directory(base):
    (base / "config.json").unlink()
    (base / "config.json").mkdir()


def stored_as(kind):
    def store(base):
        change_weights(base, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].to(kind)}))

    return store


CASES = {
    "a class that nobody knows": (lambda b: change(b, model_type="nonsense"), "model_type 'nonsense' is no model"),
    "a multimodal wrapper": (lambda b: change(b, model_type="new_vl", text_config={}), "multimodal.*text_config"),
    "an encoder and decoder": (lambda b: change(b, is_encoder_decoder=True), "is_encoder_decoder"),
    "a classifier": (lambda b: change(b, architectures=["LlamaForTokenClassification"]), "architectures"),
    "bitsandbytes": (lambda b: change(b, quantization_config={"load_in_4bit": True}), "quantised"),
    "fp8 by config": (lambda b: change(b, quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "a quantization of no shape": (lambda b: change(b, quantization_config="int4"), "quantised"),
    "fp8 by weights": (stored_as(torch.float8_e4m3fn), "type F8_E4M3.*quantised"),
    "int8 weights": (stored_as(torch.int8), "int8, quantised"),
    "code of its own": (lambda b: change(b, auto_map={"AutoModel": "x.X"}), "auto_map"),
    "other layer types": (lambda b: change(b, layer_types=["full_attention"]), "layer_types.*a list of 2"),
    "scaling without factor": (lambda b: change(b, rope_scaling={"type": "linear"}), "rope_scaling.*lacks factor"),
    "scaling of no kind": (lambda b: change(b, rope_scaling={"type": "su", "factor": 2}), 'rope_type "su"'),
    "two rotary bases": (lambda b: change(b, rope_theta=5e5), "rope_theta of rotary positions twice"),
    "heads that do not divide": (lambda b: change(b, num_key_value_heads=3), "num_key_value_heads is 3"),
    "a width that does not divide": (lambda b: change(b, head_dim=None, num_attention_heads=6), "multiple"),
    "a larger vocabulary": (lambda b: change(b, vocab_size=VOCABULARY + 4), "vocab_size and hidden_size"),
    "a smaller vocabulary": (lambda b: change(b, vocab_size=VOCABULARY - 4), "vocab_size and hidden_size"),
    "a deeper config": (lambda b: change(b, num_hidden_layers=3), "num_hidden_layers is 3.* 2 layers"),
    "a shallower config": (lambda b: change(b, num_hidden_layers=1), "num_hidden_layers is 1.* 2 layers"),
    "padding outside": (lambda b: change(b, pad_token_id=VOCABULARY), "pad_token_id is 96, outside"),
    "an unknown activation": (lambda b: change(b, hidden_act="swiglu"), 'hidden_act is "swiglu"'),
    "numbers as text": (lambda b: change(b, hidden_size="32"), 'hidden_size is "32"'),
    "an adapter alone": (adapter_alone, "adapter.*merge"),
    "an empty directory": (emptied, "is empty"),
    "a directory for a file": (as_directory, "config.json is a directory"),
    "Latin-1": (lambda b: (b / "config.json").write_bytes(b'{"a": "\xe9"}'), "not UTF-8"),
    "a byte order mark": (lambda b: (b / "config.json").write_bytes(b"\xef\xbb\xbf{}"), "byte order mark"),
    "a list": (lambda b: (b / "config.json").write_text("[]"), "expected a JSON object"),
    "an empty file": (lambda b: (b / "config.json").write_text(""), "not JSON"),
    "nested too deeply": (lambda b: (b / "config.json").write_text("[" * 100_000), "not JSON"),
    "pickles": (lambda b: (b / "model.safetensors").rename(b / "pytorch_model.bin"), "pickled"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "neither model.safetensors nor"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_in_refuses_in_one_line_what_is_no_base(base, tmp_path, case):
    spoil, message = CASES[case]
    spoil(base)
    for enter in (
        lambda path: open_model(path) and open_base_alone(path),
        lambda path: check_checkpoint(path, to_upcycle=True),
        lambda path: upcycle(path, tmp_path / "moe"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            enter(base)
        assert "\n" not in str(caught.value) and str(base) in str(caught.value)


def open_base_alone(path):
    from contextlib import ExitStack

    with ExitStack() as stack:
        return open_base(path, stack)
