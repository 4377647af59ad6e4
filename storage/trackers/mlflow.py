"""MLflow: the server, database or folder at `MLFLOW_TRACKING_URI`, else a database in the home's `trackers/`."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eclectus.storage.trackers.tracker import Page, Point, Refused, Table, TrackedRun

# The client would ask a server that is gone for four minutes; what is not sent is tried again by the feeder.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
METRICS_AT_ONCE = 1000
PARAMETERS_AT_ONCE = 100
LONGEST_PARAMETER = 500
STATES = {"completed": "FINISHED", "cancelled": "KILLED"}
# By this tag a run is found again.
TAG = "eclectus.id"


class Mlflow:
    """Feeds MLflow's client. Trainings are nested in their run."""

    def __init__(self, folder: Path, project: str) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self._fault = MlflowException
        self._client = MlflowClient(tracking_uri=self.place)
        self._artifacts = (
            None if os.environ.get("MLFLOW_TRACKING_URI") else (folder.absolute() / "mlartifacts").as_uri()
        )
        self._project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
        self._experiment: str | None = None
        self._runs: dict[str, str] = {}

    def begin(self, run: TrackedRun, resumed: bool) -> None:
        from mlflow.entities import Param

        if found := self._find(run.id):
            self._client.update_run(found, status="RUNNING")
            self._runs[run.id] = found
            return
        tags = {TAG: run.id}
        if run.label and (parent := self._find(run.run)):
            tags["mlflow.parentRunId"] = parent
        made = self._client.create_run(self._experiment_id(), int(run.began * 1000) or None, tags, run.name)
        found = made.info.run_id
        config = [(_key(name), value if isinstance(value, str) else json.dumps(value, default=str))
                  for name, value in run.config.items()]  # fmt: skip
        for first in range(0, len(config), PARAMETERS_AT_ONCE):
            part = config[first : first + PARAMETERS_AT_ONCE]
            self._send(lambda given: self._client.log_batch(found, params=given),
                       [Param(name, value[:LONGEST_PARAMETER]) for name, value in part])  # fmt: skip
        self._runs[run.id] = found

    def log(self, run: TrackedRun, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        found = self._runs[run.id]
        metrics = [Metric(_key(each.name), each.value, int(each.at * 1000), each.step or 0) for each in points]
        for first in range(0, len(metrics), METRICS_AT_ONCE):
            self._send(
                lambda given: self._client.log_batch(found, metrics=given), metrics[first : first + METRICS_AT_ONCE]
            )

    def table(self, run: TrackedRun, table: Table) -> None:
        """In the form of MLflow's own `log_table`, which its pages show."""
        name, columns, rows = table
        content = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]})
        path = f"{_key(name).replace('/', ' ')}.json"
        self._file(run, path, content)
        found = self._runs[run.id]
        logged = json.loads(self._client.get_run(found).data.tags.get("mlflow.loggedArtifacts", "[]"))
        if (entry := {"path": path, "type": "table"}) not in logged:
            self._client.set_tag(found, "mlflow.loggedArtifacts", json.dumps([*logged, entry]))

    def page(self, run: TrackedRun, page: Page) -> None:
        self._file(run, f"{_key(page.name)}.html", page.html.read_text("utf-8"))

    def end(self, run: TrackedRun, state: str) -> None:
        if state != "unfinished":
            self._client.set_terminated(self._runs[run.id], STATES.get(state, "FAILED"))

    def close(self) -> None:
        """Nothing: every call above has been answered."""

    def _experiment_id(self) -> str:
        if self._experiment is None:
            found = self._client.get_experiment_by_name(self._project)
            self._experiment = (
                found.experiment_id if found else self._client.create_experiment(self._project, self._artifacts)
            )
        return self._experiment

    def _find(self, name: str) -> str | None:
        runs = self._client.search_runs([self._experiment_id()], f"tags.`{TAG}` = '{name}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _file(self, run: TrackedRun, name: str, content: str) -> None:
        with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
            path = Path(scratch) / name
            path.write_text(content, "utf-8")
            self._client.log_artifact(self._runs[run.id], str(path))

    def _send(self, send: Any, given: list[Any]) -> None:
        try:
            send(given)
        except self._fault as error:
            if getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"):
                raise Refused(str(error)) from error
            raise


def _key(name: str) -> str:
    """Letters, digits and `/ ._-` are what MLflow takes."""
    return re.sub(r"[^/\w.\- ]", "_", name)
