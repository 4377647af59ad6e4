"""Champions and challengers: which checkpoints were promoted or refused, and why, by line ("extended", "lory").

Every decision is one line in the journal's stream `decisions`, so any number of processes can decide and nothing is
overwritten: the champion of a line is the last one promoted. DuckDB shows them as `decisions` and `champions`.
"""

from __future__ import annotations

import getpass
import json
import uuid
from dataclasses import asdict, dataclass, field
from typing import Any

from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.connection import connect

PROMOTED, REFUSED = "promoted", "refused"


@dataclass(frozen=True)
class Decision:
    """One decision on one checkpoint.

    line: of champions. verdict: PROMOTED or REFUSED. checkpoint: digest. evaluations: digests by kind (`text`, `tasks`,
    `contamination`, `imported`, `imported 2` ...). gate: digest of the artifact with rules and numbers, or None where a
    user decided. rules: the result of each (tasks/promotion/gate_rules.py). by: `gate` or the user's name.
    """

    line: str
    verdict: str
    checkpoint: str
    reason: str
    evaluations: dict[str, str] = field(default_factory=dict)
    gate: str | None = None
    rules: list[dict[str, Any]] = field(default_factory=list)
    by: str = "gate"
    run: str | None = None
    logged: str | None = None


def record(home: Home, decision: Decision, run: str | None = None) -> None:
    """Writes a decision into the journal; on disk when this returns. run: the run that it belongs to, if any."""
    with Journal(home.journal, run or f"decision-{uuid.uuid4().hex[:8]}", home.mirror) as journal:
        row = asdict(decision)
        journal.decision(**{name: value for name, value in row.items() if name not in ("run", "logged")})


def champion(home: Home, line: str) -> Decision | None:
    """The last one promoted in a line; None while there is none."""
    found = [each for each in decisions(home, line) if each.verdict == PROMOTED]
    return found[-1] if found else None


def decisions(home: Home, line: str | None = None, writes: bool = True) -> list[Decision]:
    """All decisions, first to last; of one line where it is given. writes: as in `connect`."""
    if not home.journal.is_dir():
        return []
    with connect(home, writes) as connection:
        rows = connection.execute(
            """
            select line, verdict, checkpoint, reason, evaluations, gate, rules, "by", run, logged::varchar
            from decisions where ? is null or line = ? order by logged
            """,
            [line, line],
        ).fetchall()
    found = []
    for named, verdict, checkpoint, reason, evaluations, gate, rules, by, run, logged in rows:
        digests, outcomes = json.loads(evaluations or "{}"), json.loads(rules or "[]")
        found.append(Decision(named, verdict, checkpoint, reason, digests, gate, outcomes, by, run, logged))
    return found


def user_name() -> str:
    """The name recorded with a user's decision."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown user"
