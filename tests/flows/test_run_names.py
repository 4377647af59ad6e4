"""Names of flow runs: what a run does, and which names a user chose."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
from prefect.utilities.names import generate_slug

import eclectus.flows.prefect_flow as prefect_flow
from eclectus.flows.curate import curate
from eclectus.flows.parameters import PARAMETERS
from eclectus.flows.prefect_flow import OneSentence, is_generated
from eclectus.flows.run_names import LONGEST, new_documents_name, run_name
from eclectus.storage.errors import EclectusError


@pytest.mark.parametrize(
    ("flow", "given", "name"),
    [
        ("main", {"sources": ["data/corpus"]}, "main en -> el,hu,tr, corpus"),
        ("main", {"sources": ["a.jsonl", "b", "c"], "expanded_languages": []}, "main en, a.jsonl and 2 more"),
        ("main", {"sources": ["a"], "base_model": "HuggingFaceTB/SmolLM2", "expanded_languages": ["el"], "seeds": 3},
         "main en -> el from SmolLM2, a, 3 seeds"),
        ("main", {"evaluate_checkpoints": ["checkpoint-1", "checkpoint-2"]}, "main: evaluate 2 models"),
        ("curate", {"sources": ["s3://key:secret@bucket/texts/?token=secret"], "grouping": "random"},
         "curate en -> el,hu,tr, texts in random order"),
        ("pretrain", {"pretrain_baselines": ["prefix"], "training_seed": 2},
         "pretrain lory, dense, prefix on en, seed 2"),
        ("extend", {"base_model": "models/smollm2/", "expanded_languages": ["el", "tr"]},
         "extend el,tr from smollm2"),
        ("extend", {"base_model": "home/artifacts/checkpoint/" + "1a2b3c4d" * 4, "extension_method": "lora"},
         "extend el,hu,tr from checkpoint-1a2b3c4d1a2b by lora"),
        ("extend", {"extension_base": "lory"}, "extend el,hu,tr from pre-trained lory"),
        ("evaluate", {"evaluate_checkpoints": ["a/dense"]}, "evaluate dense"),
        ("evaluate", {"base_model": "q.gguf", "expanded_languages": ["el"]}, "evaluate: extend el from q.gguf"),
        ("evaluate", {"expanded_languages": []}, "evaluate: pretrain lory, dense on en"),
        ("retrain", {}, "retrain extended: looking for new documents"),
        ("similarity", {"base_model": "smollm2"}, "similarity of el,hu,tr to en in smollm2"),
        ("similarity", {}, "similarity of el,hu,tr to en in no model"),
    ],
)  # fmt: skip
def test_a_run_is_named_after_what_it_does(flow, given, name):
    assert run_name(flow, PARAMETERS[flow](**given)) == name


def test_every_flow_has_a_name_and_none_is_longer_than_a_line():
    many = {"sources": ["x" * 300], "original_languages": ["en"] * 90}
    for flow, model in PARAMETERS.items():
        assert run_name(flow, model()).startswith(flow)
        assert len(run_name(flow, model(**many))) <= LONGEST


def test_a_retraining_is_named_after_what_it_found():
    assert new_documents_name({"new_documents": 120, "train": True}) == "retrain: 120 new documents"
    assert new_documents_name({"new_documents": 0, "train": False}) == "retrain: nothing new, not trained"


def test_names_that_prefect_makes_are_replaced_and_those_of_users_kept():
    made = [*(generate_slug(2) for _ in range(50)), "omicron3-chaltok", "pi-canis-majoris-nebula", "Rustic-Egret"]
    assert [name for name in made if not is_generated(name)] == []
    chosen = ["Long", "nightly", "before the merge", "Rustic-looking models", "run-7", "Small-2026"]
    assert [name for name in chosen if is_generated(name)] == []


@pytest.mark.parametrize(
    ("name", "parent", "shown"),
    [
        ("omicron3-chaltok", None, "curate en -> el,hu,tr, a.jsonl"),
        ("mine", None, "mine"),
        ("mine", "a task run", "curate en -> el,hu,tr, a.jsonl"),
    ],
)
def test_a_name_that_a_user_chose_in_the_form_stays(monkeypatch, name, parent, shown):
    in_flow(monkeypatch, name, parent, {"sources": ["a.jsonl"]})
    assert curate.flow_run_name() == shown


def test_wrong_settings_are_named_so(monkeypatch):
    in_flow(monkeypatch, "omicron3-chaltok", None, {"neighbours_k": 3})
    assert curate.flow_run_name() == "curate: wrong settings"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sources": ["missing.jsonl"]}, "source 'missing.jsonl' does not exist; check the path"),
        ({"neighbours_k": 3}, "unknown setting 'neighbours_k' in the form; did you mean 'neighbors_k'?"),
        ({"neighbors_k": "many"}, "setting 'neighbors_k' in the form is 'many': Input should be a valid integer"),
        ({"more_settings": "neighbors_k: many"}, "setting 'neighbors_k' in more_settings is 'many': "),
        ({"original_languages": 3}, "setting 'original_languages' in the form is 3: "),
        ("data/corpus", "parameters is 'data/corpus'; expected settings by name"),
    ],
)
def test_an_error_of_the_user_is_one_sentence_in_the_state_and_in_the_log(monkeypatch, tmp_path, given, sentence):
    monkeypatch.setenv("ECLECTUS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    logged = []
    in_flow(monkeypatch, "mine", None, given)
    monkeypatch.setattr(prefect_flow, "get_run_logger", lambda: SimpleNamespace(error=logged.append))
    state = curate.fn(given)
    assert state.is_failed()
    assert state.message.startswith(sentence)
    assert "\n" not in state.message and logged == [state.message]
    # What called the flow gets the error.
    assert isinstance(state.data, EclectusError)
    # Prefect's report of the same error is no second sentence.
    try:
        raise state.data
    except EclectusError:
        report = logging.LogRecord("prefect.engine", logging.ERROR, "", 0, "exited", (), sys.exc_info())
    assert not OneSentence().filter(report)


def test_prefects_own_report_of_such_an_error_has_no_traceback_and_those_of_others_keep_theirs():
    def record(error):
        try:
            raise error
        except Exception:
            return logging.LogRecord("prefect.task_runs", logging.ERROR, "", 0, "Failed: %s", ("x",), sys.exc_info())

    ours, other = record(EclectusError("no such file; check it")), record(ValueError("boom"))
    assert OneSentence().filter(ours) and OneSentence().filter(other)
    assert ours.getMessage() == "no such file; check it" and ours.exc_info is None
    assert other.getMessage() == "Failed: x" and other.exc_info is not None
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        assert sum(isinstance(each, OneSentence) for each in logging.getLogger(name).filters) == 1


def in_flow(monkeypatch, name, parent, given):
    """As if a flow run of this name were starting with these parameters."""
    run = SimpleNamespace(name=name, parent_task_run_id=parent)
    context = SimpleNamespace(flow_run=run, parameters={"parameters": given})
    monkeypatch.setattr(prefect_flow, "FlowRunContext", SimpleNamespace(get=lambda: context))
