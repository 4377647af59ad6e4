"""The report: one HTML page that opens offline: what was gained, what was forgotten, and how the models were made.

    verdict            sentences and the numbers that the page opens with
    tables, figures    tables and charts; graph: the lineage
    contents           all of it, once for the page and its Markdown version
    drawing            charts as SVG for the page, as PNG for Markdown and Prefect
    page               HTML, style and script

Files: `report.html`, `report.md`, `tables.json`, `pictures/*.png`. Texts come from users' documents and models: the
template escapes all of them, and the page's content security policy blocks every request. Price: 3 s and 130 kB for
four models.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.history import History, read_history
from eclectus.tasks.evaluation.costs import read_costs
from eclectus.tasks.evaluation.scores import IntervalSettings, read_trainings
from eclectus.tasks.evaluation.task_scores import Answers
from eclectus.tasks.report.contents import Contents, Extras, collect_contents
from eclectus.tasks.report.drawing import draw_png
from eclectus.tasks.report.figures import colour
from eclectus.tasks.report.graph import draw_lineage
from eclectus.tasks.report.rendering import render, write_markdown
from eclectus.tasks.report.verdict import Comparer
from eclectus.tasks.run import current_run
from eclectus.tasks.step import step


class ReportSettings(IntervalSettings):
    """How the report is written."""

    report_title: str = Field("Eclectus report", description="Title of the report.")
    report_samples: int = Field(2, ge=0, description="Samples of each language that the report shows.")
    report_left_out: list[str] = Field(
        [], description="Models that could not be evaluated, with the reason; the flow fills this in."
    )


@step(makes="report", version=7)
def report(
    evaluations: dict[str, Artifact],
    checkpoints: dict[str, Artifact],
    documents: Artifact,
    settings: ReportSettings,
    out: Draft,
    grouping: Artifact | None = None,
    instances: dict[str, Artifact] | None = None,
    benchmarks: dict[str, Artifact] | None = None,
    contaminations: dict[str, Artifact] | None = None,
    gates: dict[str, Artifact] | None = None,
    repeats: dict[str, Artifact] | None = None,
    imported: dict[str, dict[str, Artifact]] | None = None,
) -> None:
    """Writes the report of these models: "dense", "lory", "stage 1", "stage 2" and any others by name.

    benchmarks, contaminations: by model (tasks/evaluation/benchmark.py, tasks/evaluation/contamination.py).
    gates: decisions by line (tasks/promotion/gate.py).
    repeats: evaluations of further trainings of these models, by name as "lory seed 1".
    imported: results of `lm_eval` by model and kind (tasks/evaluation/lm_eval_files/imported.py).
    """
    if not evaluations:
        raise EclectusError("a report needs at least one evaluated model; evaluate a checkpoint first")
    scores = read_trainings(evaluations, repeats)
    overlap = {name: _overlap(each) for name, each in (contaminations or {}).items() if name in scores}
    seen = {name: {what: row["share"] for what, row in rows.items()} for name, rows in overlap.items()}
    history = _history(list(checkpoints.values()))
    unknown = [name for name in scores if name not in overlap] if contaminations is not None else []
    unknown += ["the fetched base model"] * bool(history.steps("fetch"))
    comparer = Comparer(scores, seen, overlap, unknown, read_costs(checkpoints))
    asked: dict[str, dict[str, Artifact]] = {name: {**(imported or {}).get(name, {})} for name in scores}
    for name, each in (benchmarks or {}).items():
        asked.get(name, {})["tasks"] = each
    extras = Extras(
        {name: answers for name, each in asked.items() if (answers := Answers.of(name, each))},
        [each.statistics for each in (gates or {}).values()],
        settings.report_left_out,
    )
    given = {name: each for name, each in (instances or {}).items() if each is not None}
    contents = collect_contents(
        comparer,
        checkpoints,
        documents,
        grouping,
        given,
        history,
        extras,
        settings.report_title,
        settings.report_samples,
    )
    out.file("report.html").write_text(_page(contents, checkpoints, history, list(scores)), "utf-8")
    out.file("tables.json").write_text(json.dumps(_plain_tables(contents), ensure_ascii=False), "utf-8")
    out.file("report.md").write_text(write_markdown(contents), "utf-8")
    pictures = {"scores": contents.score_charts, "loss": contents.loss_charts, "routing": contents.routing_charts}
    for name, charts in pictures.items():
        if charts:
            out.file(f"pictures/{name}.png").write_bytes(draw_png(charts, columns=3))
    out.rows = len(scores)
    out.statistics = {
        "headline": contents.verdict.headline,
        "verdict": contents.verdict.sentences,
        "tiles": [asdict(tile) for tile in contents.verdict.tiles],
        "notes": contents.verdict.notes,
        "models": list(scores),
    }


def _plain_tables(contents: Contents) -> list[dict[str, Any]]:
    """The tables of scores as rows of text, for Prefect's UI."""
    plain = []
    for table in [*contents.gates, *contents.tables]:
        rows = []
        for row in table.rows:
            texts = (f"{cell.text} {cell.small}".strip() for cell in row)
            rows.append(dict(zip(table.head, texts, strict=True)))
        plain.append({"title": table.title, "rows": rows})
    return plain


def _overlap(contamination: Artifact) -> dict[tuple[str, str], dict[str, Any]]:
    """How much was seen in training, by kind and name of what was scored."""
    rows = pq.read_table(contamination.file("shares.parquet")).to_pylist()
    return {(row["kind"], row["name"]): row for row in rows}


def _history(checkpoints: list[Artifact]) -> History:
    """Empty outside a run: then the page has neither curves nor lineage."""
    run = current_run()
    return read_history(run.home, run.id, checkpoints) if run is not None else History()


def _page(contents: Contents, checkpoints: dict[str, Artifact], history: History, names: list[str]) -> str:
    values: dict[str, Any] = {each.name: getattr(contents, each.name) for each in fields(contents)}
    lineage = draw_lineage(history.made, {checkpoint.digest: name for name, checkpoint in checkpoints.items()})
    sections = {
        "scores": "Scores",
        "training": "Training" if contents.loss_charts else "",
        "routing": "Routing" if contents.routing else "",
        "samples": "Samples" if contents.samples else "",
        "chat": "Chat" if contents.chat else "",
        "data": "Data and models",
        "lineage": "Lineage" if lineage else "",
        "settings": "Settings",
    }
    return render(
        "page.html.j2",
        **values,
        sections=[(anchor, name) for anchor, name in sections.items() if name],
        colours={name: colour(name, names) for name in names},
        lineage=lineage,
    )
