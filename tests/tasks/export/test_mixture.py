"""Export of mixtures: the card agrees with lineage, and a wrong argument is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclectus.models.mixture.upcycle import upcycle
from eclectus.storage.errors import EclectusError
from eclectus.tasks.export.mixture import export_mixture
from eclectus.tasks.export.model_card import Origin, model_card, origin_of
from eclectus.tasks.step import step
from tests.support.command_line import run_command
from tests.support.dense_bases import logits, tokens, write_base


def test_upcycle_and_export_from_the_command_line(capsys, tmp_path):
    base = write_base(tmp_path / "base", "qwen2", torch.bfloat16)
    home = ("--home", tmp_path / "home")
    code, said, _ = run_command(capsys, *home, "upcycle", base, tmp_path / "moe", "--experts", 3, "--top-k", 2)
    assert (
        code == 0
        and "qwen2 to qwen2_moe, 3 experts per layer, top 2" in said
        and "no logit differs by more than" in said
    )
    code, said, _ = run_command(capsys, *home, "export", tmp_path / "moe", tmp_path / "out", "--dtype", "float32")
    assert code == 0 and "Qwen2MoeForCausalLM" in said
    torch.testing.assert_close(logits(tmp_path / "out", tokens()), logits(base, tokens()), rtol=0, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "was not evaluated" in card
    assert json.loads((tmp_path / "out" / "upcycle.json").read_text())["base_digest"] in card
    code, said, _ = run_command(capsys, *home, "export", tmp_path / "out", tmp_path / "back", "--extract-base")
    assert code == 0 and "Qwen2ForCausalLM" in said
    before, after = (load_file(place / "model.safetensors") for place in (base, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["upcycle", "BASE", "BASE/config.json/OUT"], "cannot be created"),
        (["upcycle", "BASE", "OUT", "--experts", "many"], "--experts is 'many'"),
        (["upcycle", "BASE", "OUT", "--experts", "1"], "extension_experts"),
        (["upcycle", "BASE", "OUT", "--top-k", "9"], "top_k is 9: choose 1 to 6"),
        (["upcycle", "BASE", "OUT", "--experts", "4,4,4"], "names 3 layers, the base has 2"),
        (["upcycle", "/nowhere/at/all", "OUT"], "does not exist"),
        (["export", "BASE", "OUT", "--extract-base"], "which is a dense model; its options: --dtype"),
        (["export", "BASE", "OUT", "--language", "el"], "which is a dense model"),
        (["export", "BASE", "BASE"], "exists already"),
        (["export", "nothing-123", "OUT"], "'nothing-123' names no artifact"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(capsys, tmp_path, words, complaint):
    base = write_base(tmp_path / "base", "llama")
    words = [word.replace("BASE", str(base)).replace("OUT", str(tmp_path / "out")) for word in words]
    code, _, said = run_command(capsys, "--home", tmp_path / "home", *words)
    assert code == 2 and complaint in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_export_that_rounds_the_base_says_so_in_terminal_card_and_at_extraction(capsys, tmp_path):
    base = write_base(tmp_path / "base", "llama", torch.float32)
    home = ("--home", tmp_path / "home")
    run_command(capsys, *home, "upcycle", base, tmp_path / "moe", "--experts", 3)
    code, said, _ = run_command(capsys, *home, "export", tmp_path / "moe", tmp_path / "same")
    assert code == 0 and "note" not in said
    assert "unchanged from the dense model" in (tmp_path / "same" / "README.md").read_text()
    code, said, _ = run_command(capsys, *home, "export", tmp_path / "moe", tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0 and "bfloat16 rounds the original weights" in said and f"keep {tmp_path / 'moe'}" in said
    # Wider again, or exported once more, it stays rounded.
    run_command(capsys, *home, "export", tmp_path / "out", tmp_path / "again", "--dtype", "float32")
    for folder in ("out", "again"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "unchanged from" not in card and "--extract-base" not in card and "rounded to bfloat16" in card
        code, _, said = run_command(capsys, *home, "export", tmp_path / folder, tmp_path / "back", "--extract-base")
        assert code == 2 and "rounded to bfloat16" in said and "extract the base from the checkpoint" in said
        assert not (tmp_path / "back").exists()
    code, _, _ = run_command(capsys, *home, "export", tmp_path / "same", tmp_path / "back", "--extract-base")
    assert code == 0


def test_values_beyond_float16_are_refused_by_name(capsys, tmp_path):
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] = 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    words = ("--home", tmp_path / "home", "export", base, tmp_path / "out", "--dtype")
    code, _, said = run_command(capsys, *words, "float16")
    assert code == 2 and "model.embed_tokens.weight holds 9.98e+04, more than float16" in said
    assert not (tmp_path / "out").exists()
    assert run_command(capsys, *words, "float32")[0] == 0


@pytest.mark.parametrize("name", ["llama tied", "qwen3"])
def test_a_dense_model_is_exported_for_both_generations_with_a_card(capsys, tmp_path, name):
    base = write_base(tmp_path / "base", name, torch.bfloat16)
    code, said, _ = run_command(
        capsys, "--home", tmp_path / "home", "export", base, tmp_path / "out", "--dtype", "float32"
    )
    assert code == 0 and "ForCausalLM" in said and "its model card in README.md" in said
    assert torch.equal(logits(tmp_path / "out", tokens()), logits(base, tokens()))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["torch_dtype"] == "float32"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a dense model" in card and "stored in float32" in card and "Verification" not in card


@pytest.mark.parametrize(
    ("name", "setting", "value", "words"),
    [
        ("pretrain", "pretrain_stage", "dense", "the dense twin of a Lory model"),
        ("pretrain", "pretrain_stage", "dense_equal_flops", "as many FLOPs as a Lory model's"),
        ("extend", "extension_method", "full", "extended by full fine-tuning"),
        ("extend", "extension_method", "lora", "adapters merged into the weights"),
        ("extend", "extension_method", "llama_pro", "only the inserted blocks trained"),
    ],
)
def test_the_card_says_how_a_dense_model_was_made(name, setting, value, words):
    made = {"name": name, "label": value, "run": "r", "artifact": "a", "settings": {setting: value}, "statistics": {}}
    fetched = made | {"name": "fetch", "settings": {}}
    assert words in model_card("x", {"architectures": ["LlamaForCausalLM"]}, {}, Origin(steps=[fetched, made]))


def test_folders_left_by_killed_commands_are_named_and_stay(capsys, tmp_path):
    left = tmp_path / ".out.0123456789ab.partial"
    left.mkdir()
    (left / "file").write_text("")
    base = write_base(tmp_path / "base", "llama")
    code, said, _ = run_command(capsys, "--home", tmp_path / "home", "export", base, tmp_path / "out")
    assert code == 0 and str(left) in said and (left / "file").is_file()


@step(makes="checkpoint", version=1)
def base_model(settings, out) -> None:
    write_base(out.path, "mistral")


def test_the_card_is_written_from_lineage(run, tmp_path):
    from eclectus.storage.artifact import Artifact, Draft
    from eclectus.tasks.training.upcycle import UpcycleSettings
    from eclectus.tasks.training.upcycle import upcycle as upcycle_step

    @step(makes="evaluation", version=1)
    def evaluate(checkpoint: Artifact, settings: UpcycleSettings, out: Draft) -> None:
        out.file("score").write_text(str(settings.seed))
        out.statistics = {"bits_per_byte": {"language": {"en": 1.0 + settings.seed, "el": 2.0}}}

    dense = base_model(settings=UpcycleSettings())
    moe = upcycle_step(checkpoint=dense, settings=UpcycleSettings(extension_experts=3))
    evaluate(checkpoint=dense, settings=UpcycleSettings(seed=0))
    evaluate(checkpoint=moe, settings=UpcycleSettings(seed=1))
    origin = origin_of(run.home, moe.digest)
    assert [each["name"] for each in origin.steps] == ["base_model", "upcycle"]
    told = export_mixture(run.home, moe.name, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MixtralForCausalLM" in told
    assert "| en | new | 2.000 | 1.000 | 50.0% |" in card and "extension_experts 3" in card and "test-run" in card
    assert str(tmp_path) not in card


def test_a_base_that_was_trained_over_is_not_called_the_bases_own(home, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    upcycle(base, tmp_path / "moe", experts=3)
    path = tmp_path / "moe" / "upcycle.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"trained": [{"stage": "post_pretrain", "method": "moe_all"}]})
    )
    export_mixture(home, str(tmp_path / "moe"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "unchanged from the dense model" not in card and "SHA-256" not in card


def test_a_folder_without_a_model_is_named(home, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EclectusError, match="has no config"):
        export_mixture(home, str(tmp_path / "empty"), tmp_path / "out")


def test_a_mixture_leaves_as_gguf_with_a_card_and_qwen2_is_refused_in_one_line(capsys, tmp_path):
    home = ("--home", tmp_path / "home")
    for name in ("llama", "qwen2"):
        base = write_base(tmp_path / name, name)
        for path in base.glob("tokenizer*"):
            path.unlink()
        upcycle(base, tmp_path / f"{name}-moe", experts=2)
    out = tmp_path / "served"
    code, said, _ = run_command(capsys, *home, "export", tmp_path / "llama-moe", out, "--format", "gguf")
    assert code == 0 and f"{out}/served-F32.gguf: llama of" in said and "no logit differs by more than" in said
    assert "llama-server -m served-F32.gguf" in (out / "README.md").read_text()
    code, _, said = run_command(capsys, *home, "export", tmp_path / "qwen2-moe", tmp_path / "no", "--format", "gguf")
    assert code == 2 and len(said.splitlines()) == 1 and "transformers or vLLM" in said
    assert not (tmp_path / "no").exists()
    code, _, said = run_command(
        capsys, *home, "export", tmp_path / "llama-moe", tmp_path / "no", "--format", "gguf", "--extract-base"
    )
    assert code == 2 and len(said.splitlines()) == 1
