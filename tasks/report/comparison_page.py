"""The page of a comparison of runs: settings that differ, measures with their spread, and training curves."""

from __future__ import annotations

import json
from typing import Any

from eclectus.tasks.report.chart import Chart, Dash
from eclectus.tasks.report.compare_runs import Comparison, Measure, measure_name
from eclectus.tasks.report.figures import FURTHER, curve
from eclectus.tasks.report.tables import Cell, Table

COLOURS = ("#7d8ba1", "#e08a2e", "#22a38b", "#9b7fe0", *FURTHER)
DASHES: tuple[Dash, ...] = ("solid", "dotted", "dashed", "dashdot")


def write_page(comparison: Comparison, measures: list[Measure]) -> str:
    """The page as HTML that opens offline."""
    from eclectus.tasks.report.rendering import render

    names = [group.name for group in comparison.groups]
    runs = Table(
        "Runs", ["group", "run", "state", "seed"],
        [
            [Cell(group.name), Cell(run.run), Cell(run.state), Cell(run.seed)]
            for group in comparison.groups for run in group.runs
        ],
    )  # fmt: skip
    settings = Table(
        "Settings that differ", ["setting", *names],
        [[Cell(name), *map(Cell, map(_plain, values))] for name, values in comparison.differing.items()],
    )  # fmt: skip
    values = Table(
        "Measures", ["measure", *names],
        [[Cell(measure_name(each)), *_cells(comparison, each)] for each in measures],
        note="Mean over the trainings of a group; below it the standard deviation between them, if it has several: "
        "no interval, on these documents. A group of one training says nothing about another seed.",
    )  # fmt: skip
    number = sum(len(group.runs) for group in comparison.groups)
    return render(
        "compare.html.j2",
        title="Comparison of runs",
        subtitle=f"{number} runs in {len(names)} groups; runs of a group differ only in the seeds.",
        tables=[each for each in (runs, settings, values) if each.rows],
        colours={group.name: COLOURS[at % len(COLOURS)] for at, group in enumerate(comparison.groups)},
        curves=_curves(comparison),
    )


def _cells(comparison: Comparison, measure: Measure) -> list[Cell]:
    cells = []
    for group in comparison.groups:
        value = group.value(measure)
        spread = f"± {value[1]:.2g}, {value[2]} trainings" if value and value[1] is not None else ""
        cells.append(Cell(f"{value[0]:.4g}" if value else "", spread))
    return cells


def _curves(comparison: Comparison) -> list[Chart]:
    """One chart per metric of a step: the curves of all runs."""
    keys: dict[tuple[str, str], None] = {}
    for group in comparison.groups:
        for run in group.runs:
            keys |= dict.fromkeys(run.curves)
    with_next_token = {label for label, metric in keys if metric == "next_token_loss"}
    charts = []
    for number, (label, metric) in enumerate(keys):
        if metric == "loss" and label in with_next_token:
            continue
        series = []
        for at, group in enumerate(comparison.groups):
            drawn: dict[str, list[tuple[int, float]]] = {}
            for run in group.runs:
                for seed, points in run.curves.get((label, metric), {}).items():
                    drawn[f"{group.name}, {run.run}{seed}"] = points
            for order, (name, points) in enumerate(drawn.items()):
                tint, dash = COLOURS[at % len(COLOURS)], DASHES[order % len(DASHES)]
                series.append(curve(name, points, tint, dash))
        title = f"{label}, {metric.replace('_', ' ')}"
        charts.append(Chart(f"curve-{number}", title, "lines", tuple(series), "training step", "nats per token"))
    return charts


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
