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
from eclectus.storage.lineage.connection import connect, read_once
from eclectus.storage.lineage.runs import find_runs

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
    """Compares runs, named as in `find_runs`. Raises EclectusError for an unknown one."""
    with connect(home) as connection:
        read_once(connection)
        chosen = list(dict.fromkeys(find_runs(connection, names)))
        about = connection.execute(
            "select run, state, parameters, code_version from runs where run in (select unnest($1::varchar[]))",
            [chosen],
        ).fetchall()
        used = _used(connection, chosen)
    # The metrics of a step are in the journal of its run, and those of the other runs are not read.
    with connect(home, runs={maker_run for *_, maker_run in used}) as connection:
        metrics = _metrics(connection, {maker for _, _, maker, _ in used})
    measured: dict[str, list[tuple[Any, ...]]] = {run: [] for run in chosen}
    for of, label, maker, _ in used:
        measured[of] += [(label, maker, *row) for row in metrics[maker]]
    found = {name: (state, parameters, code) for name, state, parameters, code in about}
    runs = [_compared(name, *found[name], measured[name]) for name in chosen]
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


def _used(connection: duckdb.DuckDBPyConnection, runs: list[str]) -> list[tuple[str, str, str, str]]:
    """(run, label, maker, run of the maker) of each step that ended well, in the order of their starts.

    The maker is the step that made the artifact: the step itself, or an earlier one's where it was reused.
    """
    return connection.execute(
        """
        with used as (
            select s.run, s.label, coalesce(a.made_by, s.step) as maker, s.started
            from steps s join step_outputs o using (step) join artifacts a on a.artifact = o.artifact
            where s.run in (select unnest($1::varchar[])) and s.state in ('completed', 'reused'))
        select u.run, u.label, u.maker, any_value(o.run) from used u join step_outputs o on o.step = u.maker
        group by u.run, u.label, u.maker order by min(u.started), u.label
        """,
        [runs],
    ).fetchall()


def _metrics(connection: duckdb.DuckDBPyConnection, steps: set[str]) -> dict[str, list[tuple[Any, ...]]]:
    """By step: (name, step of training, tags, last value)."""
    rows = connection.execute(
        """
        select step, name, at_step, tags, arg_max(value, logged) from metrics
        where value is not null and step in (select unnest($1::varchar[]))
        group by step, name, at_step, tags order by name, at_step
        """,
        [sorted(steps)],
    ).fetchall()
    found = defaultdict(list)
    for step, *row in rows:
        found[step].append(tuple(row))
    return found


def _compared(run: str, state: str, parameters: str | None, code: str, rows: list[tuple[Any, ...]]) -> ComparedRun:
    values: dict[Measure, dict[str, float]] = defaultdict(dict)
    curves: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for full_label, maker, name, at_step, tags, value in rows:
        of = ", ".join(f"{key} {tag}" for key, tag in sorted((tags or {}).items()))
        label = FURTHER.sub("", full_label)
        values[label, name, of][maker] = value
        if at_step is not None and name in CURVES and not of:
            curves[label, name][full_label.removeprefix(label)].append((at_step, value))
    settings = json.loads(parameters or "{}") | {"code version": code}
    return ComparedRun(run, state, settings, dict(values), dict(curves))
