"""Steps that make small artifacts at once, so that whole flows run in a second: keys, reuse and lineage are real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eclectus.flows.flow import flow_named, run_flow
from eclectus.flows.parameters import PARAMETERS
from eclectus.flows.run import open_run
from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.home import Home
from eclectus.storage.step_keys import Record
from eclectus.tasks.run import Display, Run
from eclectus.tasks.step import Step
from tests.support.dense_bases import write_base

STATISTICS: dict[str, dict[str, Any]] = {
    "data_report": {"accounts": {"kept": 3}},
    "group": {"adjacent_similarity": None, "random_similarity": None, "best_neighbor_similarity": None},
    "evaluate": {"bits_per_byte": {"language": {"en": 1.25}, "domain": {}}},
    "benchmark": {"scores": {"arc_easy acc": 0.5}},
    "gate": {"passed": True, "reason": "all rules hold", "rules": []},
    "report": {"verdict": []},
    "layer_similarity": {"similarity": [0.5, 0.25], "new_experts": [1, 2]},
    "news": {"train": True, "reason": "nothing was trained for this line yet"},
}
GATE = {"lines": {"extended": {"model": "stage 2", "base": "dense", "rules": ["retention.en >= 0.9"]}}}
FILES = {"report": "report.html", "data_report": "data.html"}


def make_up_steps(patch: pytest.MonkeyPatch) -> list[str]:
    """Lets every step write its key instead of its work, and runs with work start no server. Returns the list to which
    the labels of their runs are added.

    A fetched model is a dense one. The same key makes the same content.
    """
    made: list[str] = []

    def make(step: Step, run: Run, arguments: dict[str, Any], record: Record) -> tuple[Record, Artifact]:
        made.append(run.label)
        with run.home.store.draft(step.makes) as draft:
            _write(step.name, record, draft)
            return record, run.home.store.commit(draft)

    patch.setattr(Step, "_make", make)
    patch.setattr("eclectus.flows.flow.serve", lambda run: None)
    return made


def _write(name: str, record: Record, draft: Draft) -> None:
    draft.file(FILES.get(name, "content")).write_text(record.key)
    if name == "fetch":
        base = Path(record.settings["base_model"])
        draft.file("config.json").write_text((base / "config.json").read_text() if base.is_dir() else "{}")
    elif draft.kind == "checkpoint":
        draft.file("config.json").write_text(json.dumps({"model_type": "llama"}))
    draft.statistics = STATISTICS.get(name, {})
    if name == "news" and "model" in record.inputs:
        draft.statistics = {"train": False, "reason": "nothing is new"}
    draft.rows = 3


def write_inputs(folder: Path) -> Path:
    """Documents, a gate and a dense base, for `settings_of`."""
    (folder / "documents.jsonl").write_text('{"text": "the ship left the harbour", "language": "en"}\n')
    (folder / "gate.json").write_text(json.dumps(GATE))
    write_base(folder / "base", "llama")
    return folder


def settings_of(folder: Path, flow: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of a flow on the inputs of a folder; a change to "BASE" is the path of the dense base."""
    given = {
        "sources": [str(folder / "documents.jsonl")],
        "original_languages": ["en"],
        "expanded_languages": ["tr"],
        "gate": str(folder / "gate.json"),
        "instance_tokens": 64,
        "lory_segment": 16,
        "evaluation_tokens": 64,
    }
    given |= {name: str(folder / "base") if value == "BASE" else value for name, value in changes.items()}
    known = PARAMETERS[flow].model_fields
    return {name: value for name, value in given.items() if name in known}


def words_of(given: dict[str, Any]) -> list[str]:
    """Settings as options of the command line."""
    texts = {name: ",".join(map(str, each)) if isinstance(each, list) else each for name, each in given.items()}
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


def run(home: Home, flow: str, given: dict[str, Any], displays: Sequence[Display] = ()) -> SimpleNamespace:
    """Runs a flow as the command line does: id, states by label and the result."""
    parameters = PARAMETERS[flow](**given)
    with open_run(flow, parameters, home, list(displays)) as opened:
        result = run_flow(opened, flow_named(flow), parameters)
    return SimpleNamespace(id=opened.id, states=opened.states, result=result)
