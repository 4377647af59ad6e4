"""How a report is written: one HTML page that refers to nothing outside itself, and Markdown for pull requests."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.tasks.report.drawing import draw_svg

if TYPE_CHECKING:
    from eclectus.tasks.report.contents import Contents, Sample
    from eclectus.tasks.report.tables import Cell, Facts, Table

HERE = Path(__file__).parent
_ACTIVE = re.compile(r"([\\`*_\[\]|~#!])")


def render(template: str, **values: Any) -> str:
    """The page of a template in this folder, with its style, script and charts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters["svg"] = draw_svg
    return environment.get_template(template).render(
        **values,
        css=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup((HERE / "page.js").read_text("utf-8")),
    )


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
        parts += ["## Samples", *map(_sample_markdown, contents.samples)]
    if contents.chat:
        parts += ["## Chat", safe(contents.chat_text), *map(_sample_markdown, contents.chat)]
    parts += ["## Data and models", table_markdown(contents.documents), *map(facts_markdown, contents.data)]
    parts += [table_markdown(table) for table in (contents.instances, contents.models) if table is not None]
    parts += ["## Settings and versions", *map(facts_markdown, contents.settings)]
    if contents.versions:
        parts.append("Versions: " + ", ".join(f"{safe(name)} {safe(value)}" for name, value in contents.versions))
    return "\n\n".join(parts).replace(")\n\n- **", ")\n- **") + "\n"


def _sample_markdown(sample: Sample) -> str:
    lines = [f"**{safe(sample.title)}**", "", f"> {safe(sample.prompt)}", ""]
    return "\n".join([*lines, *(f"- {safe(each.name)}: {safe(each.text)}" for each in sample.texts)])


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
