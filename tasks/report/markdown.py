"""The report as Markdown, for pull requests: verdict, tables, samples and settings, with links to the pictures."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eclectus.tasks.report.contents import Contents
    from eclectus.tasks.report.tables import Cell, Facts, Table

_ACTIVE = re.compile(r"([\\`*_\[\]|~#!])")


def write_markdown(contents: Contents) -> str:
    """The whole report as GitHub-flavoured Markdown; no text of a user becomes markup in it."""
    parts = [f"# {safe(contents.title)}", safe(contents.subtitle)]
    parts.append(f"**{safe(contents.verdict.headline)}**")
    parts += [f"- **{safe(tile.value)}** {safe(tile.what)} ({safe(tile.detail)})" for tile in contents.verdict.tiles]
    parts += [safe(sentence) for sentence in contents.verdict.sentences]
    parts += [f"*{safe(note)}*" for note in contents.verdict.notes]
    parts += ["## Scores", *map(table_markdown, [*contents.gates, *contents.tables])]
    if contents.score_charts:
        parts += ["![Scores](pictures/scores.png)"]
    if contents.loss_charts:
        parts += ["## Training", "![Training loss](pictures/loss.png)"]
    if contents.routing:
        parts += ["## Routing"]
        parts += [f"**{safe(part.title)}.** {safe(part.text)}" for part in contents.routing]
        parts += [table_markdown(part.table) for part in contents.routing if part.table]
        parts += ["![Routing](pictures/routing.png)"]
    if contents.samples:
        parts += ["## Samples"]
        for sample in contents.samples:
            lines = [f"**{safe(sample.title)}**", "", f"> {safe(sample.prompt)}", ""]
            parts.append("\n".join([*lines, *(f"- {safe(each.name)}: {safe(each.text)}" for each in sample.texts)]))
    parts += ["## Data and models", table_markdown(contents.documents), *map(facts_markdown, contents.data)]
    parts += [table_markdown(table) for table in (contents.instances, contents.models) if table is not None]
    parts += ["## Settings and versions", *map(facts_markdown, contents.settings)]
    if contents.versions:
        parts.append("Versions: " + ", ".join(f"{safe(name)} {safe(value)}" for name, value in contents.versions))
    return "\n\n".join(parts).replace(")\n\n- **", ")\n- **") + "\n"


def table_markdown(table: Table) -> str:
    lines = [f"| {' | '.join(safe(name) for name in table.head)} |", f"|---|{'---:|' * (len(table.head) - 1)}"]
    for row in table.rows:
        cells = (f"{safe(cell.text)}{_small(cell)}" for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    note = f"\n\n{safe(table.note)}" if table.note else ""
    return f"### {safe(table.title)}\n\n" + "\n".join(lines) + note


def _small(cell: Cell) -> str:
    lines = [safe(line) for line in (cell.small, cell.more) if line]
    return f" ({', '.join(lines)})" if lines else ""


def facts_markdown(facts: Facts) -> str:
    return f"**{safe(facts.title)}**: " + "; ".join(f"{safe(name)} {safe(value)}" for name, value in facts.pairs)


def safe(text: str) -> str:
    """One line with HTML and Markdown in it escaped."""
    return _ACTIVE.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
