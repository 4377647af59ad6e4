"""What the Prefect UI shows of a run.

For each step a progress bar while it works and a page with its output. On the page of the run itself, whichever of its
subflows ran a step: its id as a tag, a summary with a link to every step's page, its decisions, pictures and tables,
links to its reports and to Ray's dashboard, and a table of its steps.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError, ObjectNotFound
from prefect.logging import get_logger, get_run_logger
from prefect.states import Crashed

from eclectus.flows.run_names import SEARCHING, new_documents_name
from eclectus.flows.run_summary import Link, Row, questions, summary, why
from eclectus.flows.services.server import PAGES
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.report.chart import Chart
from eclectus.tasks.report.drawing import draw_png
from eclectus.tasks.report.figures import CURVE_COLOUR, curve
from eclectus.tasks.run import Run, current_run

SECONDS_BETWEEN_UPDATES = 3.0
LONGEST_VALUE = 300
ENDED = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)


class PrefectPages:
    """A display (see `eclectus.tasks.run.Display`) that writes Prefect artifacts.

    It is called in the step's task run, which owns the artifacts, or, for a reused step, in the flow run.
    """

    needs_prefect = True

    def __init__(self) -> None:
        self._bars: dict[str, tuple[UUID, float]] = {}
        self._rows: list[Row] = []
        self._links: list[Link] = []
        self._tagged: set[UUID] = set()
        self._summary: UUID | None = None
        self._written = 0.0

    def step_began(self, label: str) -> None:
        self._show_summary(current_run())

    def step_progressed(self, label: str, what: str, done: float, total: float | None, unit: str) -> None:
        if not total:
            return
        percent = min(100.0, 100.0 * done / total)
        bar, updated = self._bars.get(label, (None, 0.0))
        if time.monotonic() - updated < SECONDS_BETWEEN_UPDATES and percent < 100:
            return
        if bar is None:
            bar = _create("progress", f"{label}-progress", percent, f"{label}: {what} ({unit})")
        else:
            with get_client(sync_client=True) as client:
                client.update_artifact(bar, ArtifactUpdate(data=percent))
        self._bars[label] = bar, time.monotonic()

    def step_ended(self, label: str, state: str, reason: str, seconds: float, output: Artifact | None) -> None:
        bar, _ = self._bars.pop(label, (None, 0.0))
        if bar is not None:
            with get_client(sync_client=True) as client:
                _delete(client, [bar])
        row = Row(label, state, seconds, reason, output.name if output else "")
        try:
            # What is reused was shown in full by the run that made it.
            page = _show_output(label, row, output) if output and state != "reused" else ""
        finally:
            self._rows.append(row)
        self._rows[-1] = Row(label, state, seconds, reason, row.output, page)
        if output and output.kind == "report":
            self._show_reports(label, output)
        if output and label == "news":
            _rename(new_documents_name(output.statistics))
        self._show_summary(current_run())

    def notified(self, name: str, text: str) -> None:
        _attach("markdown", name, text, "A decision of this run with its reason, or a warning.")
        _log().info(text)

    def linked(self, name: str, address: str, what: str) -> None:
        self._links.append(Link(name, address, what))
        _attach("markdown", name, f"[{name}]({address})", what)

    def run_ended(self, run: Run) -> None:
        """Writes the table of all steps, and the summary for the last time."""
        if self._rows:
            rows = json.dumps([row.cells() for row in self._rows])
            _attach("table", "steps", rows, "Steps of this run: result, seconds, why, output", run)
        self._show_summary(run, ended=True)

    def _show_reports(self, label: str, output: Artifact) -> None:
        if served := os.environ.get(PAGES):
            for page in sorted(Path(output.path).glob("*.html")):
                address = f"{served}/{Path(output.path).name}/{page.name}"
                self.linked(f"open {label}", address, f"{page.name} of the step '{label}'")

    def _show_summary(self, run: Run | None, ended: bool = False) -> None:
        """Writes the summary on the page of the run, when it begins, at most every few seconds, and when it ends."""
        if run is None or not run.prefect_flow_run:
            return
        with get_client(sync_client=True) as client:
            self._tag(client, run)
            if self._summary is None:
                remove_finished_bars(client)
                _log().info("Run %s. Ask about it with: %s", run.id, questions(run, self._rows)[0])
            elif not ended and time.monotonic() - self._written < SECONDS_BETWEEN_UPDATES:
                return
            text = summary(run, self._rows, self._links, ended)
            if self._summary is None:
                # A key of its own: the other UI leads to all artifacts of a key, whichever run they are of.
                what = "Summary: every step with its page, links, and how to ask about this run"
                self._summary = _attach("markdown", f"run-{run.id}", text, what, run)
            else:
                client.update_artifact(self._summary, ArtifactUpdate(data=text))
            self._written = time.monotonic()

    def _tag(self, client: SyncPrefectClient, run: Run) -> None:
        """Tags the run's flow run, and the subflow that is running, with its id."""
        context = FlowRunContext.get()
        own = context.flow_run.id if context and context.flow_run else None
        for each in {UUID(str(run.prefect_flow_run)), own} - self._tagged - {None}:
            if each is not None:
                tags = client.read_flow_run(each).tags
                client.update_flow_run(each, tags=[*tags, f"run {run.id}"])
                self._tagged.add(each)


def remove_finished_bars(client: SyncPrefectClient) -> None:
    """Removes the progress bars of flow runs that have ended: those of a killed process are still there."""
    bars = ArtifactFilter(type=ArtifactFilterType(any_=["progress"]))
    ended = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[*ENDED])))
    _delete(client, [each.id for each in client.read_artifacts(artifact_filter=bars, flow_run_filter=ended)])


def close_lost_steps(flow_run: str) -> None:
    """Marks steps that a killed attempt of this flow run left in state Running or Pending as crashed.

    Their progress bars are removed.
    """
    in_progress = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    with get_client(sync_client=True) as client:
        lost = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run)])),
            task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=in_progress)),
        )
        for each in lost:
            client.set_task_run_state(each.id, Crashed(message="its process is gone"), force=True)
        bars = ArtifactFilter(
            type=ArtifactFilterType(any_=["progress"]), flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(flow_run)])
        )
        _delete(client, [each.id for each in client.read_artifacts(artifact_filter=bars)])


def _show_output(label: str, row: Row, output: Artifact) -> str:
    """Shows what a step made: its page, pictures and tables. Returns the address of the page."""
    lines = [
        f"**{label}**: {row.state}, {row.seconds:.1f} s",
        "",
        f"Why: {why(row.state, row.reason)}",
        "",
        f"`{output.name}`",
        f"`{output.path}`",
        "",
    ]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in sorted(output.statistics.items())]
    page = _create("markdown", label, "\n".join(lines), f"{output.kind} of the step '{label}'")
    for name, picture in _pictures(label, output):
        address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        _attach("image", f"{label} {name}", address, f"{name} of the step '{label}'", of_step=True)
    tables = output.file("tables.json")
    for table in json.loads(tables.read_text("utf-8")) if tables.is_file() else ():
        _attach("table", f"{label} {table['title']}", json.dumps(table["rows"]), table["title"], of_step=True)
    # Prefect's server leads from here to whichever of its two UIs the user has chosen.
    return f"/artifacts/artifact/{page}"


def _create(kind: str, name: str, data: Any, description: str) -> UUID:
    """Creates an artifact of the step that is running, on the page of its task run and of its flow run."""
    flow_context, task_context = FlowRunContext.get(), TaskRunContext.get()
    flow_run = flow_context.flow_run.id if flow_context and flow_context.flow_run else None
    return _write(kind, name, data, description, flow_run, task_context.task_run.id if task_context else None)


def _attach(
    kind: str, name: str, data: str, description: str, run: Run | None = None, of_step: bool = False
) -> UUID | None:
    """Puts an artifact on the page of the run itself, whichever of its steps or subflows creates it.

    of_step: it is on the page of the step that is running, too.
    """
    run = run or current_run()
    if run is None or not run.prefect_flow_run:
        return None
    context = TaskRunContext.get() if of_step else None
    task_run = context.task_run.id if context else None
    return _write(kind, name, data, description, UUID(run.prefect_flow_run), task_run)


def _write(kind: str, name: str, data: Any, description: str, flow_run: UUID | None, task_run: UUID | None) -> UUID:
    artifact = ArtifactCreate(
        type=kind, key=_slug(name), data=data, description=description, flow_run_id=flow_run, task_run_id=task_run
    )
    with get_client(sync_client=True) as client:
        return client.create_artifact(artifact).id


def _delete(client: SyncPrefectClient, artifacts: Iterable[UUID]) -> None:
    for each in artifacts:
        with contextlib.suppress(ObjectNotFound):
            client.delete_artifact(each)


def _rename(name: str) -> None:
    """Renames the flow run that is running, unless a user chose its name."""
    context = FlowRunContext.get()
    if context and context.flow_run and context.flow_run.name.endswith(SEARCHING):
        with get_client(sync_client=True) as client:
            client.set_flow_run_name(context.flow_run.id, name)


def _log() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The log of the task run or flow run that is running, which the UI shows."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("eclectus")


def _pictures(label: str, output: Artifact) -> list[tuple[str, bytes]]:
    """(name, PNG) of a step's pictures; for a checkpoint without any, its loss curve."""
    folder = Path(output.path)
    paths = sorted([*folder.glob("*.png"), *folder.glob("pictures/*.png")])
    made = [(path.stem, path.read_bytes()) for path in paths]
    run = current_run()
    if made or run is None or output.kind != "checkpoint":
        return made
    sql = "select at_step, value from metrics where step = ? and name = 'loss' and value is not null order by at_step"
    try:
        with connect(run.home) as connection:
            points = connection.execute(sql, [run.step]).fetchall()
    except (EclectusError, duckdb.Error) as error:
        get_logger("eclectus").warning("the loss curve of %s is not shown: %s", label, error)
        return made
    return [("loss", _curve(label, points))] if len(points) > 1 else []


def _curve(label: str, points: list[tuple[int, float]]) -> bytes:
    series = curve(label, points, CURVE_COLOUR)
    return draw_png([Chart("loss", label, "lines", (series,), "training step", "loss")])


def _slug(label: str) -> str:
    """Prefect's artifact keys hold lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
