"""The tables of the report, for the page and its Markdown version."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.storage.lineage.history import History
from eclectus.tasks.documents.language_codes import language_name, shortened
from eclectus.tasks.documents.table import parts, read_codes, read_part_table
from eclectus.tasks.evaluation.changes import Change
from eclectus.tasks.evaluation.costs import Cost, flops
from eclectus.tasks.evaluation.held_out import OTHER_DOMAINS
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.report.formatting import count, in_words, number, percent, size
from eclectus.tasks.report.significance import colour_note, coverage, tones
from eclectus.tasks.report.verdict import Comparer

SHOWN_KINDS = 200
LABELS_SHOWN = {"group": "", "language": "", "domain": "unknown"}
"""Columns by which documents are counted, and what stands for a missing label."""


@dataclass(frozen=True)
class Cell:
    """small: a second line, in small type. more: its rest, on wide screens. tone: good, bad, even or empty."""

    text: str
    small: str = ""
    more: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """head: the first column names the row, the others hold numbers. last: whether the last row is a total."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    last: bool = False
    note: str = ""


@dataclass
class Facts:
    """A heading with names and values under it."""

    title: str
    pairs: list[tuple[str, str]] = field(default_factory=list)


def scores_by_domain(comparer: Comparer) -> Table:
    """Bits per byte of every model on the original languages, by domain."""
    domains = comparer.base.domains(group="original")
    rows = [(Cell(shortened(domain)), {"group": "original", "domain": domain}) for domain in domains]
    if len(domains) > 1:
        rows.append((Cell("all"), {"group": "original"}))
    original = ", ".join(language_name(code) for code in comparer.base.values("language", group="original"))
    return _scores_table(f"By domain, original languages ({original})", "domain", comparer, rows, len(domains) > 1)


def scores_by_language(comparer: Comparer) -> Table:
    """Bits per byte of every model on every language."""
    rows = [
        (Cell(language_name(code), group), {"language": code})
        for group in ("original", "expanded")
        for code in comparer.base.values("language", group=group)
    ]
    return _scores_table("By language", "language", comparer, rows)


def _scores_table(
    title: str, first: str, comparer: Comparer, rows: list[tuple[Cell, dict[str, str]]], last: bool = False
) -> Table:
    """rows: the first cell, and the labels of the row's text."""
    changes = {
        (row, name): comparer.change(name, **labels) for row, (_, labels) in enumerate(rows) for name in comparer.scores
    }
    tints = tones(changes)
    cells = []
    for row, (head, labels) in enumerate(rows):
        scored = [
            _score_cell(each, changes[row, name], tints[row, name], labels) for name, each in comparer.scores.items()
        ]
        documents = count(int(comparer.base.where(**labels).sum()))
        cells.append([head, *scored, *_seen_cells(comparer, labels), Cell(documents)])
    several = " of several trainings the mean ± their standard deviation;" * any(
        each.repeats for each in comparer.scores.values()
    )
    note = (
        f"Bits per byte;{several} lower is better. Below each value: the change against the dense model, or the first "
        f"one, and the perplexity per token (ppl). {colour_note(changes.values())} Tested "
        f"{coverage(changes.values())}. Seen in training: documents with at least half of their eight-word sequences "
        "in training documents, for the model that saw most."
    )
    return Table(title, _scores_head(first, comparer), cells, last, note)


def _score_cell(scores: Scores, change: Change | None, tint: str, labels: dict[str, str]) -> Cell:
    perplexity, spread, value = scores.perplexity(**labels), scores.spread(**labels), scores.bits_per_byte(**labels)
    more = f"ppl {count(perplexity) if perplexity >= 1000 else f'{perplexity:.1f}'}" if perplexity else ""
    around = f" ± {spread * value:.3f}" if spread is not None and value is not None else ""
    return Cell(number(value) + around, percent(change.bits) if change else "", more, tint)


def _scores_head(first: str, comparer: Comparer) -> list[str]:
    return [first, *comparer.scores, *(["seen in training"] if comparer.seen else []), "documents"]


def _seen_cells(comparer: Comparer, labels: dict[str, str]) -> list[Cell]:
    """The largest share of this text that a model saw in training, where that is known."""
    if not comparer.seen:
        return []
    kind = next((each for each in ("language", "domain") if each in labels), "")
    shares = [each[kind, labels[kind]] for each in comparer.seen.values() if kind and (kind, labels[kind]) in each]
    return [Cell(f"{100 * max(shares):.1f}%" if shares else "", tone="bad" if shares and max(shares) > 0 else "")]


def seen_table(comparer: Comparer) -> Table | None:
    """How much of each kind of held-out text stands in the training text, and the scores without what was seen."""
    if not comparer.overlap:
        return None
    kinds = sorted({key for rows in comparer.overlap.values() for key in rows if key[0] in ("domain", "group")})
    rows = []
    for kind, name in kinds:
        found = {model: known[kind, name] for model, known in comparer.overlap.items() if (kind, name) in known}
        most = max(found.values(), key=lambda row: (row["seen"], row.get("mean_passages") or 0.0))
        passages = most.get("mean_passages")
        cells = [
            Cell(shortened(name) if kind == "domain" else f"{name} languages"),
            Cell(count(most["items"])),
            Cell(count(most["seen"]), tone="bad" if most["seen"] else ""),
            Cell("" if passages is None else f"{100 * passages:.1f}%"),
        ]
        for model in comparer.scores:
            row = found.get(model)
            cells.append(Cell(number(row["score_unseen"]), f"all: {number(row['score'])}") if row else Cell(""))
        rows.append(cells)
    note = (
        "Passages: the mean share of a document's windows of 50 bytes that stand in the training text of the model "
        "that saw most. Seen: documents of which at least half of the passages or of the eight-word sequences do. "
        "Models: bits per byte on the other documents, and on all."
    )
    return Table("Seen in training", ["", "documents", "seen", "passages", *comparer.scores], rows, False, note)


def routing_table(scores: Scores) -> Table:
    """Entropy, utilisation and specialisation of a model's routers, one row per layer."""
    rows = [
        [
            Cell(f"layer {each.layer}", tone="bad" if each.collapsed else ""),
            Cell(number(each.entropy), "collapsed" if each.collapsed else "", tone="bad" if each.collapsed else ""),
            Cell(f"{100 * each.utilisation:.0f}%"),
            Cell(f"{100 * each.largest_share:.0f}%"),
            Cell(number(each.specialisation_language)),
            Cell(number(each.specialisation_domain)),
        ]
        for each in scores.layer_routing
    ]
    note = (
        "Entropy: of the mean routing, 1 if all experts are used equally. Experts in use: with a mean weight over "
        "a quarter of an equal share. Specialisation: mutual information of expert and language, and of expert and "
        "domain within a language, in bits."
    )
    head = ["", "entropy", "experts in use", "largest share", "specialisation, language", "specialisation, domain"]
    return Table(f"Routers of {scores.name}", head, rows, False, note)


_COST_NOTE = (
    "FLOPs of forward and backward, counted, not timed; the ratio is of matrix products per token, below it with "
    "attention, the same in all models of a width and depth. Training: of all steps, with the shared dense warm-up, or "
    "of both stages of an extension; seconds are of the last stage alone, over all processes. Active parameters: those "
    "that one token passes through."
)


def cost_table(comparer: Comparer) -> Table | None:
    """Scores, parameters, FLOPs and seconds of every model that was trained here; None without any."""
    if not any(name in comparer.scores for name in comparer.costs):
        return None
    base = comparer.costs.get(comparer.base.name)
    groups = [group for group in ("original", "expanded") if comparer.base.where(group=group).any()]
    rows = []
    for name, each in comparer.scores.items():
        if cost := comparer.costs.get(name):
            scores = []
            for group in groups:
                change = comparer.change(name, group=group)
                scores.append(Cell(number(each.bits_per_byte(group=group)), percent(change.bits) if change else ""))
            rows.append([Cell(name), *scores, *_cost_cells(cost, base)])
    head = ["model", *(f"bits per byte, {group}" for group in groups), "parameters", "active", "FLOPs per step"]
    head += ["times the base's", "training"]
    on_gpu = any(cost.gpu_seconds is not None for cost in comparer.costs.values())
    return Table("Cost beside score", [*head, "GPU seconds" if on_gpu else "CPU seconds"], rows, False, _COST_NOTE)


def _cost_cells(cost: Cost, base: Cost | None) -> list[Cell]:
    relative, with_attention = "", ""
    if base is not None:
        relative, with_attention = f"{cost.relative(base):.2f}", f"{cost.relative_with_attention(base):.2f}"
    seconds = cost.cpu_seconds if cost.gpu_seconds is None else cost.gpu_seconds
    return [
        Cell(count(cost.parameters)),
        Cell(count(cost.active)),
        Cell(flops(cost.step)),
        Cell(relative, with_attention),
        Cell(flops(cost.training)),
        Cell(f"{seconds:.1f}"),
    ]


def gate_table(decision: dict[str, Any]) -> Table:
    """The rules of a gate and their outcomes."""
    rows = [
        [
            Cell(rule["rule"]),
            Cell("holds" if rule["passed"] else "fails", rule["reason"], "", "good" if rule["passed"] else "bad"),
        ]
        for rule in decision["rules"]
    ]
    word = "promoted" if decision["passed"] else "refused"
    return Table(f"Gate of line '{decision['line']}': {decision['model']} {word}", ["rule", "outcome"], rows)


def documents_table(documents: Artifact) -> Table:
    """Documents and bytes by language and domain, in the training and the held-out split."""
    sums = _documents_by_label(documents)
    order = {"original": 0, "expanded": 1}
    rows = []
    for key in sorted(sums, key=lambda key: (order.get(key[0], 2), key)):
        group, language, domain = key
        if group != "other":
            train, train_bytes, held, held_bytes = sums[key]
            name = Cell(f"{language_name(language)}, {shortened(domain)}", group)
            rows.append([name, Cell(count(train), size(train_bytes)), Cell(count(held), size(held_bytes))])
    others = [values for (group, _, _), values in sums.items() if group == "other"]
    if others:
        rows.append(
            [
                Cell("other or uncertain language", "excluded"),
                Cell(count(sum(each[0] for each in others)), size(sum(each[1] for each in others))),
                Cell(""),
            ]
        )
    return Table("Documents", ["language and domain", "for training", "held out"], rows)


def _documents_by_label(documents: Artifact) -> dict[tuple[str, str, str], list[int]]:
    """(group, language, domain) -> documents and bytes to train on, documents and bytes held out.

    Of very many the largest SHOWN_KINDS, and the others of a group and language together.
    """
    codes, names = zip(*(read_codes(documents, each, missing) for each, missing in LABELS_SHOWN.items()), strict=True)
    split, splits = read_codes(documents, "split")
    held = split == (splits.index("heldout") if "heldout" in splits else -1)
    size_N = np.concatenate([read_part_table(path, ["bytes"])["bytes"].fill_null(0) for path in parts(documents)])
    shape = tuple(max(len(each), 1) for each in names)
    kinds, kind = np.unique(np.ravel_multi_index(codes, shape), return_inverse=True)
    total = np.zeros((len(kinds), 4), np.int64)
    for column, chosen in ((0, ~held), (2, held)):
        total[:, column] = np.bincount(kind[chosen], minlength=len(kinds))
        np.add.at(total[:, column + 1], kind[chosen], size_N[chosen])
    largest = set(np.argsort(-(total[:, 0] + total[:, 2]), kind="stable")[:SHOWN_KINDS].tolist())
    sums: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row, values in enumerate(total.tolist()):
        group, language, domain = (
            each[code] for each, code in zip(names, np.unravel_index(kinds[row], shape), strict=True)
        )
        shown = domain if row in largest else OTHER_DOMAINS
        sums[group, language, shown] = [a + b for a, b in zip(sums[group, language, shown], values, strict=True)]
    return sums


def instances_table(instances: dict[str, Artifact]) -> Table | None:
    """The packed instances of each training stage."""
    names = ("instances", "tokens", "documents", "documents_an_instance")
    rows = [[Cell(name), *_cells(each.statistics, names)] for name, each in instances.items()]
    return Table("Instances packed", ["for", *map(in_words, names)], rows) if rows else None


def _cells(values: dict[str, Any], fields: tuple[str, ...]) -> list[Cell]:
    """One cell per field, empty where there is no value."""
    return [Cell(_plain(values[field]) if field in values else "") for field in fields]


def models_table(scores: dict[str, Scores], checkpoints: dict[str, Artifact]) -> Table:
    """Class and size of each model, and its last training stage."""
    fields = ("parameters", "parameters_trained", "steps", "tokens", "vocabulary")
    rows = []
    for name, checkpoint in checkpoints.items():
        about = scores[name].about if name in scores else {}
        given = ("model", "parameters", "vocabulary")
        values = checkpoint.statistics | {key: about[key] for key in given if key in about}
        cells = [Cell(name, checkpoint.name), Cell(str(values.get("model", ""))), *_cells(values, fields)]
        each = scores.get(name)
        cells.append(Cell(f"{each.bytes.sum() / each.tokens.sum():.2f}" if each else ""))
        rows.append(cells)
    head = ["model", "class", "parameters", "trained in the last stage", "steps", "tokens", "vocabulary"]
    return Table("Models", [*head, "bytes per token, held out"], rows)


def data_facts(documents: Artifact, grouping: Artifact | None, history: History) -> list[Facts]:
    """Documents ingested, rejected and dropped, statistics of the grouping, and the check of the upcycling."""
    ingest = next((made.statistics for made in history.steps("ingest")), documents.statistics)
    taken = Facts(
        "Ingested", _scalars({key: ingest.get(key) for key in ("documents", "rejected", "duplicates", "bytes")})
    )
    taken.pairs += [
        (f"rejected: {reason}", count(total)) for reason, total in ingest.get("rejected_by_reason", {}).items()
    ]
    facts = [taken]
    if grouping is not None:
        facts.append(Facts("Grouping", _scalars(grouping.statistics)))
    proof = {
        "base_parameters": "parameters before",
        "parameters": "parameters after",
        "experts": "experts per layer",
        "top_k": "experts per token",
        "max_abs_delta": "largest logit difference at step 0",
        "tolerance": "tolerance",
    }
    for made in history.steps("upcycle"):
        numbers = {name: made.statistics.get(key) for key, name in proof.items()}
        facts.append(Facts("Upcycling", _scalars(numbers)))
    return [each for each in facts if each.pairs]


def settings_facts(history: History) -> list[Facts]:
    """The settings of every step upstream of the models, in the order of execution."""
    facts = []
    for made in history.made.values():
        if made.settings:
            pairs = [(name, _plain(value)) for name, value in made.settings.items()]
            facts.append(Facts(f"{made.label} → {made.name}", pairs))
    return facts


def version_pairs(history: History) -> list[tuple[str, str]]:
    run = history.run
    pairs = [("code", run.get("code_version") or ""), ("Python", run.get("python") or "")]
    return [pair for pair in [*pairs, *sorted(run.get("packages", {}).items())] if pair[1]]


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Numbers and texts; nested ones with their parent's name as prefix; dictionaries of over 12 are left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{in_words(str(key))}"
        if isinstance(value, dict):
            if len(value) <= 12:
                pairs += _scalars(value, f"{name}: ")
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            pairs.append((name, size(value) if key == "bytes" and not isinstance(value, str) else _plain(value)))
    return pairs


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
