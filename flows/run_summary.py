"""The summary of a run on its page in the Prefect UI, as Markdown: its id, its steps in words, links, commands.

Pure functions from rows to text: no Prefect is imported here.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from eclectus.storage.commands import quoted_word
from eclectus.storage.secrets import scrub
from eclectus.tasks.run import Run

# States of steps in words.
HAPPENED = {"completed": "made", "reused": "reused", "failed": "failed", "cancelled": "cancelled"}
UNCHANGED = "nothing changed since it was made"
_SETTING = re.compile(r"settings\.(\w+) (.*) -> (.*)", re.S)
_INPUT = re.compile(r"input (.+) (\S+) -> (\S+)", re.S)
_VERSION = re.compile(r"version (\d+) -> (\d+)")
_PART = re.compile(r"; (?=settings\.\w+ |input \S|and \d+ more$)")
_DAMAGED = re.compile(r"[a-z]+-[0-9a-f]{12} is (gone|damaged)(?:: (.*))?", re.S)


@dataclass(frozen=True)
class Row:
    """One step of a run. reason: as the lineage has it. output: name of its artifact. page: address of its page."""

    step: str
    state: str
    seconds: float
    reason: str = ""
    output: str = ""
    page: str = ""

    @property
    def why(self) -> str:
        return why(self.state, self.reason)

    def cells(self) -> dict[str, Any]:
        """A row of a table in the Prefect UI."""
        happened = HAPPENED.get(self.state, self.state)
        return {
            "step": self.step, "result": happened, "seconds": round(self.seconds, 1), "why": self.why,
            "output": self.output,
        }  # fmt: skip


@dataclass(frozen=True)
class Link:
    name: str
    address: str
    what: str


def why(state: str, reason: str) -> str:
    """The reason of a step's state in words, without digests.

    reason: that of the lineage, as `settings.k 20 -> 32; input documents documents-1a2b -> documents-3c4d`, or
    `ERROR: message`.
    """
    if state in ("failed", "cancelled"):
        return re.sub(r"^(EclectusError|DamagedArtifact): ", "", reason)
    if state == "reused":
        return UNCHANGED
    if reason == "first time":
        return "it was never made before"
    if damaged := _DAMAGED.fullmatch(reason):
        gone, what = damaged.groups()
        return "its result was deleted" if gone == "gone" else f"its result was damaged ({what or 'unreadable'})"
    return "; ".join(_change(part) for part in _PART.split(reason))


def _change(part: str) -> str:
    if found := _SETTING.fullmatch(part):
        name, old, new = found.groups()
        # Long values are cut in the lineage's reason.
        cut = old.endswith("...") or new.endswith("...")
        return f"setting {name} changed" if cut else f"setting {name} changed from {old} to {new}"
    if found := _INPUT.fullmatch(part):
        name, old, new = found.groups()
        if "none" in (old, new):
            return f"{name} {'is a new input' if old == 'none' else 'is no longer an input'}"
        return f"{name} changed"
    if found := _VERSION.fullmatch(part):
        return f"the step's code has a new version ({found[1]} to {found[2]})"
    return part


def summary(run: Run, rows: list[Row], links: list[Link], ended: bool) -> str:
    """Markdown. rows: the steps that have ended. ended: whether the run has."""
    counts = Counter(HAPPENED.get(row.state, row.state) for row in rows)
    counted = ", ".join(f"{number} {name}" for name, number in counts.items())
    lines = [f"Run `{run.id}`: {'' if ended else 'so far '}{len(rows)} steps{f' ({counted})' if rows else ''}."]
    lines += [f"Step **{row.step}** {row.state}: {_cell(row.why)}" for row in rows if row.state == "failed"]
    lines += [f"[{link.name}]({link.address}): {link.what}" for link in links]
    lines += ["Ask about it in a terminal, where its home is:", "\n".join(["```", *questions(run, rows), "```"])]
    if rows:
        table = ["| step | result | seconds | why | output |", "|---|---|---|---|---|"]
        for row in rows:
            step = f"[{_cell(row.step)}]({row.page})" if row.page else _cell(row.step)
            others = [str(value) for name, value in row.cells().items() if name != "step"]
            table.append(f"| {step} | {' | '.join(map(_cell, others))} |")
        lines.append("\n".join(table))
    return "\n\n".join(lines)


def questions(run: Run, rows: list[Row]) -> list[str]:
    """Commands that answer what a user may ask about this run."""
    program = f"eclectus --home {quoted_word(scrub(run.home.name))}"
    asked = next((row.step for row in rows if row.state == "completed"), rows[0].step if rows else "ingest")
    return [
        f"{program} sql \"from steps where run = '{run.id}'\"",
        f"{program} why {run.id} {quoted_word(asked)}",
        f"{program} bundle {run.id}",
    ]


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table: nothing in it is Markdown, HTML or another cell.

    By entities, since the present UI shows the backslashes of escapes within links.
    """
    return re.sub(r"[\\`*\[\]|<>&]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
