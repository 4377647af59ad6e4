"""A Lory model exported to a stock LLaMA, and a Lory checkpoint opened in another process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from eclectus.models import LoryForCausalLM
from eclectus.models.pretraining.export_dense import export_dense, mean_routing_weights, prompt_routing_weights
from eclectus.models.pretraining.routing_profiles import write_profiles
from tests.models.lory.test_model import SHAPE, T, llama, lory, tokens

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_a_stock_llama_with_prompt_routings_logits(tmp_path, tied):
    model, ids = lory(tie_word_embeddings=tied), tokens(1, 2 * T + 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    returned = export_dense(model, tmp_path, prompt_ids=ids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    longer = torch.cat([ids, tokens(1, T, seed=5)], dim=1)
    expected = model(longer, expert_weights=prompt_routing_weights(model, ids)).logits
    for dense in (returned, loaded):
        assert (dense(longer).logits - expected).abs().max() <= 1e-5
    arguments = dict(max_new_tokens=2 * T, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(loaded.generate(ids, **arguments), model.generate(ids, **arguments))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_export_by_a_domains_mean_weights_equals_those_weights_everywhere(tmp_path):
    model, ids = lory(), tokens(2, 3 * T)
    weights = mean_routing_weights(model, [tokens(4, 2 * T, seed=3)])
    export_dense(model, tmp_path, weights=weights)
    dense = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (dense(ids).logits - model(ids, expert_weights=weights).logits).abs().max() <= 1e-5


def test_the_export_names_rotary_settings_for_both_transformers_and_nothing_of_lory(tmp_path):
    model = lory(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5000.0))
    export_dense(model, tmp_path, prompt_ids=tokens(1, T))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5000.0
    assert written["rope_scaling"] == dict(rope_type="linear", factor=2.0)
    assert not {"num_experts", "segment_length", "auto_map", "routing"} & set(written)
    ids = tokens(1, T)
    dense = LlamaForCausalLM.from_pretrained(tmp_path)
    expected = model(ids, expert_weights=prompt_routing_weights(model, ids)).logits
    assert (dense(ids).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("fields", [dict(num_experts=1), dict(routing="dense")])
def test_a_dense_model_exports_without_weights(tmp_path, fields):
    model, ids = lory(**fields), tokens(2, T)
    export_dense(model, tmp_path)
    assert (LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits - model(ids).logits).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="has no routing: num_experts"):
        mean_routing_weights(model, [ids])


def test_exactly_one_set_of_weights_to_merge_by_must_be_given(tmp_path):
    model = lory()
    for arguments in ({}, dict(prompt_ids=tokens(1, 3), weights=torch.rand(2, 4))):
        with pytest.raises(
            ValueError,
            match=r"needs one of domain, language, prompt, prompt_ids, weights.*got (none|prompt_ids and weights)",
        ):
            export_dense(model, tmp_path, **arguments)
    with pytest.raises(ValueError, match="but got 2; give one prompt"):
        export_dense(model, tmp_path, prompt_ids=tokens(2, 3))


def test_a_prompt_as_text_or_a_domain_uses_the_models_own_folder(tmp_path):
    model, ids = lory(), torch.tensor([[5, 6, 7]])
    save_with_tokenizer(model, tmp_path / "lory")
    weights = mean_routing_weights(model, [tokens(4, 2 * T, seed=3)])
    write_profiles(tmp_path / "lory", {"domain": {"legal": weights.tolist()}, "language": {}})
    loaded = LoryForCausalLM.from_pretrained(tmp_path / "lory")
    for arguments, same in (
        (dict(prompt="w5 w6 w7"), dict(prompt_ids=ids)),
        (dict(domain="legal"), dict(weights=weights)),
    ):
        out = tmp_path / next(iter(arguments))
        export_dense(loaded, out, **arguments)
        expected = export_dense(model, tmp_path / "same", **same)(ids).logits
        torch.testing.assert_close(LlamaForCausalLM.from_pretrained(out)(ids).logits, expected)
        assert AutoTokenizer.from_pretrained(out)("w5 w6")["input_ids"] == [5, 6]
    with pytest.raises(ValueError, match="has no domain 'code'; it has legal"):
        export_dense(loaded, tmp_path / "x", domain="code")
    with pytest.raises(ValueError, match="has no language 'el'; it has none"):
        export_dense(loaded, tmp_path / "x", language="el")
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        export_dense(model, tmp_path / "x", domain="legal")
    (tmp_path / "lory" / "routing_weights.json").unlink()
    with pytest.raises(ValueError, match="has no routing weights by domain"):
        export_dense(loaded, tmp_path / "x", domain="legal")


def save_with_tokenizer(model, path):
    vocabulary = {f"w{index}": index for index in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(path)
    model.save_pretrained(path)
    return path


CLEAN = """
import sys, torch
from transformers import AutoModelForCausalLM, pipeline
{setup}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], {arguments})
print(type(model).__module__)
print(pipeline("text-generation", model=sys.argv[1], {arguments})(
    "w5 w6 w7", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"])
print(model(torch.arange(2, 30)[None]).logits.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "arguments", "module"),
    [
        ("import eclectus.models", "", "eclectus.models.lory.model"),
        ("", "trust_remote_code=True", "transformers_modules"),
    ],
)
def test_a_clean_process_loads_and_generates(tmp_path, setup, arguments, module):
    model = lory()
    path = save_with_tokenizer(model, tmp_path / "checkpoint")
    command = [sys.executable, "-c", CLEAN.format(setup=setup, arguments=arguments), str(path)]
    environment = dict(PYTHONPATH=str(ROOT) if setup else "", HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **environment}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    loaded_from, generated, logits = result.stdout.strip().splitlines()[-3:]
    assert loaded_from.startswith(module)
    new = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, attention_mask=torch.ones(1, 3))
    assert generated.split() == [f"w{token}" for token in new[0, 3:].tolist()]
    assert float(logits) == pytest.approx(model(torch.arange(2, 30)[None]).logits.double().sum().item(), abs=1e-3)


def test_the_checkpoint_carries_its_code(tmp_path):
    lory().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"]["AutoModelForCausalLM"] == "model.LoryForCausalLM"
    assert written["auto_map"]["AutoConfig"] == "config.LoryConfig"
    assert {"model.py", "merge.py", "ffn.py", "routing.py"} <= {path.name for path in tmp_path.iterdir()}
    assert llama().config.model_type == "llama"
