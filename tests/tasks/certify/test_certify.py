"""An export is certified with a table in its card and a step in the lineage; a damaged one fails."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config

from eclectus.flows.cli.main import main
from eclectus.models.mixture.upcycle import upcycle
from eclectus.storage.home import Home
from eclectus.tasks.certify.prompts import held_out_texts, make_prompts
from eclectus.tasks.export import model_card as card
from eclectus.tasks.export.model_card import Origin
from tests.support import tokenizers
from tests.support.checkpoint_kinds import KINDS
from tests.support.command_line import run_command
from tests.support.dense_bases import dense
from tests.support.small_world import make_world
from tests.support.tokenizers import change

LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
LINEAR |= {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w2.weight"


def eclectus(capsys, *words):
    code, *said = run_command(capsys, *words)
    return code, "".join(said)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that copies an export of a mixture whose experts differ, and the mixture itself."""
    root = tmp_path_factory.mktemp("exported")
    dense(root / "base")
    upcycle(root / "base", root / "moe", experts=3, init="drop")
    main(["--home", str(root / "none"), "export", str(root / "moe"), str(root / "out")])

    def copy(place):
        return shutil.copytree(root / "out", place), root / "moe"

    return copy


def test_an_export_is_certified_in_card_lineage_and_exit_code(servers_here, exported, tmp_path, capsys):
    out, _ = exported(tmp_path / "out")
    Home.open(tmp_path / "home")
    home = ("--home", tmp_path / "home")
    for _ in range(2):
        code, said = eclectus(capsys, *home, "certify", out)
    assert code == 0 and "transformers-5 5." in said and f"{out}: certified" in said
    assert "vllm: not certified: cannot be installed: no network" in said
    assert "llama.cpp: not certified: refuses the model: wrong number of tensors" in said
    card = (out / "README.md").read_text()
    assert card.count("## Served by") == 1 and card.startswith("---") and "| transformers-4.57 |" in card
    asked = "select name, value, tags['server'] as server from metrics where name = 'certified' order by server"
    code, said = eclectus(capsys, *home, "sql", asked, "--json")
    assert [json.loads(line)["value"] for line in said.splitlines()] == [1.0] * 4
    asked = "select a.statistics->'certified' as it from steps s join step_outputs using (step) "
    asked += "join artifacts a using (artifact) where s.name = 'certify'"
    assert [json.loads(line)["it"] for line in eclectus(capsys, *home, "sql", asked, "--json")[1].splitlines()]


def test_a_server_that_is_named_must_answer(servers_here, exported, tmp_path, capsys, monkeypatch):
    exported(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for servers, expected in (("transformers-5", 0), ("transformers-5,vllm", 1), ("llama.cpp", 1)):
        code, said = eclectus(capsys, "--home", tmp_path / "none", "certify", "out", "--servers", servers)
        assert code == expected and ("NOT CERTIFIED" in said) is bool(expected)
    assert not (tmp_path / "none").exists()
    code, said = eclectus(capsys, "certify", "out", "--servers", "tgi")
    assert code == 2 and len(said.splitlines()) == 1 and "'tgi'" in said


def rewrite(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def scale(name, factor):
    def edit(tensors):
        tensors[name] *= factor

    return edit


def remove(name):
    return lambda tensors: tensors.pop(name)


DAMAGES = {
    "an expert, by 1%": lambda out: rewrite(out / "model.safetensors", scale(EXPERT, 1.01)),
    "a norm, by 1%": lambda out: rewrite(out / "model.safetensors", scale("model.norm.weight", 1.01)),
    "a missing tensor": lambda out: rewrite(out / "model.safetensors", remove(EXPERT)),
    "scaled positions": lambda out: change(out / "config.json", lambda it: it.update(LINEAR)),
    "another tokenizer": lambda out: tokenizers.byte_level(out, template="<s> $A"),
    "epsilon": lambda out: change(out / "config.json", lambda it: it.update(rms_norm_eps=1e-2)),
    "experts per token": lambda out: change(out / "config.json", lambda it: it.update(num_experts_per_tok=1)),
    "a merge": lambda out: change(out / "tokenizer.json", lambda it: it["model"]["merges"].reverse()),
    "a missing template": lambda out: (out / "generation_config.json").unlink(),
    "code": lambda out: (out / "modeling.py").write_text("print('run')"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_fails_and_names_the_file(servers_here, exported, tmp_path, capsys, damage):
    out, _ = exported(tmp_path / "out")
    DAMAGES[damage](out)
    code, said = eclectus(capsys, "--home", tmp_path / "none", "certify", out)
    assert code == 1 and "NOT CERTIFIED: " in said and "export" in said
    assert "**Not certified**" in (out / "README.md").read_text()
    for words in ((), ("--format", "gguf")):
        code, said = eclectus(capsys, "--home", tmp_path / "none", "export", out, tmp_path / "again", *words)
        assert code == 2 and len(said.splitlines()) == 1 and not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("an expert, by 1%", "difference of log-probabilities"),
        ("a norm, by 1%", "is not the base's any more"),
        ("epsilon", "difference of log-probabilities"),
        ("experts per token", "difference of log-probabilities"),
        ("scaled positions", "difference of log-probabilities"),
        ("another tokenizer", "its tokenizer reads other tokens in en, "),
        ("a missing tensor", "block_sparse_moe.experts.1.w2"),
    ],
)
def test_without_a_seal_damage_shows_against_the_checkpoint_that_it_was_made_of(
    servers_here, exported, tmp_path, capsys, damage, named
):
    out, made_of = exported(tmp_path / "out")
    (out / "export.json").unlink()
    words = ("--home", tmp_path / "none", "certify", out, "--servers", "transformers-5")
    code, said = eclectus(capsys, *words, "--against", made_of)
    assert code == 0 and str(made_of) in said
    DAMAGES[damage](out)
    code, said = eclectus(capsys, *words, "--against", made_of)
    assert code and [line for line in said.splitlines() if named in line], said


def test_a_gguf_export_is_compared_with_the_checkpoint_that_it_was_made_of(servers_here, exported, tmp_path, capsys):
    """llama.cpp refuses everything here; what it says of real files is in test_servers.py."""
    _, moe = exported(tmp_path / "unused")
    out, home = tmp_path / "gguf", ("--home", tmp_path / "none")
    assert eclectus(capsys, *home, "export", moe, out, "--format", "gguf")[0] == 0
    code, said = eclectus(capsys, *home, "certify", out)
    assert code == 2 and len(said.splitlines()) == 1 and "--against" in said
    code, said = eclectus(capsys, *home, "certify", out, "--against", moe, "--servers", "llama.cpp,vllm")
    assert code == 1 and "llama.cpp: not certified: refuses" in said and "vllm: not certified: reads no GGUF" in said
    assert f"compared with {moe}" in said
    [file] = out.glob("*.gguf")
    code, said = eclectus(capsys, *home, "certify", file, "--against", moe)
    assert code == 2 and f"certify {out}" in said
    with file.open("r+b") as changed:
        changed.seek(-8, 2)
        changed.write(b"12345678")
    code, said = eclectus(capsys, *home, "certify", out, "--against", moe)
    assert code == 1 and f"NOT CERTIFIED: {file.name} is not what was exported" in said


def test_without_a_seal_the_original_weights_are_known_by_their_digest(servers_here, exported, tmp_path, capsys):
    out, _ = exported(tmp_path / "out")
    (out / "export.json").unlink()
    DAMAGES["a norm, by 1%"](out)
    code, said = eclectus(capsys, "--home", tmp_path / "none", "certify", out)
    assert code == 1 and "is not the base's any more" in said


def test_the_tolerance_decides(servers_here, exported, tmp_path, capsys):
    out, made_of = exported(tmp_path / "out")
    (out / "export.json").unlink()
    rewrite(out / "model.safetensors", scale(EXPERT, 1.0001))
    words = ("--home", tmp_path / "none", "certify", out, "--servers", "transformers-5", "--against", made_of)
    assert eclectus(capsys, *words, "--tolerance", "1e-9")[0] == 1
    assert eclectus(capsys, *words, "--tolerance", "1e-2")[0] == 0
    code, said = eclectus(capsys, *words, "--tolerance", "0")
    assert code == 2 and "--tolerance is 0" in said


def test_an_artifact_and_its_rounded_export_are_compared_with_the_artifact(servers_here, exported, tmp_path, capsys):
    _, moe = exported(tmp_path / "unused")
    home = Home.open(tmp_path / "home")
    with home.store.draft("checkpoint") as draft:
        shutil.copytree(moe, draft.path, dirs_exist_ok=True)
        artifact = home.store.commit(draft)
    words = ("--home", home.root)
    code, said = eclectus(capsys, *words, "certify", artifact.name, "--servers", "transformers-5")
    assert code == 0 and f"{artifact.name}: certified" in said
    code, _ = eclectus(capsys, *words, "export", artifact.name, tmp_path / "narrow", "--dtype", "bfloat16")
    assert code == 0 and "## Served by" in (tmp_path / "narrow" / "README.md").read_text()
    code, said = eclectus(capsys, *words, "certify", tmp_path / "narrow", "--servers", "transformers-5")
    assert code == 0 and f"compared with {artifact.name}" in said
    assert "in float32: certified" in said and "in bfloat16: certified" in said


def test_a_qwen2_mixture_is_not_certified_for_llama_cpp_with_the_reason(servers_here, tmp_path, capsys):
    upcycle(dense(tmp_path / "base", Qwen2Config), tmp_path / "moe", experts=2)
    code, said = eclectus(
        capsys, "--home", tmp_path / "none", "certify", tmp_path / "moe", "--servers", "transformers-5,llama.cpp"
    )
    assert code == 1 and "llama.cpp: not certified: " in said and "is a Qwen2Moe" in said
    assert "transformers-5 5." in said and "has no seal" in said


def test_what_no_server_runs_is_refused_in_one_line(tmp_path, capsys):
    lory, _ = KINDS["lory"].make(tmp_path)
    for name in (lory, tmp_path / "nothing"):
        code, said = eclectus(capsys, "--home", tmp_path / "none", "certify", name)
        assert code == 2 and len(said.splitlines()) == 1


def test_held_out_text_of_the_run_is_among_the_prompts(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    made = [{"name": "split", "artifact": world.documents.digest}]
    monkeypatch.setattr(card, "origin_of", lambda home, digest: Origin(steps=made))
    texts = held_out_texts(SimpleNamespace(store=world.store), "0" * 64)
    assert texts and all(name.startswith("held-out ") and 0 < len(text) <= 200 for name, text in texts.items())
    tokenizer = AutoTokenizer.from_pretrained(world.tokenizer.path)
    prompts = make_prompts(tokenizer, len(tokenizer), 30, texts)
    assert {prompt.name for prompt in prompts} >= {"en", "el", "code", *texts}
    assert all(0 < len(prompt.ids) <= 30 and prompt.text for prompt in prompts)
    monkeypatch.setattr(card, "origin_of", lambda home, digest: Origin())
    assert held_out_texts(SimpleNamespace(store=world.store), "0" * 64) == {}


@pytest.mark.parametrize("how", ["another file", "a changed file", "code of a hub", "a tokenizer's code"])
def test_code_that_is_not_ours_is_named_and_not_run(servers_here, exported, tmp_path, capsys, how):
    out, moe = exported(tmp_path / "out")
    (out / "export.json").unlink()
    named = {"another file": "evil.Model", "code of a hub": "a/b--layered.Model"}.get(how, "layered.Model")
    change(out / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": named}))
    if how in ("another file", "a changed file"):
        (out / f"{named.partition('.')[0]}.py").write_text("raise SystemExit")
    if how == "a tokenizer's code":
        change(out / "tokenizer_config.json", lambda it: it.update(auto_map={"AutoTokenizer": [None, "a/b--c.Words"]}))
    for against in ((), ("--against", moe)):
        code, said = eclectus(capsys, "certify", out, *against)
        assert code == 2 and "it is not run" in said
