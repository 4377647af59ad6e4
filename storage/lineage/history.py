"""Lineage of the models in a report: what they were made from, their loss curves, settings and versions.

Read through DuckDB's views (eclectus.storage.lineage.connection). A reused model has the curves of the run that made
it. Only what is equal in every run that makes these models is read: no dates, durations or machines.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.home import Home

if TYPE_CHECKING:
    import duckdb

CURVES = (
    "loss",
    "next_token_loss",
    "balance_loss",
    "lpr_loss",
    "router_entropy",
    "expert_utilisation",
    "learning_rate",
)


@dataclass(frozen=True)
class Made:
    """An artifact and the step that made it. inputs: digests of what the step read, by the input's name."""

    artifact: str
    kind: str
    step: str
    label: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    statistics: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.artifact[:12]}"


@dataclass
class History:
    """made: by digest, everything upstream of the models and they themselves, inputs before outputs.

    curves: by digest of a checkpoint and metric, [(training step, value)]. run: code version, Python and packages of
    the run that writes the report.
    """

    made: dict[str, Made] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def steps(self, name: str) -> list[Made]:
        """The artifacts made by steps of this function."""
        return [each for each in self.made.values() if each.step == name]

    def chain(self, digest: str) -> list[str]:
        """A checkpoint and the checkpoints that it was trained from, itself last."""
        chain: list[str] = []
        while digest in self.made:
            chain.insert(0, digest)
            before = [other for other in self.made[digest].inputs.values() if self._is_checkpoint(other)]
            if not before:
                break
            digest = before[0]
        return chain

    def _is_checkpoint(self, digest: str) -> bool:
        return digest in self.made and self.made[digest].kind == "checkpoint"


def read_history(home: Home, run: str, artifacts: list[Artifact]) -> History:
    """The history of these artifacts, from the journals of a home."""
    from eclectus.storage.lineage.connection import connect

    with connect(home) as connection:
        makers = _makers(connection)
        history = History(run=_run(connection, run))
        history.made = _upstream(makers, [artifact.digest for artifact in artifacts])
        steps = {makers[digest]["step"]: digest for digest in history.made if digest in makers}
        history.curves = _curves(connection, steps)
        return history


def read_makers(home: Home, writes: bool = True) -> dict[str, dict[str, Any]]:
    """By digest: the step that made each artifact of a home, for `made_upstream`. writes: as in `connect`."""
    from eclectus.storage.lineage.connection import connect

    if not home.journal.is_dir():
        return {}
    with connect(home, writes) as connection:
        return _makers(connection)


def made_upstream(makers: dict[str, dict[str, Any]], digests: list[str]) -> dict[str, Made]:
    """By digest, everything upstream of these and they themselves, inputs before outputs."""
    return _upstream(makers, digests)


def _makers(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, Any]]:
    """By digest: the step that made the artifact, else one that reused it, with settings, inputs and statistics.

    A checkpoint of this home that was given as a base is `fetch`'s too; what trained it says more.
    """
    rows = connection.execute(
        """
        select o.artifact, o.kind, s.step, s.name, s.label, a.statistics
        from step_outputs o join steps s using (step) join artifacts a using (artifact)
        order by o.artifact, s.state = 'completed', s.name != 'fetch', s.ended
        """
    ).fetchall()
    makers = {
        artifact: {
            "kind": kind, "step": step, "name": name, "label": label, "statistics": json.loads(statistics or "{}"),
            "settings": {}, "inputs": {},
        }
        for artifact, kind, step, name, label, statistics in rows
    }  # fmt: skip
    by_step = {maker["step"]: maker for maker in makers.values()}
    for step, name, value in connection.execute("select step, name, value from settings order by name").fetchall():
        if step in by_step:
            by_step[step]["settings"][name] = json.loads(value)
    query = "select step, name, artifact from step_inputs order by step, name"
    for step, name, artifact in connection.execute(query).fetchall():
        if step in by_step:
            by_step[step]["inputs"][name] = artifact
    return makers


def _upstream(makers: dict[str, dict[str, Any]], digests: list[str]) -> dict[str, Made]:
    """Depth first, so that every artifact comes after what it was made from."""
    made: dict[str, Made] = {}
    waiting = [(digest, False) for digest in reversed(digests)]
    while waiting:
        digest, ready = waiting.pop()
        if digest in made or digest not in makers:
            continue
        maker = makers[digest]
        inputs = {name: other for name, other in maker["inputs"].items() if other in makers}
        if not ready:
            waiting.append((digest, True))
            waiting += [(other, False) for _, other in sorted(inputs.items(), reverse=True) if other not in made]
            continue
        made[digest] = Made(
            digest, maker["kind"], maker["name"], maker["label"], maker["settings"], inputs, maker["statistics"]
        )
    return made


def _curves(
    connection: duckdb.DuckDBPyConnection, steps: dict[str, str]
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    curves: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    rows = connection.execute(
        """
        select step, name, at_step, last(value order by logged) from metrics
        where at_step is not null and value is not null and list_contains(?, step) and list_contains(?, name)
        group by step, name, at_step order by step, name, at_step
        """,
        [list(steps), list(CURVES)],
    ).fetchall()
    for step, name, at_step, value in rows:
        curves[steps[step]][name].append((at_step, value))
    return {digest: dict(each) for digest, each in curves.items()}


def _run(connection: duckdb.DuckDBPyConnection, run: str) -> dict[str, Any]:
    row = connection.execute(
        "select flow, parameters, code_version, python, packages from runs where run = ?", [run]
    ).fetchone()
    if row is None:
        return {}
    flow, parameters, code, python, packages = row
    return {
        "flow": flow,
        "parameters": json.loads(parameters or "{}"),
        "code_version": code,
        "python": python,
        "packages": json.loads(packages or "{}"),
    }
