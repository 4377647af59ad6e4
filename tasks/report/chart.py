"""A chart as data: what `drawing.py` draws once for the page, for Markdown and for Prefect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
Dash = Literal["solid", "dotted", "dashed", "dashdot"]


@dataclass(frozen=True)
class Series:
    """The values of one model, or one row of a map.

    x, y, labels (shown on hover) and intervals (of x) have equal lengths. In bars, dots and maps y is the number of the
    chart's row; in a map x is the column and `shares` are the values.
    """

    name: str
    colour: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[str, ...]
    intervals: tuple[Point, ...] = ()
    shares: tuple[float, ...] = ()
    dash: Dash = "solid"


@dataclass(frozen=True)
class Chart:
    """A chart of the report.

    name: id of its element on the page. rows: labels of the vertical axis of bars, dots and maps, top first. shaded: a
    range of x. y_range: fixed limits instead of those of the values. highest: the share with a map's full colour.
    """

    name: str
    title: str
    kind: Literal["lines", "bars", "dots", "map"]
    series: tuple[Series, ...]
    x_label: str = ""
    y_label: str = ""
    rows: tuple[str, ...] = ()
    shaded: Point | None = None
    y_range: Point | None = None
    highest: float = 1.0

    @property
    def legend(self) -> tuple[Series, ...]:
        return () if self.kind == "map" else self.series
