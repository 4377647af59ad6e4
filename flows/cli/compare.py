"""`eclectus compare`: tables in the terminal and, with `-o`, a page with the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eclectus.storage.home import Home
from eclectus.tasks.report.compare_runs import Comparison, Measure, compare_runs, measure_name

# Numbers per layer and expert are too many for a table; the page and SQL have them.
FINE = ("expert", "layer")


def compare(runs: list[str], words: str, out: Path | None) -> list[tuple[list[str], list[tuple[Any, ...]]]]:
    """Tables as columns and rows. words: only measures with these in their name, all if empty. out: the page."""
    home = Home.existing()
    comparison = compare_runs(home, runs)
    chosen = [each for each in comparison.measures if words in measure_name(each) and not _is_fine(each)]
    if out:
        # matplotlib takes longer than the question.
        from eclectus.tasks.report.comparison_page import write_page

        out.write_text(write_page(comparison, chosen), "utf-8")
    return [_runs(comparison), _settings(comparison), _values(comparison, chosen)]


def _is_fine(measure: Measure) -> bool:
    return any(word in measure[2] for word in FINE)


def _runs(comparison: Comparison) -> tuple[list[str], list[tuple[Any, ...]]]:
    rows = [(group.name, run.run, run.state, run.seed) for group in comparison.groups for run in group.runs]
    return ["group", "run", "state", "seed"], rows


def _settings(comparison: Comparison) -> tuple[list[str], list[tuple[Any, ...]]]:
    rows = [(name, *map(_short, values)) for name, values in comparison.differing.items()]
    return ["setting that differs", *(group.name for group in comparison.groups)], rows


def _values(comparison: Comparison, measures: list[Measure]) -> tuple[list[str], list[tuple[Any, ...]]]:
    rows = []
    for measure in measures:
        cells = [group.value(measure) for group in comparison.groups]
        rows.append((measure_name(measure), *(_cell(each) for each in cells)))
    return ["measure", *(group.name for group in comparison.groups)], rows


def _cell(value: tuple[float, float | None, int] | None) -> str:
    if value is None:
        return ""
    mean, spread, trainings = value
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g} ({trainings})"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
