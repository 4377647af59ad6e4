"""Weights & Biases. `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_BASE_URL`, `WANDB_MODE` and `WANDB_DIR` are its own.

Offline, and where its server is gone, `wandb sync FOLDER` sends the files later.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from eclectus.storage.trackers.tracker import Page, Point, Table, TrackedRun

LONGEST_START = 30.0
API = "https://api.wandb.ai"


class Wandb:
    """Feeds W&B's own process, which keeps everything in a file and sends it on."""

    def __init__(self, folder: Path, project: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb
        self._project = os.environ.get("WANDB_PROJECT") or project
        self._folder = Path(os.environ.get("WANDB_DIR") or folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._offline = os.environ.get("WANDB_MODE") == "offline"
        server = os.environ.get("WANDB_BASE_URL", API)
        self.place = str(self._folder / "wandb") if self._offline else f"{server} (project {self._project})"
        self._server = None if self._offline else urllib.parse.urlsplit(server)
        self._runs: dict[str, Any] = {}

    def begin(self, run: TrackedRun, resumed: bool) -> None:
        self._check_server()
        self._runs[run.id] = self._wandb.init(
            project=self._project,
            id=run.id,
            name=run.name,
            group=run.run,
            job_type=run.label or "run",
            config=dict(run.config),
            dir=str(self._folder),
            resume=None if self._offline else "allow",
            reinit="create_new",
            settings=self._wandb.Settings(
                console="off", init_timeout=LONGEST_START, disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def log(self, run: TrackedRun, points: Sequence[Point]) -> None:
        self._check_server()
        opened = self._runs[run.id]
        for step, same in groupby(points, lambda point: point.step):
            values = list(same)
            if step is None:
                opened.summary.update({each.name: each.value for each in values})
            else:
                opened.log({each.name: each.value for each in values} | {"_timestamp": values[0].at}, step=step)

    def table(self, run: TrackedRun, table: Table) -> None:
        name, columns, rows = table
        texts = [[None if cell is None else cell for cell in row] for row in rows]
        self._runs[run.id].log({name: self._wandb.Table(columns=list(columns), data=texts, allow_mixed_types=True)})

    def page(self, run: TrackedRun, page: Page) -> None:
        self._runs[run.id].log({page.name: self._wandb.Html(page.html.read_text("utf-8"), inject=False)})

    def end(self, run: TrackedRun, state: str) -> None:
        self._runs[run.id].finish(exit_code=0 if state == "completed" else 1)

    def close(self) -> None:
        """Nothing: every run has ended."""

    def _check_server(self) -> None:
        """Raises OSError where nothing listens: W&B itself says nothing and keeps what it has in its files."""
        if self._server is None or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
            return
        port = self._server.port or (443 if self._server.scheme == "https" else 80)
        socket.create_connection((self._server.hostname or "", port), timeout=5).close()
