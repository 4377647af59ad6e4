"""A given model that a run cannot use is refused by its own name before the first step: no document is read."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from eclectus.flows.cli.main import main
from eclectus.flows.parameters import PARAMETERS
from eclectus.models.mixture.upcycle import upcycle
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from tests.support.dense_bases import logits, tokens, write_base, write_gguf

GIVEN = {"original_languages": ["en"], "expanded_languages": ["tr"], "instance_tokens": 64, "lory_segment": 16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A Llama of 128 positions and one of Qwen2, a mixture of the first, and the first without its output layer."""
    folder = tmp_path_factory.mktemp("bases")
    base, qwen = write_base(folder / "base", "llama"), write_base(folder / "qwen", "qwen2")
    upcycle(base, folder / "moe", experts=2)
    headless = shutil.copytree(base, folder / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    return {"base": base, "qwen": qwen, "moe": folder / "moe", "headless": headless}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLECTUS_HOME", str(tmp_path / "home"))
    return Home.open()


def refused(home, flow, message, **given):
    """Runs a flow and expects a refusal of one line, before any step has made anything."""
    documents = home.root / "documents.jsonl"
    documents.write_text('{"text": "the ship left the harbour", "language": "en"}\n')
    values = GIVEN | {"sources": [str(documents)]} | given
    kind = PARAMETERS[flow]
    parameters = kind(**{name: value for name, value in values.items() if name in kind.model_fields})
    with pytest.raises(EclectusError, match=message) as caught:
        getattr(importlib.import_module(f"eclectus.flows.{flow}"), flow).fn(parameters)
    assert "\n" not in str(caught.value)
    assert not list(home.store.all())


@pytest.mark.parametrize("flow", ["extend", "main", "evaluate", "similarity"])
@pytest.mark.parametrize("method", ["moe_lpr", "full", "lora", "llama_pro", "moe_all", "random_experts", "one_stage"])
def test_a_base_without_output_layer_is_refused_by_every_flow_and_method(home, bases, flow, method):
    if flow != "extend" and method not in ("moe_lpr", "lora"):
        return
    given = {"base_model": str(bases["headless"]), "extension_method": method}
    refused(home, flow, r"base model .*headless: .*lacks 1 tensors.*lm_head\.weight", **given)


def test_a_dense_start_without_output_layer_is_refused(home, bases):
    for flow in ("pretrain", "main"):
        refused(home, flow, r"dense_start .*headless: .*lm_head\.weight", dense_start=str(bases["headless"]))


@pytest.mark.parametrize("method", ["full", "lora", "llama_pro", "moe_all", "random_experts", "one_stage"])
def test_a_mixture_is_refused_by_methods_that_start_from_a_dense_model(home, bases, method):
    message = rf"extension_method {method} starts from a dense model, and base model .*moe is a mixture of experts"
    refused(home, "extend", message, base_model=str(bases["moe"]), extension_method=method)


def test_the_similarity_of_a_mixture_is_refused(home, bases):
    refused(home, "similarity", r"base model .*moe: .*mixture", base_model=str(bases["moe"]))


def test_a_dense_start_of_another_architecture_is_refused(home, bases):
    refused(home, "pretrain", r"dense_start .*qwen is a qwen2.*LLaMA-shaped", dense_start=str(bases["qwen"]))


@pytest.mark.parametrize("flow", ["extend", "main", "pretrain"])
def test_instances_longer_than_the_positions_are_refused(home, bases, flow):
    name = "dense_start" if flow == "pretrain" else "base_model"
    message = r"instance_tokens 256 is more than the 128 positions of .*base \(max_position_embeddings\); lower it"
    refused(home, flow, message, **{name: str(bases["base"]), "instance_tokens": 256})


def test_windows_longer_than_the_positions_are_refused(home, bases):
    for flow in ("main", "evaluate"):
        message = r"evaluation_tokens 256 is more than the 128 positions of .*base"
        refused(home, flow, message, base_model=str(bases["base"]), evaluation_tokens=256)


def test_what_is_not_there_is_refused(home, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(home, "extend", r"base model .*empty: .*is empty", base_model=str(tmp_path / "empty"))
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(home, "extend", r"base model .*model\.bin: .* is a file", base_model=str(tmp_path / "model.bin"))


def test_a_named_checkpoint_is_checked_before_documents_are_read(home, bases, tmp_path):
    other = Home.open(tmp_path / "other")
    with other.store.draft("checkpoint") as draft:
        shutil.copytree(bases["headless"], draft.path, dirs_exist_ok=True)
        made = other.store.commit(draft)
    given = {"evaluate_checkpoints": [made.path], "expanded_languages": []}
    refused(home, "evaluate", r"model .* lacks 1 tensors.*lm_head\.weight", **given)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_gguf_file_and_a_folder_with_one_are_the_same_base(home, tmp_path, form):
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "tiny.gguf"
    write_gguf(path)
    with home.store.draft("checkpoint") as draft:
        fetch.function(settings=FetchSettings(base_model=str(path if form == "file" else path.parent)), out=draft)
        made = home.store.commit(draft)
    main(["--home", str(home.root), "upcycle", str(path), str(tmp_path / "moe"), "--experts", "2"])
    assert (logits(made.path, tokens()) - logits(tmp_path / "moe", tokens())).abs().max() <= 1e-4


def test_a_command_names_what_is_wrong_in_one_line(home, bases, tmp_path, capsys):
    base = shutil.copytree(bases["base"], tmp_path / "base")
    (base / "model.safetensors.index.json").write_text("\n")
    with pytest.raises(SystemExit):
        main(["--home", str(home.root), "upcycle", str(base), str(tmp_path / "moe")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.safetensors.index.json is not JSON" in said
    assert not (tmp_path / "moe").exists()


def test_a_fetched_folder_holds_no_stray_weights_and_no_adapter(home, bases, tmp_path):
    base = shutil.copytree(bases["base"], tmp_path / "base")
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    shutil.copyfile(base / "model.safetensors", base / "consolidated.safetensors")
    with home.store.draft("checkpoint") as draft:
        fetch.function(settings=FetchSettings(base_model=str(base)), out=draft)
        made = home.store.commit(draft)
    assert not {"adapter_config.json", "consolidated.safetensors"} & {path.name for path in made.file(".").iterdir()}
    assert (logits(made.path, tokens()) == logits(bases["base"], tokens())).all()
