"""trackio: SQLite files in `TRACKIO_DIR` or where `trackio show` looks, or a Space (`TRACKIO_SPACE_ID`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from eclectus.storage.trackers.tracker import Page, Point, Table, TrackedRun


class Trackio:
    """Feeds trackio. It has no runs within runs: trainings share the run's group."""

    def __init__(self, folder: Path, project: str) -> None:
        import trackio

        self._trackio = trackio
        self._project = os.environ.get("TRACKIO_PROJECT") or project
        self._space = os.environ.get("TRACKIO_SPACE_ID") or None
        self.place = self._space or os.environ.get("TRACKIO_SERVER_URL") or f"project {self._project}: trackio show"
        self._runs: dict[str, Any] = {}

    def begin(self, run: TrackedRun, resumed: bool) -> None:
        self._runs[run.id] = self._trackio.init(
            project=self._project,
            name=run.id,
            group=run.run,
            space_id=self._space,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def log(self, run: TrackedRun, points: Sequence[Point]) -> None:
        for step, values in groupby(points, lambda point: point.step):
            self._runs[run.id].log({each.name: each.value for each in values}, step=step)

    def table(self, run: TrackedRun, table: Table) -> None:
        name, columns, rows = table
        self._runs[run.id].log({name: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def page(self, run: TrackedRun, page: Page) -> None:
        self._runs[run.id].log({page.name: self._trackio.Markdown(page.markdown)})

    def end(self, run: TrackedRun, state: str) -> None:
        self._runs[run.id].finish()

    def close(self) -> None:
        """Nothing: every run has ended."""
