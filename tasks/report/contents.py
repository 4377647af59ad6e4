"""Everything that the report shows, put together once for the page and its Markdown version."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.lineage.history import History
from eclectus.tasks.documents.language_codes import language_name, shortened
from eclectus.tasks.evaluation.scores import Scores, divergence
from eclectus.tasks.evaluation.task_scores import Answers
from eclectus.tasks.report import figures, tables
from eclectus.tasks.report.chart import Chart
from eclectus.tasks.report.forgetting import forgetting_table, tasks_table
from eclectus.tasks.report.formatting import count, listed
from eclectus.tasks.report.tables import Facts, Table
from eclectus.tasks.report.verdict import LORY, Comparer, Verdict, make_verdict


@dataclass
class RoutingPart:
    """A heading with the charts and the table of one model's routers."""

    title: str
    text: str
    charts: list[Chart]
    table: Table | None = None


@dataclass(frozen=True)
class Continuation:
    """A text that follows a prompt. routing: the routers' weights on the prompt, one line per layer; empty if dense."""

    name: str
    text: str
    routing: tuple[str, ...] = ()


@dataclass
class Sample:
    title: str
    language: str
    prompt: str
    texts: list[Continuation]


@dataclass
class Contents:
    """Everything that the page and its Markdown version show."""

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
    chat: list[Sample] = field(default_factory=list)
    chat_text: str = ""
    score_charts: list[Chart] = field(default_factory=list)
    loss_charts: list[Chart] = field(default_factory=list)
    routing: list[RoutingPart] = field(default_factory=list)

    @property
    def routing_charts(self) -> list[Chart]:
        return [chart for part in self.routing for chart in part.charts]


@dataclass(frozen=True)
class Extras:
    """Results other than held-out scores: tasks by model, decisions of gates, models that were not evaluated."""

    answers: dict[str, Answers]
    gates: list[dict[str, Any]]
    left_out: list[str]

    def notes(self) -> list[str]:
        """What is missing and why, each once."""
        tasks = {f"task {task}: {why}" for each in self.answers.values() for task, why in each.left_out.items()}
        return [*self.left_out, *sorted(tasks)]


def collect_contents(
    comparer: Comparer,
    checkpoints: dict[str, Artifact],
    documents: Artifact,
    grouping: Artifact | None,
    instances: dict[str, Artifact],
    history: History,
    extras: Extras,
    title: str,
    samples: int,
) -> Contents:
    """The contents of the report. samples: how many of each language are shown."""
    base = comparer.base
    digests = {name: checkpoint.digest for name, checkpoint in checkpoints.items()}
    subtitle = (
        f"Models: {listed(list(comparer.scores))}. Scored on {count(len(base.document))} held-out documents in "
        f"{len(base.values('language'))} languages ({count(base.tokens.sum())} tokens of {base.name}, windows of "
        f"{base.about['window']})."
    )
    forgetting, tasks = forgetting_table(comparer, extras.answers), tasks_table(extras.answers, comparer.seen)
    by_domain = tables.scores_by_domain(comparer) if base.domains(group="original") else None
    by_language = tables.scores_by_language(comparer)
    shown = (forgetting, by_domain, by_language, tables.cost_table(comparer), tasks, tables.seen_table(comparer))
    verdict = make_verdict(comparer, _frozen(checkpoints, history), extras.gates)
    verdict.notes += [f"Not evaluated: {each}" for each in extras.notes()]
    verdict.notes += [note for each in extras.answers.values() for note in each.notes]
    return Contents(
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        tables=[each for each in shown if each],
        gates=[tables.gate_table(each) for each in extras.gates],
        documents=tables.documents_table(documents),
        instances=tables.instances_table(instances),
        models=tables.models_table(comparer.scores, checkpoints),
        data=tables.data_facts(documents, grouping, history),
        settings=tables.settings_facts(history),
        versions=tables.version_pairs(history),
        samples=_samples(comparer.scores, samples),
        chat=chat_samples(comparer.scores),
        chat_text=chat_summary(comparer.scores),
        score_charts=figures.score_charts(comparer),
        loss_charts=figures.loss_curves(history, digests),
        routing=_routing(comparer.scores, figures.router_curves(history, digests)),
    )


def _frozen(checkpoints: dict[str, Artifact], history: History) -> bool | None:
    """Whether the original weights are bit-identical after the extension; None if there was no extension."""
    before = {made.statistics.get("base_digest") for made in history.steps("upcycle")}
    after = {each.statistics["frozen_sha256"] for each in checkpoints.values() if "frozen_sha256" in each.statistics}
    return after == before if after and before else None


def _routing(scores: dict[str, Scores], curves: list[Chart]) -> list[RoutingPart]:
    """The routers of every routed model on held-out text, and over training (`curves`)."""
    routed = {name: each for name, each in scores.items() if each.routing}
    parts = [_routers(each, number) for number, each in enumerate(routed.values())]
    mixtures = {name: each for name, each in routed.items() if not _is_lory(each)}
    text = (
        "The review should route tokens of the original languages back to the original network, "
        "and leave those of the new languages where they are."
    )
    expert_0 = figures.expert_0(mixtures, list(scores))
    parts.append(RoutingPart("Expert 0, the frozen original", text, expert_0))
    text = "As logged in training, on the instances of each step."
    parts.append(RoutingPart("Routers over training", text, curves))
    return [part for part in parts if part.charts]


def _routers(scores: Scores, number: int) -> RoutingPart:
    if _is_lory(scores):
        text = (
            "Mean mixture weight of each expert over the segments of a domain's held-out text. Mean Jensen-Shannon "
            f"divergence between domains, in bits: {_divergences(scores, 'domain', group='original')}."
        )
        charts = figures.lory_routing(scores, f"routing-{number}")
        return RoutingPart(f"{scores.name}: experts by domain", text, charts, tables.routing_table(scores))
    text = (
        "Mean router probability of each expert over the tokens of a language. Mean Jensen-Shannon divergence "
        f"between languages, in bits: {_divergences(scores, 'language')}."
    )
    charts = figures.moe_routing(scores, f"routing-{number}")
    return RoutingPart(f"{scores.name}: experts by language", text, charts, tables.routing_table(scores))


def _is_lory(scores: Scores) -> bool:
    return scores.name == LORY or scores.about["model"].startswith("Lory")


def _divergences(scores: Scores, label: str, **groups: str) -> str:
    return ", ".join(
        f"layer {layer} {divergence(scores.shares(label, layer, **groups)):.3f}"
        for layer in figures.shown_layers(scores.layers)
    )


def _samples(scores: dict[str, Scores], most: int) -> list[Sample]:
    """Samples of the prompts that all models continued, side by side; at most that many per language."""
    first = next(iter(scores.values()))
    seen: dict[str, int] = {}
    samples = []
    for sample in first.samples:
        seen[sample["language"]] = seen.get(sample["language"], 0) + 1
        if seen[sample["language"]] > most:
            continue
        texts = [Continuation("original document", _shown(sample["original"]))]
        for name, each in scores.items():
            texts += _continuations(name, each, sample)
        title = f"{language_name(sample['language'])}, {shortened(sample['domain'])}"
        samples.append(Sample(title, sample["language"], _shown(sample["prompt"]), texts))
    return samples


def _continuations(name: str, scores: Scores, sample: dict[str, Any]) -> list[Continuation]:
    """What a model wrote for a sample. Where its tokenizer cut another prompt off the document, that is shown too."""
    texts = []
    for each in scores.samples:
        if each["document"] == sample["document"]:
            given = "" if each["prompt"] == sample["prompt"] else f"[after: {_shown(each['prompt'])}] "
            texts.append(Continuation(name, given + _shown(each["written"]), _weights(each["routing"])))
    return texts


def _weights(layers: list[list[float]]) -> tuple[str, ...]:
    """The weights that merged Lory's experts, or a mixture's mean router probabilities, for a sample's prompt."""
    lines = []
    for number, weights in enumerate(layers):
        numbers = " ".join(f"{weight:.2f}" for weight in weights)
        lines.append(f"layer {number}: {numbers}")
    return tuple(lines)


def _shown(text: str) -> str:
    """A text as it is, but with long runs of line breaks counted instead of shown."""
    shown = re.sub(r"\s*\n(?:\s*\n){2,}", lambda run: f" [{run[0].count(chr(10))} line breaks] ", text)
    return shown.strip() or "(nothing)"


def chat_samples(scores: dict[str, Scores]) -> list[Sample]:
    """The answers of all models with a chat template, by instruction."""
    chatting = {name: each.chat for name, each in scores.items() if each.chat}
    instructions = [row["instruction"] for row in next(iter(chatting.values()), [])]
    samples = []
    for number, instruction in enumerate(instructions):
        texts = []
        for name, answers in chatting.items():
            row = next((row for row in answers if row["instruction"] == instruction), None)
            if row is not None:
                texts.append(Continuation(name, f"{row['answer'] or '(nothing)'}{'' if row['ended'] else ' […]'}"))
        samples.append(Sample(f"Instruction {number + 1}", "en", instruction, texts))
    return samples


def chat_summary(scores: dict[str, Scores]) -> str:
    """What the answers have in common with those of the first model, and which models have no template."""
    chatting = {name: each.chat for name, each in scores.items() if each.chat}
    if not chatting:
        return ""
    first, *others = chatting
    text = (
        "Ten fixed instructions, put by each model's own chat template and answered greedily; […] marks an answer that "
        f"the model did not end. {_ended(first, scores)}."
    )
    for name in others:
        same = sum(one["answer"] == two["answer"] for one, two in zip(chatting[first], chatting[name], strict=False))
        shared = sum(
            _overlap(one["answer"], two["answer"]) for one, two in zip(chatting[first], chatting[name], strict=False)
        ) / len(chatting[first])
        text += (
            f" {_ended(name, scores)}; {same} are word for word those of {first}, with which its answers share "
            f"{shared:.0%} of their words."
        )
    if without := [name for name in scores if name not in chatting]:
        text += f" No chat template that could be used: {listed(without)}."
    return text


def _ended(name: str, scores: dict[str, Scores]) -> str:
    answers = scores[name].chat
    return f"{name} ends {sum(row['ended'] for row in answers)} of {len(answers)} answers"


def _overlap(one: str, two: str) -> float:
    """Words that both texts have, over the words of either: 1 for the same words, 0 for none in common."""
    ones, twos = set(one.lower().split()), set(two.lower().split())
    return len(ones & twos) / len(ones | twos) if ones or twos else 1.0
