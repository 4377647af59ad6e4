"""The seam: what a tracker is told, and which trackers a run feeds.

An Eclectus run is a run of the tracker, and so is each of its trainings, in the run's group. A training that was
killed and goes on, in another run too, keeps its identifier and so its curve. Each of the other modules named after a
library has one class that speaks to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eclectus.storage.home import Home

NONE = "none"
# What the libraries print while a run feeds them.
LOG = "feeder.log"
# By tracker: the variables of its own that name a place. A key alone (WANDB_API_KEY) says who one is, not what is
# wanted.
VARIABLES = {
    "tensorboard": ("TENSORBOARD_LOGGING_DIR",),
    "wandb": ("WANDB_PROJECT", "WANDB_MODE"),
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "trackio": ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
}
_WANDB_MODES = ("online", "offline")


class Refused(Exception):
    """A tracker that answers does not take this; trying again is of no use."""


@dataclass(frozen=True)
class TrackedRun:
    """A run of a tracker. run: the Eclectus run. label: of the training, empty for the run itself.

    config: its settings. began: seconds since 1970.
    """

    run: str
    label: str = ""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    began: float = field(default=0.0, compare=False)

    @property
    def id(self) -> str:
        """The same for every process that feeds it: letters, digits, dashes and dots."""
        return f"{self.run}-{self.slug}" if self.label else self.run

    @property
    def slug(self) -> str:
        return re.sub(r"[^\w.-]+", "-", self.label)

    @property
    def name(self) -> str:
        return f"{self.label} {self.run}" if self.label else self.run


@dataclass(frozen=True)
class Point:
    """A number. step: training step, None for one that has none. at: seconds since 1970."""

    name: str
    value: float
    step: int | None
    at: float


Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]
"""Name, columns, rows."""


@dataclass(frozen=True)
class Page:
    """A page of a run. html: its file. markdown: the same as text."""

    name: str
    html: Path
    markdown: str


class Tracker(Protocol):
    """What speaks to one library. Its constructor may raise ImportError; anything else it raises is tried again.

    place: where to look, for people. A method that raises is called again with the same arguments, but after Refused.
    """

    place: str

    def begin(self, run: TrackedRun, resumed: bool) -> None:
        """Opens a run, or opens it again. resumed: an earlier process has told values of it."""

    def log(self, run: TrackedRun, points: Sequence[Point]) -> None:
        """Points in the order of their steps, which never go back."""

    def table(self, run: TrackedRun, table: Table) -> None: ...

    def page(self, run: TrackedRun, page: Page) -> None: ...

    def end(self, run: TrackedRun, state: str) -> None:
        """state: completed, failed, cancelled or crashed."""

    def close(self) -> None:
        """Sends what the library still holds."""


def folder_of(home: Home) -> Path:
    """Where trackers keep files, unless their own variables name another place."""
    return home.root / "trackers"


def chosen(wanted: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The trackers of a run. wanted: the setting; where empty, those that the environment names a place for."""
    if wanted:
        return [name for name in wanted if name != NONE]
    return [name for name in VARIABLES if _named(name, environment)]


def _named(name: str, environment: Mapping[str, str]) -> bool:
    if name == "wandb":
        mode = environment.get("WANDB_MODE", "")
        if (mode and mode not in _WANDB_MODES) or environment.get("WANDB_DISABLED", "").lower() in ("true", "1"):
            return False
    return any(environment.get(variable) for variable in VARIABLES[name])
