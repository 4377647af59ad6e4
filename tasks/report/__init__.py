"""The report: one HTML page that opens offline and says what was gained, what was forgotten and how it came to be.

    evidence   sums and paired comparisons from the evaluations        history    curves, lineage, settings from the journals
    verdict    sentences and the numbers that the page opens with      tables, figures, graph, pictures    what is shown
    page       HTML, style and script; `markdown` its twin

Files: `report.html`, `report.md`, `tables.json`, `pictures/*.png`. Texts come from people's documents and models: the template escapes all of
them, and the page's content policy lets nothing leave it. Price: seconds, and 5 MB a page (plotly.js, inlined once).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.history import History, read_history
from eclectus.tasks.evaluation.scores import BootstrapSettings
from eclectus.tasks.run import current_run
from eclectus.tasks.step import step

if TYPE_CHECKING:
    from eclectus.tasks.evaluation.scores import Scores
    from eclectus.tasks.evaluation.task_scores import Answers
    from eclectus.tasks.report.figures import Figure
    from eclectus.tasks.report.tables import Facts, Table
    from eclectus.tasks.report.verdict import Comparer, Verdict


class ReportSettings(BootstrapSettings):
    """How the report is written."""

    report_title: str = Field("Eclectus report", description="Title of the report.")
    report_samples: int = Field(2, ge=0, description="Samples of each language that the report shows.")
    report_left_out: list[str] = Field(
        [], description="Models that could not be evaluated, with the reason; the flow fills this in."
    )


@dataclass
class RoutingPart:
    title: str
    text: str
    figures: list[Figure]
    small: bool = True
    table: Table | None = None


@dataclass(frozen=True)
class Written:
    """routing: what the routers did on the prompt, in words, a line a layer; empty for dense models."""

    name: str
    text: str
    routing: tuple[str, ...] = ()


@dataclass
class Sample:
    title: str
    language: str
    prompt: str
    texts: list[Written]


@dataclass
class Contents:
    """Everything that the page and its Markdown twin say."""

    title: str
    subtitle: str
    verdict: Verdict
    tables: list[Table]
    documents: Table
    instances: Table | None
    models: Table
    data: list[Facts]
    settings: list[Facts]
    versions: list[tuple[str, str]]
    gates: list[Table] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    score_figures: list[Figure] = field(default_factory=list)
    loss_figures: list[Figure] = field(default_factory=list)
    routing: list[RoutingPart] = field(default_factory=list)

    @property
    def figures(self) -> list[Figure]:
        return [*self.score_figures, *self.loss_figures, *(each for part in self.routing for each in part.figures)]


@dataclass(frozen=True)
class Beside:
    """What is known beside held-out text: answers to tasks by model, decisions of gates, and models that were left out."""

    answers: dict[str, Answers]
    gates: list[dict[str, Any]]
    left_out: list[str]

    def notes(self) -> list[str]:
        """What is missing and why, each once."""
        tasks = {
            f"task {task}: {why}" for each in self.answers.values() for task, why in each.about["left_out"].items()
        }
        return [*self.left_out, *sorted(tasks)]


@step(makes="report", version=2)
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
) -> None:
    """Writes the report over these models: "dense", "lory", "stage 1", "stage 2" and any others by name.

    benchmarks, contaminations: by model (tasks/evaluation/benchmark.py, tasks/evaluation/contamination.py). gates: decisions by line (tasks/promotion/gate.py).
    """
    from eclectus.tasks.evaluation.scores import Scores
    from eclectus.tasks.evaluation.task_scores import Answers
    from eclectus.tasks.report.markdown import write_markdown
    from eclectus.tasks.report.pictures import draw_pictures
    from eclectus.tasks.report.verdict import Comparer

    if not evaluations:
        raise EclectusError("a report needs at least one evaluated model; evaluate a checkpoint first")
    scores = {name: Scores.read(name, evaluation) for name, evaluation in evaluations.items()}
    seen = {name: _seen(each) for name, each in (contaminations or {}).items() if name in scores}
    comparer = Comparer(scores, settings.report_resamples, settings.seed, seen)
    beside = Beside(
        {name: Answers(name, each) for name, each in (benchmarks or {}).items() if name in scores},
        [each.statistics for each in (gates or {}).values()],
        settings.report_left_out,
    )
    given = {name: each for name, each in (instances or {}).items() if each is not None}
    history = _history(list(checkpoints.values()))
    contents = _contents(comparer, checkpoints, documents, grouping, given, history, settings, beside)
    out.file("report.html").write_text(_page(contents, checkpoints, history, comparer), "utf-8")
    out.file("tables.json").write_text(json.dumps(_plain_tables(contents), ensure_ascii=False), "utf-8")
    out.file("report.md").write_text(write_markdown(contents), "utf-8")
    draw_pictures(comparer, history, checkpoints, out.file("pictures/scores.png").parent)
    out.rows = len(scores)
    out.statistics = {
        "headline": contents.verdict.headline,
        "verdict": contents.verdict.sentences,
        "tiles": [asdict(tile) for tile in contents.verdict.tiles],
        "notes": contents.verdict.notes,
        "models": list(scores),
    }


def _plain_tables(contents: Contents) -> list[dict[str, Any]]:
    """The tables of scores as rows of words, for people who watch the run in Prefect."""
    return [
        {
            "title": table.title,
            "rows": [
                {name: f"{cell.text} {cell.small}".strip() for name, cell in zip(table.head, row, strict=True)}
                for row in table.rows
            ],
        }
        for table in [*contents.gates, *contents.tables]
    ]


def _seen(contamination: Artifact) -> dict[tuple[str, str], float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(contamination.file("shares.parquet")).to_pylist()
    return {(row["kind"], row["name"]): row["share"] for row in rows}


def _history(checkpoints: list[Artifact]) -> History:
    """Nothing outside a run: then the page has neither curves nor lineage."""
    run = current_run()
    return read_history(run.home, run.id, checkpoints) if run is not None else History()


def _contents(
    comparer: Comparer,
    checkpoints: dict[str, Artifact],
    documents: Artifact,
    grouping: Artifact | None,
    instances: dict[str, Artifact],
    history: History,
    settings: ReportSettings,
    beside: Beside,
) -> Contents:
    from eclectus.tasks.report import figures, tables
    from eclectus.tasks.report.forgetting import forgetting_table, tasks_table
    from eclectus.tasks.report.verdict import judge
    from eclectus.tasks.report.words import count, listed

    base = comparer.base
    digests = {name: checkpoint.digest for name, checkpoint in checkpoints.items()}
    subtitle = (
        f"Models: {listed(list(comparer.scores))}. Scored on {count(len(base.document))} held-out documents in "
        f"{len(base.values('language'))} languages ({count(base.tokens.sum())} tokens, windows of {base.about['window']})."
    )
    gained, asked = forgetting_table(comparer, beside.answers), tasks_table(beside.answers, comparer.seen)
    verdict = judge(comparer, _frozen(checkpoints, history), beside.gates)
    verdict.notes += [f"Left out: {each}" for each in beside.notes()]
    by_domain = [tables.scores_by_domain(comparer)] if base.values("domain", group="original") else []
    return Contents(
        title=settings.report_title,
        subtitle=subtitle,
        verdict=verdict,
        tables=[each for each in (gained, *by_domain, tables.scores_by_language(comparer), asked) if each],
        gates=[tables.gate_table(each) for each in beside.gates],
        documents=tables.documents_table(documents),
        instances=tables.instances_table(instances),
        models=tables.models_table(comparer.scores, checkpoints),
        data=tables.data_facts(documents, grouping, history),
        settings=tables.settings_facts(history),
        versions=tables.version_pairs(history),
        samples=_samples(comparer.scores, settings.report_samples),
        score_figures=[*figures.by_domain(comparer), *figures.by_language(comparer), *figures.by_position(comparer)],
        loss_figures=figures.loss_curves(history, digests),
        routing=[*_routing(comparer.scores), *_over_training(figures.router_curves(history, digests))],
    )


def _frozen(checkpoints: dict[str, Artifact], history: History) -> bool | None:
    """Whether the extended models hold the upcycled model's original weights bit by bit; None where nothing was extended."""
    before = {made.statistics.get("base_digest") for made in history.steps("upcycle")}
    after = {each.statistics["frozen_sha256"] for each in checkpoints.values() if "frozen_sha256" in each.statistics}
    return after == before if after and before else None


def _routing(scores: dict[str, Scores]) -> list[RoutingPart]:
    from eclectus.tasks.report import figures
    from eclectus.tasks.report.tables import routing_table
    from eclectus.tasks.report.verdict import LORY

    routed = {name: each for name, each in scores.items() if each.routing}
    parts = []
    for number, (name, each) in enumerate(routed.items()):
        if name == LORY or each.about["model"].startswith("Lory"):
            text = (
                "Mean mixture weight of each expert over the segments of a domain's held-out text. How far domains are apart, as "
                f"mean Jensen-Shannon divergence between them in bits: {_divergences(each, 'domain', group='original')}."
            )
            parts.append(
                RoutingPart(f"{name}: experts by domain", text, figures.lory_routing(each), table=routing_table(each))
            )
        else:
            text = (
                "Mean router probability of each expert over the tokens of a language. How far languages are apart, as mean "
                f"Jensen-Shannon divergence between them in bits: {_divergences(each, 'language')}."
            )
            parts.append(
                RoutingPart(
                    f"{name}: experts by language",
                    text,
                    figures.moe_routing(each, f"moe-{number}"),
                    table=routing_table(each),
                )
            )
    mixtures = {name: each for name, each in routed.items() if not each.about["model"].startswith("Lory")}
    if mixtures:
        text = "The review shall bring tokens of the original languages back to the original network, and leave the new ones where they are."
        parts.append(RoutingPart("Expert 0, the frozen original", text, figures.expert_0(mixtures), small=False))
    return [part for part in parts if part.figures]


def _over_training(curves: list[Figure]) -> list[RoutingPart]:
    text = "As the training steps journalled it, on the instances they were training on."
    return [RoutingPart("Routers over training", text, curves)] if curves else []


def _divergences(scores: Scores, label: str, **groups: str) -> str:
    from eclectus.tasks.evaluation.scores import divergence
    from eclectus.tasks.report.figures import shown_layers

    return ", ".join(
        f"layer {layer} {divergence(scores.shares(label, layer, **groups)):.3f}"
        for layer in shown_layers(scores.layers)
    )


def _samples(scores: dict[str, Scores], most: int) -> list[Sample]:
    """Samples of the prompts that all models continued, side by side."""
    from eclectus.tasks.documents.language_codes import language_name

    first = next(iter(scores.values()))
    seen: dict[str, int] = {}
    samples = []
    for sample in first.samples:
        key = (sample["document"], sample["prompt"])
        texts = [Written("the document itself", _shown(sample["original"]))]
        for name, each in scores.items():
            texts += [
                Written(name, _shown(other["written"]), _weights(other["routing"]))
                for other in each.samples
                if (other["document"], other["prompt"]) == key
            ]
        seen[sample["language"]] = seen.get(sample["language"], 0) + 1
        if seen[sample["language"]] <= most:
            title = f"{language_name(sample['language'])}, {sample['domain']}"
            samples.append(Sample(title, sample["language"], _shown(sample["prompt"]), texts))
    return samples


def _weights(layers: list[list[float]]) -> tuple[str, ...]:
    """The weights that merged Lory's experts, or a mixture's mean router probabilities, for a sample's prompt."""
    return tuple(
        f"layer {number}: {' '.join(f'{weight:.2f}' for weight in weights)}" for number, weights in enumerate(layers)
    )


def _shown(text: str) -> str:
    """A text as it is, but with long runs of line breaks told instead of shown."""
    told = re.sub(r"\s*\n(?:\s*\n){2,}", lambda run: f" [{run[0].count(chr(10))} line breaks] ", text)
    return told.strip() or "(nothing)"


def _page(contents: Contents, checkpoints: dict[str, Artifact], history: History, comparer: Comparer) -> str:
    from eclectus.tasks.report.figures import colour
    from eclectus.tasks.report.graph import draw
    from eclectus.tasks.report.page import render

    names = list(comparer.scores)
    values: dict[str, Any] = {name: getattr(contents, name) for name in contents.__dataclass_fields__}
    lineage = draw(history.made, {checkpoint.digest: name for name, checkpoint in checkpoints.items()})
    present = {
        "scores": "Scores", "training": "Training" if contents.loss_figures else "", "routing": "Routing" if contents.routing else "",
        "samples": "Samples" if contents.samples else "", "data": "Data and models",
        "lineage": "Lineage" if lineage else "", "settings": "Settings",
    }  # fmt: skip
    return render(
        "page.html.j2",
        contents.figures,
        **values,
        sections=[(anchor, name) for anchor, name in present.items() if name],
        colours={name: colour(name, names) for name in names},
        lineage=lineage,
    )
