"""TensorBoard: event files, a folder for each run, in `TENSORBOARD_LOGGING_DIR` or the home's `trackers/`."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eclectus.storage.trackers.tracker import Page, Point, Table, TrackedRun


class TensorBoard:
    """Writes event files. A run that goes on gets another file in its folder, which TensorBoard reads as one curve."""

    def __init__(self, folder: Path, project: str) -> None:
        with _without_torch():
            from tensorboardX import SummaryWriter
        self._writer = SummaryWriter
        self._root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or folder / "tensorboard").absolute()
        self.place = str(self._root)
        self._writers: dict[str, Any] = {}

    def begin(self, run: TrackedRun, resumed: bool) -> None:
        folder = self._root / run.run / run.slug
        # Its own name has the second only; two of one name would overwrite each other.
        suffix = f".{time.time_ns()}"
        self._writers[run.id] = self._writer(logdir=str(folder), flush_secs=5, filename_suffix=suffix)
        if not resumed:
            config = json.dumps(run.config, indent=1, default=str)
            self._text(run, "config", "\n".join(f"    {line}" for line in config.splitlines()))

    def log(self, run: TrackedRun, points: Sequence[Point]) -> None:
        writer = self._writers[run.id]
        for point in points:
            writer.add_scalar(_tag(point.name), point.value, point.step or 0, walltime=point.at)
        writer.flush()

    def table(self, run: TrackedRun, table: Table) -> None:
        name, columns, rows = table
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in lines)
        self._text(run, name, text)

    def page(self, run: TrackedRun, page: Page) -> None:
        self._text(run, page.name, page.markdown)

    def end(self, run: TrackedRun, state: str) -> None:
        writer = self._writers.pop(run.id)
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _text(self, run: TrackedRun, name: str, text: str) -> None:
        self._writers[run.id].add_text(_tag(name), text, 0)
        self._writers[run.id].flush()


def _tag(name: str) -> str:
    """Letters, digits and `-/._` are what TensorBoard takes."""
    return re.sub(r"[^-/\w.]", "_", name)


@contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports PyTorch where it can, which takes seconds and hundreds of megabytes; numbers need none."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
