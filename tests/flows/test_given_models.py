"""Models that exist already: each read with its own tokenizer, whatever it is named by; nothing is packed for them."""

from __future__ import annotations

import json
import random
import shutil

import pyarrow.parquet as pq
import pytest

import eclectus.flows.evaluate
from eclectus.flows.cli.main import main
from eclectus.flows.parameters import EvaluateParameters
from eclectus.flows.run import open_run
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.evaluation.evaluate import EvaluateSettings
from eclectus.tasks.packing.tokenizer import load_tokenizer
from tests.support.made_up_steps import make_up_steps, run, settings_of, write_inputs
from tests.support.small_world import write_model
from tests.support.tokenizers import byte_level, llama

WORDS = {
    "en": "the ship left harbour court heard owner rain fell village letter engine market bread coast dawn",
    "tr": "gemi liman sabah mahkeme dinledi sahibi yagmur koy mektup motor pazar ekmek kiyi ayrildi okudu",
}
GIVEN = {
    "language_detector": "field", "original_languages": ["en"], "expanded_languages": ["tr"], "heldout_minimum": 4,
    "lory_segment": 16, "training_workers": 0, "evaluation_samples": 1, "evaluation_sample_tokens": 2,
}  # fmt: skip


def write_sources(path):
    draw = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(draw.choices(WORDS[language].split(), k=60)), "language": language})
        for language in WORDS
        for _ in range(40)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def make_model(store, folder, seed, lory=False):
    """A tiny model with the tokenizer in a folder, as an artifact."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from eclectus.models import LoryForCausalLM
    from eclectus.models.checkpoints.tokenizer_files import vocabulary_size

    torch.manual_seed(seed)
    words = load_tokenizer(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip
    if lory:
        model = LoryForCausalLM.from_dense(model, num_experts=2, segment_length=24)
    return write_model(store, model, words)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Three models with two tokenizers: a folder, one of another home, and a Lory model of this home by its name."""
    folder = tmp_path_factory.mktemp("given")
    home, other = Home.open(folder / "home"), Home.open(folder / "other")
    foreign = make_model(other.store, llama(folder / "sentences"), 1)
    plain = shutil.copytree(make_model(other.store, byte_level(folder / "bytes"), 2).path, folder / "tiny-base")
    (plain / "manifest.json").unlink()
    lory = make_model(home.store, folder / "bytes", 3, lory=True)
    questions = [{"en": f"the ship {n}", "lang": "Turkish", "choices": ["gemi", "koy"], "label": 0} for n in range(3)]
    (folder / "translation_choice_tr.jsonl").write_text("\n".join(map(json.dumps, questions)))
    parameters = EvaluateParameters(
        **GIVEN,
        sources=[write_sources(folder / "documents.jsonl")],
        evaluate_checkpoints=[str(plain), foreign.path, lory.name],
        benchmark_files=[str(folder / "translation_choice_tr.jsonl")],
    )
    with open_run("evaluate", parameters, home) as opened:
        result = eclectus.flows.evaluate.evaluate.whole(parameters)
    steps = query(f"select name, label from steps where run = '{opened.id}' order by started", home)[1]
    names = ["tiny-base", foreign.name, lory.name]
    return {"home": home, "result": result, "steps": steps, "names": names, "parameters": parameters, "plain": plain}


def test_only_documents_are_read_and_no_tokenizer_is_trained(job):
    assert [name for name, _ in job["steps"]] == [
        "fetch", "ingest", "languages", "split", *["evaluate"] * 3, *["benchmark"] * 3, "report"
    ]  # fmt: skip
    assert not job["result"].left_out


def test_models_with_different_tokenizers_are_compared_on_the_same_bytes(job):
    tables = [pq.read_table(each.file("documents.parquet")) for each in job["result"].evaluations.values()]
    assert tables[0].num_rows == 8
    for each in tables[1:]:
        assert each.select(["document", "bytes"]).equals(tables[0].select(["document", "bytes"]))
    assert len({sum(each["tokens"].to_pylist()) for each in tables}) == 2
    page = job["result"].report.file("report.md").read_text("utf-8")
    assert "were not scored on the same tokens; each pair is compared in bits per byte" in page
    assert "bytes per token, held out" in page and "[after: " in page


def test_the_context_is_the_longest_that_any_of_the_models_needs(job):
    for each in job["result"].evaluations.values():
        positions = pq.read_table(each.file("positions.parquet")).to_pylist()
        assert min(row["first"] for row in positions if row["scored"]) == 24


@pytest.mark.parametrize(("given", "segment", "expected"), [(0, 16, 16), (20, 16, 20), (8, 16, 16), (0, 64, 64)])
def test_the_context_is_the_larger_of_the_two_settings(given, segment, expected):
    assert EvaluateParameters(evaluation_context=given, lory_segment=segment).context == expected


def test_a_context_by_itself_is_64_tokens_unless_set():
    assert (EvaluateSettings().context, EvaluateSettings(evaluation_context=7).context) == (64, 7)


def test_models_are_named_by_folder_or_artifact_where_nothing_is_known_of_them(job):
    assert list(job["result"].evaluations) == job["names"]


def test_the_command_takes_models_as_words_and_plans_nothing_but_what_it_needs(job, capsys):
    options = [f"--{name.replace('_', '-')}={','.join(value) if isinstance(value, list) else value}"
               for name, value in GIVEN.items()]  # fmt: skip
    words = [*job["parameters"].evaluate_checkpoints, *options, "--sources", job["parameters"].sources[0]]
    words += ["--benchmark-files", job["parameters"].benchmark_files[0]]
    main(["--home", str(job["home"].root), "plan", "evaluate", *words])
    assert "nothing to do: 11 steps reused" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "evaluate", *words, "--evaluate-checkpoints", "x"])
    assert "models are given twice" in capsys.readouterr().err


def refused(job, message, *given, **changes):
    parameters = job["parameters"].model_copy(update={"evaluate_checkpoints": list(given), **changes})
    with pytest.raises(EclectusError, match=message) as caught, open_run("evaluate", parameters, job["home"]):
        eclectus.flows.evaluate.evaluate.whole(parameters)
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_has_no_tokenizer_or_is_given_twice_is_one_line(job, tmp_path):
    documents = job["result"].curated.documents
    refused(job, rf"'{documents.name}' is {documents.name}, which is no checkpoint", documents.name)
    bare = shutil.copytree(job["plain"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    refused(job, r"bare brings no tokenizer .*copy that of the model into its folder, or name it with", str(bare))
    refused(job, "names one model twice", str(job["plain"]), str(job["plain"]))
    refused(job, r"evaluation_tokens 500 is more than the 128 positions", str(job["plain"]), evaluation_tokens=500)


def test_a_named_tokenizer_serves_the_model_that_brings_none(job, tmp_path):
    bare = shutil.copytree(job["plain"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    changes = {"evaluate_checkpoints": [str(bare)], "tokenizer": str(job["plain"]), "benchmark_files": []}
    parameters = job["parameters"].model_copy(update=changes)
    with open_run("evaluate", parameters, job["home"]):
        result = eclectus.flows.evaluate.evaluate.whole(parameters)
    alone = pq.read_table(result.evaluations["bare"].file("documents.parquet"))
    first = pq.read_table(job["result"].evaluations["tiny-base"].file("documents.parquet"))
    assert alone["tokens"].equals(first["tokens"])


def test_models_are_named_by_the_step_that_made_them_and_their_languages(tmp_path, monkeypatch):
    monkeypatch.setattr("eclectus.flows.given_models.check_before_work", lambda *_: None)
    make_up_steps(monkeypatch)
    world, home = write_inputs(tmp_path), Home.open(tmp_path / "home")
    first = run(home, "main", settings_of(world, "main", {})).result.checkpoints
    short = [each.name for each in first.values()]
    for place, names in ((home, short), (Home.open(tmp_path / "later"), [each.path for each in first.values()])):
        given = settings_of(world, "evaluate", {"evaluate_checkpoints": names, "gate": ""})
        result = run(place, "evaluate", given).result
        assert list(result.checkpoints) == ["dense en", "lory en", "stage 1 tr", "stage 2 tr"]
        assert [each.digest for each in result.checkpoints.values()] == [each.digest for each in first.values()]
