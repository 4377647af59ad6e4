"""Which run a user means: its whole id, a unique start of one, `last`, or `last~N` (N runs before the last)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    import duckdb

SHOWN = 3


def find_run(connection: duckdb.DuckDBPyConnection, name: str) -> str:
    """The id of the run that `name` means. Raises EclectusError with the nearest ones if unknown or ambiguous."""
    return find_runs(connection, [name])[0]


def find_runs(connection: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[str]:
    """As `find_run`, for several, which reads the runs once."""
    rows = connection.execute("select run from runs order by started desc, run desc").fetchall()
    latest_first = [run for (run,) in rows]
    return [_find(latest_first, name) for name in names]


def _find(latest_first: list[str], name: str) -> str:
    if not latest_first:
        raise EclectusError(f"there is no run '{name}': this home has no runs yet")
    if name in latest_first:
        return name
    if name == "last" or name.startswith("last~"):
        return _count_back(latest_first, name)
    found = [run for run in latest_first if name and run.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise EclectusError(f"'{name}' is the start of {len(found)} runs, such as {_some(found)}; write more of it")
    near = difflib.get_close_matches(name, latest_first, n=SHOWN)
    hint = f"did you mean {_some(near)}?" if near else f"the latest are {_some(latest_first)}; see: {command('runs')}"
    raise EclectusError(f"there is no run '{name}'; {hint}")


def _count_back(latest_first: Sequence[str], name: str) -> str:
    back = re.fullmatch(r"last(?:~(\d+))?", name, re.ASCII)
    if not back:
        raise EclectusError(f"there is no run '{name}'; expected last or last~N, as in last~1")
    count = int(back[1] or 0)
    if count >= len(latest_first):
        runs = len(latest_first)
        known = "there is one run" if runs == 1 else f"there are {runs} runs, the first one is last~{runs - 1}"
        raise EclectusError(f"there is no run '{name}'; {known}")
    return latest_first[count]


def _some(runs: Sequence[str]) -> str:
    return ", ".join(runs[:SHOWN])
