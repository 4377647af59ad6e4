"""The verdict: what was gained and what was forgotten, in sentences that follow from the numbers in either direction.

Retention is the base model's bits per byte divided by the model's: 100% means nothing was forgotten, 98% means 2% more
bits for the same text. A difference counts only if its 95% interval excludes zero, and every interval is given with
what it covers: one training of each model says nothing about their methods (tasks/evaluation/changes.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eclectus.tasks.documents.language_codes import language_name, shortened
from eclectus.tasks.evaluation.changes import Change, compare
from eclectus.tasks.evaluation.costs import CONTROL, Cost, times
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.report.formatting import count, listed, number, percent, within
from eclectus.tasks.report.significance import significant, tone, tones

# Percent: a retention of at least this much is shown as good.
RETAINED = 99
BASE, LORY, STAGE_1, STAGE_2 = "dense", "lory", "stage 1", "stage 2"


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page. tone: good, bad or even."""

    value: str
    what: str
    detail: str
    tone: str


@dataclass
class Verdict:
    """headline: the page in one line. tiles, sentences: most important first. notes: limits of the numbers."""

    headline: str = ""
    tiles: list[Tile] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparer:
    """Compares models of a report with its base."""

    scores: dict[str, Scores]
    # By model: the share seen in training, by (kind, name) of what was scored (tasks/evaluation/contamination.py).
    seen: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)
    # The same by rows: items, those seen, mean_passages, score, score_unseen; without models of unknown training.
    overlap: dict[str, dict[tuple[str, str], dict[str, Any]]] = field(default_factory=dict)
    # Models whose training text, or a part of it, is not in the lineage.
    uncompared: list[str] = field(default_factory=list)
    # By model, of those that were pre-trained here.
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def base(self) -> Scores:
        """The dense model, else the first one. Needs at least one model."""
        return self.scores.get(BASE) or next(iter(self.scores.values()))

    def change(self, name: str, **labels: str) -> Change | None:
        """From the base to this model; None for the base itself and where there are no such documents."""
        if name not in self.scores or name == self.base.name:
            return None
        return compare(self.base, self.scores[name], **labels)


def make_verdict(comparer: Comparer, frozen: bool | None = None, gates: list[dict[str, Any]] | None = None) -> Verdict:
    """The verdict on the evaluated models. frozen: whether every original weight is unchanged, None if not known.

    gates: the decision of each line's gate (`decision.json` of tasks/promotion/gate.py, with the name as `model`).
    """
    verdict = Verdict()
    for each in gates or []:
        _add_gate(each, verdict)
    if comparer.base.name == BASE and LORY in comparer.scores:
        _add_lory(comparer, verdict)
        _add_control(comparer, verdict)
    last = next((name for name in (STAGE_2, STAGE_1) if name in comparer.scores), None)
    if last and comparer.base.name != last:
        _add_new_languages(comparer, last, verdict)
        _add_retention(comparer, last, verdict)
        if frozen is not None:
            verdict.sentences.append(
                "Every original weight is bit-identical after the extension."
                if frozen
                else "After the extension the original weights are NOT those of the dense base: they were changed."
            )
    _add_others(comparer, verdict)
    if not verdict.sentences:
        verdict.sentences.append(
            f"Only {comparer.base.name} was evaluated: {number(comparer.base.bits_per_byte())} bits per byte "
            "on held-out text."
        )
    _add_notes(comparer, verdict)
    verdict.headline = _headline(verdict, gates or [])
    return verdict


def _add_gate(decision: dict[str, Any], verdict: Verdict) -> None:
    held = sum(rule["passed"] for rule in decision["rules"])
    detail = f"{held} of {len(decision['rules'])} rules hold"
    word = "promoted" if decision["passed"] else "refused"
    tint = "good" if decision["passed"] else "bad"
    verdict.tiles.append(Tile(word, f"{decision['model']}, by the gate of line '{decision['line']}'", detail, tint))


def _headline(verdict: Verdict, gates: list[dict[str, Any]]) -> str:
    """The decision of the gates if there are any, else the first finding."""
    if not gates:
        return verdict.sentences[0].split(". ")[0].rstrip(".") + "."
    parts = []
    for each in gates:
        if each["passed"]:
            parts.append(f"{each['model']} may be promoted: {each['reason']}.")
        else:
            parts.append(f"{each['model']} must not be promoted: {each['reason']}.")
    return " ".join(parts)


def _add_lory(comparer: Comparer, verdict: Verdict) -> None:
    change = comparer.change(LORY, group="original")
    if change is None:
        return
    relative, around = change.perplexity, change.perplexity_interval
    if relative is None:
        relative, around, measure = change.bits, change.bits_interval, "bits per byte"
    else:
        measure = "perplexity"
    tint = "even" if around is None or around[0] <= 0 <= around[1] else "good" if relative < 0 else "bad"
    word = {"good": "scores better than", "bad": "scores worse than", "even": "does not differ clearly from"}[tint]
    detail = within(around, change.covers)
    verdict.tiles.append(Tile(percent(relative), f"{measure}, Lory against its dense twin", detail, tint))
    text = (
        f"{'Lory' if change.of_method else 'This training of Lory'} {word} its dense twin on held-out "
        f"{_languages(comparer, 'original')} text{_untrained(comparer)}: {measure} {percent(relative)} "
        f"({detail}{_between(change)}), {change.after:.3f} bits per byte against {change.before:.3f}, look-ahead "
        f"excluded{_at_cost(comparer)}."
    )
    prompt_only = comparer.scores[LORY].bits_per_byte_by_prompt(group="original")
    if prompt_only is not None:
        text += f" Routed once per window, by its context alone, it has {prompt_only:.3f}."
    domains = {
        domain: comparer.change(LORY, group="original", domain=domain)
        for domain in comparer.base.domains(group="original")
    }
    if len(domains) > 1:
        text += _by_domain({domain: each for domain, each in domains.items() if each is not None})
    verdict.sentences.append(text)


def _at_cost(comparer: Comparer) -> str:
    """The FLOPs at which Lory was compared with its twin, as a clause."""
    twin, lory = comparer.costs.get(BASE), comparer.costs.get(LORY)
    return f", at {times(lory, twin)} the twin's FLOPs per training step" if twin and lory else ""


def _add_control(comparer: Comparer, verdict: Verdict) -> None:
    """Lory against the dense model of equal FLOPs, or that there is none."""
    lory, control, twin = (comparer.costs.get(name) for name in (LORY, CONTROL, BASE))
    if CONTROL not in comparer.scores:
        if lory and twin and lory.relative(twin) > 1:
            verdict.notes.append(
                f"Lory's training step costs {times(lory, twin)} its twin's FLOPs, and no dense model of equal FLOPs "
                f"was trained: a part of the difference may be FLOPs (--pretrain-baselines {CONTROL} trains one)."
            )
        return
    change = compare(comparer.scores[CONTROL], comparer.scores[LORY], group="original")
    if change is None:
        return
    word = {"good": "scores better than", "bad": "scores worse than", "even": "does not differ clearly from"}
    cost = f", whose step costs {times(control, lory)} Lory's FLOPs" if lory and control else ""
    around = within(change.bits_interval, change.covers)
    verdict.tiles.append(
        Tile(percent(change.bits), "bits per byte, Lory against a dense model of equal FLOPs", around, tone(change))
    )
    verdict.sentences.append(
        f"{'Lory' if change.of_method else 'This training of Lory'} {word[tone(change)]} the dense control of equal "
        f"FLOPs{cost}: bits per byte {change.after:.3f} against {change.before:.3f}, {percent(change.bits)} "
        f"({around}{_between(change)}). The control trained from scratch, on the same data in the same order."
    )


def _untrained(comparer: Comparer) -> str:
    """Whether the base or Lory was trained on passages of the original languages' held-out text, as a clause."""
    rows = [comparer.overlap.get(name, {}).get(("group", "original")) for name in (comparer.base.name, LORY)]
    known = [row for row in rows if row and row.get("mean_passages") is not None]
    if len(known) < len(rows) or comparer.uncompared:
        return ""
    passages = f"{100 * max(row['mean_passages'] for row in known):.2g}% of its passages"
    if not any(row["seen"] for row in known):
        return f" that neither was trained on ({passages} of 50 bytes stand in the training text)"
    return f" of which they were trained on some ({passages} of 50 bytes; scores without it under 'Seen in training')"


def _between(change: Change) -> str:
    return f"; standard deviation between trainings {100 * change.spread:.1f}%" if change.spread is not None else ""


def _by_domain(domains: dict[str, Change]) -> str:
    ordered = sorted(domains, key=lambda domain: domains[domain].bits)
    better = sum(each.bits < 0 for each in domains.values())
    best, worst = ordered[0], ordered[-1]
    ends = [f"{shortened(each)} ({percent(domains[each].bits)})" for each in (best, worst)]
    return (
        f" It has fewer bits per byte on {better} of {len(domains)} domains: best on {ends[0]}, "
        f"worst on {ends[1]}; significant on "
        f"{sum(significant(domains).values())} of them (Holm over {len(domains)} comparisons)."
    )


def _add_new_languages(comparer: Comparer, last: str, verdict: Verdict) -> None:
    change = comparer.change(last, group="expanded")
    if change is None:
        verdict.sentences.append("There is no held-out text in a new language: what the extension gained is unknown.")
        return
    new = _languages(comparer, "expanded")
    verdict.tiles.append(
        Tile(
            percent(change.bits),
            f"bits per byte on new languages ({new}), dense base to {last}",
            within(change.bits_interval, change.covers),
            tone(change),
        )
    )
    path = [f"{number(comparer.base.bits_per_byte(group='expanded'))} (dense base)"]
    path += [
        f"{number(comparer.scores[name].bits_per_byte(group='expanded'))} ({name})"
        for name in (STAGE_1, STAGE_2)
        if name in comparer.scores
    ]
    word = {"good": "learned", "bad": "did not learn", "even": "shows no clear change on"}[tone(change)]
    verdict.sentences.append(
        f"{'The extension' if change.trainings > 1 else 'This extension'} {word} {new}: bits per byte went "
        f"{' → '.join(path)}, {percent(change.bits)} ({within(change.bits_interval, change.covers)}{_between(change)})."
    )


def _add_retention(comparer: Comparer, last: str, verdict: Verdict) -> None:
    change = comparer.change(last, group="original")
    if change is None:
        return
    kept = 100 * change.retention
    original = _languages(comparer, "original")
    ends = change.retention_interval
    around = "no interval: all text is of one work"
    if ends:
        around = f"95% interval {100 * ends[0]:.1f}% to {100 * ends[1]:.1f}% {change.covers}"
    verdict.tiles.append(
        Tile(f"{kept:.1f}%", f"of {original} kept after {last}", around, "good" if kept >= RETAINED else "bad")
    )
    text = (
        f"Of {original}, {kept:.1f}% is kept after {last} ({around}{_between(change)}; bits per byte "
        f"{change.before:.3f} → {change.after:.3f})"
    )
    first = comparer.change(STAGE_1, group="original") if last == STAGE_2 else None
    if first is not None:
        text += f"; after stage 1 it was {100 * first.retention:.1f}%, {_reviewed(comparer, kept, first)}"
    verdict.sentences.append(text + ".")


def _reviewed(comparer: Comparer, kept: float, first: Change) -> str:
    """What the review changed: a claim only if stage 2 differs clearly from stage 1."""
    moved = kept - 100 * first.retention
    change = compare(comparer.scores[STAGE_1], comparer.scores[STAGE_2], group="original")
    if change is None or not change.clear:
        return f"a difference of {abs(moved):.1f} points that is not clear"
    return f"so the review {'recovered' if moved >= 0 else 'lost'} {abs(moved):.1f} points"


def _add_others(comparer: Comparer, verdict: Verdict) -> None:
    """Every model that is not of the two methods, against the base; tiles are coloured by Holm over all of them."""
    shown = (BASE, LORY, STAGE_1, STAGE_2, comparer.base.name)
    changes = {name: comparer.change(name) for name in comparer.scores if name not in shown}
    tints = tones(changes)
    for name, change in changes.items():
        if change is None:
            continue
        around = within(change.bits_interval, change.covers)
        what = f"bits per byte, {name} against {comparer.base.name}"
        verdict.tiles.append(Tile(percent(change.bits), what, f"all held-out text; {around}", tints[name]))
        verdict.sentences.append(
            f"{name} has {change.after:.3f} bits per byte on held-out text, {comparer.base.name} {change.before:.3f}: "
            f"{percent(change.bits)} ({around}{_between(change)})."
        )


def _add_notes(comparer: Comparer, verdict: Verdict) -> None:
    """Text that could not be scored, collapsed routers, and scores that are not comparable token by token."""
    missing = sorted(
        {code for each in comparer.scores.values() for code in each.about["languages_without_held_out_text"]}
    )
    if missing:
        names = listed([language_name(code) for code in missing])
        verdict.notes.append(f"No held-out text in {names} is long enough to be scored.")
    short = sorted({stream for each in comparer.scores.values() for stream in each.about["too_short_to_score"]})
    if short:
        verdict.notes.append(f"Too little held-out text to score: {'; '.join(short)}.")
    for name, each in comparer.scores.items():
        collapsed = [str(layer.layer) for layer in each.layer_routing if layer.collapsed]
        if collapsed:
            verdict.notes.insert(
                0,
                f"Router collapse: {name} sends nearly all tokens to one expert in layer {listed(collapsed)}.",
            )
    if len({(each.about["window"], int(each.tokens.sum())) for each in comparer.scores.values()}) > 1:
        verdict.notes.append(
            "The models were not scored on the same tokens; each pair is compared in bits per byte on the documents "
            "that both scored."
        )
    for name, each in comparer.scores.items():
        if lost := each.about.get("unknown_tokens"):
            verdict.notes.append(
                f"The tokenizer of {name} reads {count(lost)} pieces of the scored text as unknown, which loses them: "
                f"the bits per byte of {name} are too low to be compared with those of other tokenizers."
            )
    if comparer.uncompared:
        verdict.notes.append(
            f"The training text of {listed(comparer.uncompared)} is not in the lineage: whether it holds scored text "
            "is unknown."
        )
    verdict.notes += _limits(comparer)


def _limits(comparer: Comparer) -> list[str]:
    """What the intervals of this report do not cover."""
    base, notes = comparer.base, []
    works = len(set(base.works))
    if works < len(base.document):
        notes.append(
            f"The {count(len(base.document))} documents are pieces of {count(works)} works; intervals are over works."
        )
    if len(comparer.scores) > 1 and any(len(each.trainings) == 1 for each in comparer.scores.values()):
        notes.append(
            "An interval on these documents, one training, does not say how another seed would do, and two trainings "
            "of one model may differ by more than it: train with several seeds (--seeds 3) before judging a method."
        )
    return notes


def _languages(comparer: Comparer, group: str) -> str:
    return listed([language_name(code) for code in comparer.base.values("language", group=group)])
