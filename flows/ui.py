"""What the Prefect UI shows of a run.

For each step a progress bar while it works and a page with its output; on the run's own page its decisions, links to
its reports and to Ray's dashboard, and a table of its steps.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import duckdb
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.logging import get_logger
from prefect.states import Crashed

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


class PrefectPages:
    """A display (see `eclectus.tasks.run.Display`) that writes Prefect artifacts.

    It is called in the step's task run, which owns the artifacts.
    """

    needs_prefect = True

    def __init__(self) -> None:
        self._bars: dict[str, tuple[UUID, float]] = {}
        self._rows: list[dict[str, Any]] = []

    def step_began(self, label: str) -> None:
        pass

    def step_progressed(self, label: str, what: str, done: float, total: float | None, unit: str) -> None:
        if not total:
            return
        percent = min(100.0, 100.0 * done / total)
        bar: UUID | None
        bar, updated = self._bars.get(label, (None, 0.0))
        if time.monotonic() - updated < SECONDS_BETWEEN_UPDATES and percent < 100:
            return
        if bar is None:
            # Its type has a coroutine too, which it only returns inside an event loop.
            bar = cast(
                UUID,
                create_progress_artifact(
                    percent, key=f"{_slug(label)}-progress", description=f"{label}: {what} ({unit})"
                ),
            )
        else:
            update_progress_artifact(bar, percent)
        self._bars[label] = bar, time.monotonic()

    def step_ended(self, label: str, state: str, reason: str, seconds: float, output: Artifact | None) -> None:
        self._bars.pop(label, None)
        name = output.name if output else ""
        row = {"step": label, "state": state, "seconds": round(seconds, 1), "output": name, "reason": reason}
        self._rows.append(row)
        if output is None:
            return
        lines = [
            f"**{label}**: {state}, {seconds:.1f} s",
            "",
            f"Reason: {reason}",
            "",
            f"`{output.name}`",
            f"`{output.path}`",
            "",
        ]
        lines += ["| | |", "|---|---|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in sorted(output.statistics.items())]
        create_markdown_artifact("\n".join(lines), key=_slug(label), description=f"{output.kind} of the step '{label}'")

        for name, picture in _pictures(label, output):
            address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            create_image_artifact(address, key=_slug(f"{label} {name}"), description=f"{name} of the step '{label}'")
        if output.kind == "report":
            _show_tables(label, output)
        if output.kind == "report" and (served := os.environ.get(PAGES)):
            for page in sorted(Path(output.path).glob("*.html")):
                address = f"{served}/{Path(output.path).name}/{page.name}"
                self.linked(f"open {label}", address, f"{page.name} of the step '{label}'")

    def notified(self, name: str, text: str) -> None:
        _attach("markdown", name, text, "Decision of this run, with its reason.")
        get_logger("eclectus").info(text)

    def linked(self, name: str, address: str, what: str) -> None:
        _attach("markdown", name, f"[{name}]({address})", what)

    def run_ended(self, run: Run) -> None:
        """Writes the table of all steps."""
        if self._rows:
            _attach(
                "table", "steps", json.dumps(self._rows), "Steps of this run: state, seconds, output and reason", run
            )


def close_lost_steps(flow_run: str) -> None:
    """Marks steps that a killed attempt of this flow run left in state Running or Pending as crashed."""
    in_progress = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    with get_client(sync_client=True) as client:
        lost = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run)])),
            task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=in_progress)),
        )
        for each in lost:
            client.set_task_run_state(each.id, Crashed(message="its process is gone"), force=True)


def _attach(kind: str, name: str, data: str, description: str, run: Run | None = None) -> None:
    """Puts an artifact on the page of the flow run itself, whichever of its steps or subflows creates it."""
    run = run or current_run()
    if run and run.prefect_flow_run:
        artifact = ArtifactCreate(
            type=kind, key=_slug(name), data=data, description=description, flow_run_id=UUID(run.prefect_flow_run)
        )
        with get_client(sync_client=True) as client:
            client.create_artifact(artifact)


def _show_tables(label: str, report: Artifact) -> None:
    tables = report.file("tables.json")
    for number, table in enumerate(json.loads(tables.read_text("utf-8")) if tables.is_file() else ()):
        create_table_artifact(table["rows"], key=f"{_slug(label)}-table-{number}", description=table["title"])


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
