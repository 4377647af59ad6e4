"""The terminal: a line for each finished step, and a progress bar with rate and remaining time for the current one.

If the output is not a terminal (a log file, CI), only the lines for finished steps are printed.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from eclectus.storage.artifact import Artifact
from eclectus.tasks.run import describe

MARKS = {"completed": ("+", "green"), "reused": ("=", "cyan"), "failed": ("x", "red"), "cancelled": ("x", "yellow")}


class _Rate(ProgressColumn):
    """The rate, as `3.1k documents/s`."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{describe(float(speed))} {task.fields['unit']}/s", style="dim")


class Terminal:
    """The display of the command line (see `eclectus.tasks.run.Display`)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._bars: dict[str, tuple[TaskID, str]] = {}
        self._look_up: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def looking_up(self, label: str | None) -> None:
        """Shows the step whose artifact is looked up and checked; None: the look-up has ended."""
        if label is not None:
            if self._look_up is None:
                self._look_up = self._progress.add_task("", total=None, unit="")
            self._progress.update(self._look_up, description=f"{label}: checking what is there")
        elif self._look_up is not None:
            self._progress.remove_task(self._look_up)
            self._look_up = None

    def step_began(self, label: str) -> None:
        self._bars[label] = self._progress.add_task(label, total=None, unit=""), ""

    def step_progressed(self, label: str, what: str, done: float, total: float | None, unit: str) -> None:
        bar, before = self._bars.get(label, (None, ""))
        if bar is None:
            return
        if before != what:
            self._progress.reset(bar, total=total, description=f"{label}: {what}", unit=unit)
            self._bars[label] = bar, what
        self._progress.update(bar, completed=done, total=total)

    def step_ended(self, label: str, state: str, reason: str, seconds: float, output: Artifact | None) -> None:
        bar, _ = self._bars.pop(label, (None, ""))
        if bar is not None:
            with contextlib.suppress(KeyError):
                self._progress.remove_task(bar)
        mark, style = MARKS[state]
        line = Text(f"{mark} ", style=style) + Text(f"{label:<26}", style="bold") + Text(f"{seconds:7.1f} s  ")
        word = {"completed": "made", "cancelled": "interrupted"}.get(state, state)
        # The command prints the error itself as its last line.
        outcome = word if state in ("failed", "cancelled") else f"{word}: {reason}"
        self.console.print(line + Text(outcome, style="dim"), soft_wrap=True)

    def notified(self, name: str, text: str) -> None:
        self.print(f"  {text}")

    def linked(self, name: str, address: str, what: str) -> None:
        self.print(f"  {name}: {address}", style="dim")

    def print(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, soft_wrap=True, markup=False)
