"""The page of a comparison of runs: what differs, the measures beside each other with their spread, curves over each other."""

from __future__ import annotations

import json
from typing import Any

from eclectus.tasks.report.compare_runs import Comparison, Measure, measure_name
from eclectus.tasks.report.figures import FURTHER, Figure, safe
from eclectus.tasks.report.tables import Cell, Table

COLOURS = ("#7d8ba1", "#e08a2e", "#22a38b", "#9b7fe0", *FURTHER)
DASHES = ("solid", "dot", "dash", "dashdot")


def write_page(comparison: Comparison, measures: list[Measure]) -> str:
    """The page as HTML that opens offline."""
    from eclectus.tasks.report.page import render

    names = [group.name for group in comparison.groups]
    runs = Table(
        "Runs", ["group", "run", "state", "seed"],
        [
            [Cell(group.name), Cell(run.run), Cell(run.state), Cell(str(run.settings.get("seed", "")))]
            for group in comparison.groups for run in group.runs
        ],
    )  # fmt: skip
    settings = Table(
        "Settings that differ", ["setting", *names],
        [[Cell(name), *(Cell(_plain(value)) for value in values)] for name, values in comparison.differing.items()],
    )  # fmt: skip
    values = Table(
        "Measures", ["measure", *names],
        [[Cell(measure_name(each)), *_cells(comparison, each)] for each in measures],
        note="Mean over the runs of a group; under it the standard deviation over its seeds, where it has several.",
    )  # fmt: skip
    figures = _curves(comparison)
    return render(
        "compare.html.j2",
        figures,
        title="Comparison of runs",
        subtitle=f"{sum(len(group.runs) for group in comparison.groups)} runs in {len(names)} groups; runs of a group differ in nothing but the seed.",
        tables=[each for each in (runs, settings, values) if each.rows],
        colours={group.name: COLOURS[number % len(COLOURS)] for number, group in enumerate(comparison.groups)},
        figures_shown=figures,
    )


def _cells(comparison: Comparison, measure: Measure) -> list[Cell]:
    cells = []
    for group in comparison.groups:
        value = group.value(measure)
        spread = f"± {value[1]:.2g}, {value[2]} seeds" if value and value[1] is not None else ""
        cells.append(Cell(f"{value[0]:.4g}" if value else "", spread))
    return cells


def _curves(comparison: Comparison) -> list[Figure]:
    """One figure a step's label: the curves of all runs over each other."""
    keys = dict.fromkeys(key for group in comparison.groups for run in group.runs for key in run.curves)
    labels = {label for label, name in keys if name == "next_token_loss"}
    figures = []
    for number, (label, name) in enumerate(keys):
        if name == "loss" and label in labels:
            continue
        data: list[dict[str, Any]] = []
        for at, group in enumerate(comparison.groups):
            for seed, run in enumerate(each for each in group.runs if (label, name) in each.curves):
                points = run.curves[label, name]
                title = safe(f"{group.name}, {run.run}")
                data.append(
                    {
                        "type": "scatter", "mode": "lines" if len(points) > 1 else "markers", "name": title,
                        "x": [step for step, _ in points], "y": [round(value, 5) for _, value in points],
                        "line": {"color": COLOURS[at % len(COLOURS)], "width": 2, "dash": DASHES[seed % len(DASHES)]},
                        "hovertemplate": "step %{x}: %{y:.3f}<extra>" + title + "</extra>",
                    }
                )  # fmt: skip
        layout = {
            "xaxis": {"title": {"text": "training step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "nats a token"}},
            "showlegend": True,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        }
        figures.append(Figure(f"curve-{number}", f"{label}, {name.replace('_', ' ')}", data, layout, 320, small=True))
    return figures


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
