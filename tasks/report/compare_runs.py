"""Comparison of runs: metrics with their spread over seeds, settings that differ, and training curves.

Runs whose settings are equal except for the seeds form one group. A group's value is the mean over its trainings, those
of a run with `seeds` included; its spread is their sample standard deviation (none for a single training). A reused
step has the metrics of the step that made its artifact, so that runs that share work can be compared, and counts once.
Price: three queries over the journals.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.storage.lineage.runs import find_run

if TYPE_CHECKING:
    import duckdb

# Settings in which the runs of a group may differ.
SEEDS = ("seed", "seeds", "training_seed")
# How the labels of a further training's steps end (see `eclectus.flows.parameters`).
FURTHER = re.compile(r" seed \d+$")
CURVES = ("loss", "next_token_loss")
# Label of the step, metric, and what it was measured on.
Measure = tuple[str, str, str]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class ComparedRun:
    """settings: the flow's parameters and the code version. Labels of steps are without the seed of a training.

    values: the last one of each measure, by the step that measured it. curves: by label of the step and metric, then by
    seed ("" or " seed 1"): [(training step, value)].
    """

    run: str
    state: str
    settings: dict[str, Any]
    values: dict[Measure, dict[str, float]]
    curves: dict[tuple[str, str], dict[str, list[tuple[int, float]]]]

    @property
    def seed(self) -> str:
        """The seed, and those of the trainings if they are others: "0 (trainings 1 to 3)"."""
        seed, seeds = self.settings.get("seed", ""), self.settings.get("seeds", 1)
        first = self.settings.get("training_seed", -1)
        if first < 0:
            first = seed
        if seeds > 1:
            return f"{seed} (trainings {first} to {first + seeds - 1})"
        return str(seed) if first == seed else f"{seed} (training {first})"


@dataclass
class Group:
    """Runs that differ only in the seeds."""

    name: str
    runs: list[ComparedRun] = field(default_factory=list)

    def value(self, measure: Measure) -> tuple[float, float | None, int] | None:
        """(mean, standard deviation, number of trainings) of a measure; None if no run has it."""
        by_step: dict[str, float] = {}
        for run in self.runs:
            by_step |= run.values.get(measure, {})
        found = list(by_step.values())
        if not found:
            return None
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found)


@dataclass(frozen=True)
class Comparison:
    """groups: in the order of their first run. differing: by setting, its value in each group."""

    groups: list[Group]
    differing: dict[str, list[Any]]

    @property
    def measures(self) -> list[Measure]:
        """Every measure that a run has, in the order of their steps."""
        return list(dict.fromkeys(measure for group in self.groups for run in group.runs for measure in run.values))


def compare_runs(home: Home, names: list[str]) -> Comparison:
    """Compares runs, named as in `find_run`. Raises EclectusError for an unknown one."""
    with connect(home) as connection:
        chosen = list(dict.fromkeys(find_run(connection, name) for name in names))
        runs = [_read(connection, run) for run in chosen]
    groups: dict[str, Group] = {}
    for run in runs:
        same = json.dumps({key: value for key, value in run.settings.items() if key not in SEEDS}, sort_keys=True)
        groups.setdefault(same, Group(LETTERS[len(groups) % len(LETTERS)])).runs.append(run)
    listed = list(groups.values())
    keys = dict.fromkeys(key for group in listed for key in group.runs[0].settings)
    differing = {}
    for key in keys:
        values = [group.runs[0].settings.get(key) for group in listed]
        if key not in SEEDS and values.count(values[0]) < len(values):
            differing[key] = values
    return Comparison(listed, differing)


def measure_name(measure: Measure) -> str:
    """'evaluate lory: bits_per_byte, language el'."""
    label, name, of = measure
    return f"{label}: {name}{f', {of}' if of else ''}"


def _read(connection: duckdb.DuckDBPyConnection, run: str) -> ComparedRun:
    ((state, parameters, code),) = connection.execute(
        "select state, parameters, code_version from runs where run = ?", [run]
    ).fetchall()
    # For each step, the step that made the artifact that this run used: itself, or an earlier one if it was reused.
    rows = connection.execute(
        """
        with used as (
            select s.label, coalesce(a.made_by, s.step) as maker, s.started
            from steps s join step_outputs o using (step) join artifacts a on a.artifact = o.artifact
            where s.run = ? and s.state in ('completed', 'reused'))
        select u.label, u.maker, m.name, m.at_step, m.tags, arg_max(m.value, m.logged), min(u.started) as started
        from used u join metrics m on m.step = u.maker
        where m.value is not null
        group by u.label, u.maker, m.name, m.at_step, m.tags order by started, u.label, m.name, m.at_step
        """,
        [run],
    ).fetchall()
    values: dict[Measure, dict[str, float]] = defaultdict(dict)
    curves: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for full_label, maker, name, at_step, tags, value, _ in rows:
        of = ", ".join(f"{key} {tag}" for key, tag in sorted((tags or {}).items()))
        label = FURTHER.sub("", full_label)
        values[label, name, of][maker] = value
        if at_step is not None and name in CURVES and not of:
            curves[label, name][full_label.removeprefix(label)].append((at_step, value))
    settings = json.loads(parameters or "{}") | {"code version": code}
    return ComparedRun(run, state, settings, dict(values), dict(curves))
