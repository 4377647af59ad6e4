"""What is written for the Prefect UI, and on which page: against a client that keeps artifacts in memory."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from prefect.exceptions import ObjectNotFound

from eclectus.flows import ui
from eclectus.storage.artifact import Artifact
from eclectus.storage.home import Home

RUN = "20261129-031147-798e32"
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
PARENT, SUBFLOW, TASK = uuid4(), uuid4(), uuid4()


class Client:
    """The calls of Prefect's client that pages make."""

    def __init__(self) -> None:
        self.artifacts: dict[UUID, dict] = {}
        self.tags: dict[UUID, list[str]] = {PARENT: ["eclectus"], SUBFLOW: []}
        self.names: dict[UUID, str] = {}
        self.updates = 0

    def create_artifact(self, artifact):
        made = uuid4()
        self.artifacts[made] = artifact.model_dump()
        return SimpleNamespace(id=made)

    def update_artifact(self, each, change):
        self.updates += 1
        self.artifacts[each]["data"] = change.data

    def delete_artifact(self, each):
        if each not in self.artifacts:
            raise ObjectNotFound(ValueError("gone"))
        del self.artifacts[each]

    def read_artifacts(self, artifact_filter, flow_run_filter):
        assert artifact_filter.type.any_ == ["progress"]
        assert {each.value for each in flow_run_filter.state.type.any_} == {
            "COMPLETED",
            "FAILED",
            "CRASHED",
            "CANCELLED",
        }
        return [SimpleNamespace(id=each) for each, shown in self.artifacts.items() if shown["key"] == "of-a-dead-run"]

    def read_flow_run(self, each):
        return SimpleNamespace(tags=self.tags[each])

    def update_flow_run(self, each, tags):
        self.tags[each] = tags

    def set_flow_run_name(self, each, name):
        self.names[each] = name

    def of(self, kind: str) -> dict[str, dict]:
        return {each["key"]: each for each in self.artifacts.values() if each["type"] == kind}


@pytest.fixture
def client(monkeypatch, tmp_path):
    made = Client()
    run = SimpleNamespace(id=RUN, home=Home.open(tmp_path / "home"), prefect_flow_run=str(PARENT), step="s")
    flow = SimpleNamespace(flow_run=SimpleNamespace(id=SUBFLOW, name="retrain extended: looking for new documents"))
    task = SimpleNamespace(task_run=SimpleNamespace(id=TASK))
    monkeypatch.setattr(ui, "get_client", lambda sync_client: contextlib.nullcontext(made))
    monkeypatch.setattr(ui, "current_run", lambda: run)
    monkeypatch.setattr(ui, "FlowRunContext", SimpleNamespace(get=lambda: flow))
    monkeypatch.setattr(ui, "TaskRunContext", SimpleNamespace(get=lambda: task))
    monkeypatch.setattr(ui, "SECONDS_BETWEEN_UPDATES", 0.0)
    made.run = run
    made.flow = flow
    return made


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A report with a table, a picture and a page."""
    folder = tmp_path / "report"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "scores.png").write_bytes(b"picture")
    (folder / "report.html").write_text("page")
    (folder / "tables.json").write_text(json.dumps([{"title": "Gained and forgotten", "rows": [{"model": "dense"}]}]))
    (folder / "manifest.json").write_text(json.dumps({"statistics": {"models": 2}, "rows": 1, "bytes": 1}))
    monkeypatch.setattr(Artifact, "manifest", lambda self: json.loads(self.file("manifest.json").read_text()))
    return Artifact("report", "1a" * 32, str(folder))


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
def test_the_progress_bar_of_a_step_is_gone_when_the_step_has_ended(client, state):
    pages = ui.PrefectPages()
    pages.step_began("train stage 1")
    pages.step_progressed("train stage 1", "training", 3, 10, "steps")
    pages.step_progressed("train stage 1", "training", 7, 10, "steps")
    (bar,) = client.of("progress").values()
    assert (bar["data"], bar["flow_run_id"], bar["task_run_id"]) == (70.0, SUBFLOW, TASK)
    pages.step_ended("train stage 1", state, "first time", 2.0, None)
    assert client.of("progress") == {}
    # A bar that a user has deleted meanwhile is no fault.
    pages.step_progressed("train stage 2", "training", 3, 10, "steps")
    client.artifacts.clear()
    pages._summary = None
    pages.step_ended("train stage 2", state, "first time", 2.0, None)


def test_bars_of_runs_whose_process_was_killed_go_when_the_next_run_begins(client):
    client.artifacts[uuid4()] = {"type": "progress", "key": "of-a-dead-run"}
    client.artifacts[uuid4()] = {"type": "progress", "key": "of-a-living-run"}
    ui.PrefectPages().step_began("ingest")
    assert [*client.of("progress")] == ["of-a-living-run"]


def test_what_subflows_make_is_found_on_the_page_of_the_run(client, report, monkeypatch):
    monkeypatch.setenv(ui.PAGES, "http://127.0.0.1:9")
    pages = ui.PrefectPages()
    pages.step_began("report")
    pages.notified("gate", "promoted: all rules hold")
    pages.step_ended("report", "completed", "first time", 1.0, report)
    pages.run_ended(client.run)
    shown = {each["key"]: (each["flow_run_id"], each["task_run_id"]) for each in client.artifacts.values()}
    assert shown == {
        f"run-{RUN}": (PARENT, None),
        "gate": (PARENT, None),
        "report": (SUBFLOW, TASK),
        "report-scores": (PARENT, TASK),
        "report-gained-and-forgotten": (PARENT, TASK),
        "open-report": (PARENT, None),
        "steps": (PARENT, None),
    }
    text = client.of("markdown")[f"run-{RUN}"]["data"]
    page = next(each for each, shown in client.artifacts.items() if shown["key"] == "report")
    assert f"[report](/artifacts/artifact/{page})" in text
    assert "[open report](http://127.0.0.1:9/report/report.html)" in text
    assert json.loads(client.of("table")["steps"]["data"]) == [
        {"step": "report", "result": "made", "seconds": 1.0, "why": "it was never made before",
         "output": "report-1a1a1a1a1a1a"},
    ]  # fmt: skip


def test_a_reused_step_has_a_line_in_the_summary_and_a_link_to_its_report_but_no_page(client, report, monkeypatch):
    monkeypatch.setenv(ui.PAGES, "http://127.0.0.1:9")
    monkeypatch.setattr(ui, "TaskRunContext", SimpleNamespace(get=lambda: None))
    pages = ui.PrefectPages()
    pages.step_ended("report", "reused", "same settings and inputs; every file is as it was written", 0.1, report)
    pages.run_ended(client.run)
    assert {each["key"] for each in client.artifacts.values()} == {f"run-{RUN}", "open-report", "steps"}
    assert (
        "| report | reused | 0.1 | nothing changed since it was made |" in client.of("markdown")[f"run-{RUN}"]["data"]
    )


def test_the_run_and_its_subflows_are_tagged_once_with_the_runs_id(client):
    pages = ui.PrefectPages()
    for label in ("ingest", "split"):
        pages.step_began(label)
        pages.step_ended(label, "completed", "first time", 1.0, None)
    assert client.tags == {PARENT: ["eclectus", f"run {RUN}"], SUBFLOW: [f"run {RUN}"]}


def test_the_summary_is_not_written_anew_for_each_of_many_fast_steps(client, monkeypatch):
    monkeypatch.setattr(ui, "SECONDS_BETWEEN_UPDATES", 60.0)
    pages = ui.PrefectPages()
    for number in range(30):
        pages.step_ended(f"step {number}", "reused", "same", 0.0, None)
    assert client.updates == 0
    pages.run_ended(client.run)
    assert client.updates == 1
    assert "30 steps (30 reused)" in client.of("markdown")[f"run-{RUN}"]["data"]


def test_a_retraining_is_renamed_when_its_new_documents_are_counted_unless_a_user_named_it(client, report):
    statistics = {"new_documents": 120, "train": True, "reason": ""}
    report.file("manifest.json").write_text(json.dumps({"statistics": statistics}))
    ui.PrefectPages().step_ended("news", "completed", "first time", 1.0, report)
    assert client.names == {SUBFLOW: "retrain: 120 new documents"}
    client.names.clear()
    client.flow.flow_run.name = "my nightly run"
    ui.PrefectPages().step_ended("news", "completed", "first time", 1.0, report)
    assert client.names == {}


def test_a_page_that_cannot_be_written_leaves_the_step_in_the_summary(client, report, monkeypatch):
    def fails(*_):
        raise OSError("no picture")

    monkeypatch.setattr(ui, "_pictures", fails)
    pages = ui.PrefectPages()
    with pytest.raises(OSError, match="no picture"):
        pages.step_ended("report", "completed", "first time", 1.0, report)
    pages.run_ended(client.run)
    assert "| report | made |" in client.of("markdown")[f"run-{RUN}"]["data"]
