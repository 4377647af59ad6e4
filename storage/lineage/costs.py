"""What steps took when they last ran with settings like these."""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.storage.secrets import scrubbed

if TYPE_CHECKING:
    import duckdb

# Of each step, the latest that are compared.
LATEST = 200


@dataclass(frozen=True)
class Cost:
    seconds: float
    ended: datetime.datetime


def last_costs(home: Home, wanted: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Cost | None]:
    """The cost of each (step, label, settings), in order: of the step of that name with the fewest other settings.

    Of several, the latest of the same label counts, else the latest. None for steps that never ran here. Nothing is
    written into the home.
    """
    if not wanted or not home.journal.is_dir():
        return [None] * len(wanted)
    with connect(home, writes=False) as connection:
        rows = connection.execute(
            """
            select step, name, label, seconds, ended from steps
            where state = 'completed' and list_contains(?, name) and seconds is not null
            qualify row_number() over (partition by name order by ended desc) <= ? order by ended
            """,
            [[name for name, _, _ in wanted], LATEST],
        ).fetchall()
        settings = settings_by_step(connection, [row[0] for row in rows])
    return [_nearest(name, label, scrubbed(given), rows, settings) for name, label, given in wanted]


def settings_by_step(connection: duckdb.DuckDBPyConnection, steps: list[str]) -> dict[str, dict[str, Any]]:
    """The settings of steps that went into their keys, by name; empty for a step without any."""
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    query = "select step, name, value from settings where list_contains(?, step)"
    for step, name, value in connection.execute(query, [steps]).fetchall():
        settings[step][name] = json.loads(value)
    return settings


def _nearest(
    name: str, label: str, given: dict[str, Any], rows: list[tuple[Any, ...]], settings: dict[str, dict[str, Any]]
) -> Cost | None:
    best: tuple[int, bool] | None = None
    found = None
    for step, made_by, of_label, seconds, ended in rows:
        if made_by != name:
            continue
        others = settings[step]
        different = sum(given.get(key) != others.get(key) for key in given.keys() | others.keys())
        rank = -different, of_label == label
        if best is None or rank >= best:
            best, found = rank, Cost(seconds, ended)
    return found
