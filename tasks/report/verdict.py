"""The verdict: what was gained and what was forgotten, in sentences that follow from the numbers in either direction.

Retention is the base model's bits per byte divided by the model's: 100% means nothing was forgotten, 98% means 2% more
bits for the same text. A difference counts only if the 95% interval of the paired bootstrap excludes zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eclectus.tasks.documents.language_codes import language_name
from eclectus.tasks.evaluation.scores import Change, Scores, compare
from eclectus.tasks.report.formatting import interval, listed, number, percent

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
    """Compares models of a report with its base, with the report's bootstrap."""

    scores: dict[str, Scores]
    resamples: int
    seed: int
    # By model: the share seen in training, by (kind, name) of what was scored (tasks/evaluation/contamination.py).
    seen: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)

    @property
    def base(self) -> Scores:
        """The dense model, else the first one. Needs at least one model."""
        return self.scores.get(BASE) or next(iter(self.scores.values()))

    def change(self, name: str, **labels: str) -> Change | None:
        """From the base to this model; None for the base itself and where there are no such documents."""
        if name not in self.scores or name == self.base.name:
            return None
        return compare(self.base, self.scores[name], self.resamples, self.seed, **labels)


def make_verdict(comparer: Comparer, frozen: bool | None = None, gates: list[dict[str, Any]] | None = None) -> Verdict:
    """The verdict on the evaluated models. frozen: whether every original weight is unchanged, None if not known.

    gates: the decision of each line's gate (`decision.json` of tasks/promotion/gate.py, with the name as `model`).
    """
    verdict = Verdict()
    for each in gates or []:
        _add_gate(each, verdict)
    if comparer.base.name == BASE and LORY in comparer.scores:
        _add_lory(comparer, verdict)
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
    for name in comparer.scores:
        if name not in (BASE, LORY, STAGE_1, STAGE_2) and name != comparer.base.name:
            _add_other(comparer, name, verdict)
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


def tone(change: Change) -> str:
    """good, bad, or even where the change is not significant."""
    if not change.clear:
        return "even"
    return "good" if change.bits < 0 else "bad"


def _add_lory(comparer: Comparer, verdict: Verdict) -> None:
    change = comparer.change(LORY, group="original")
    if change is None:
        return
    relative, around = change.perplexity, change.perplexity_interval
    if relative is None or around is None:
        relative, around, measure = change.bits, change.bits_interval, "bits per byte"
    else:
        measure = "perplexity"
    word = {"good": "better than", "bad": "worse than", "even": "about level with"}[tone(change)]
    verdict.tiles.append(
        Tile(
            percent(relative),
            f"{measure}, Lory against its dense twin",
            f"95% interval {interval(around)}",
            tone(change),
        )
    )
    text = (
        f"Lory is {word} its dense twin on held-out {_languages(comparer, 'original')} text that neither was trained "
        f"on: {measure} {percent(relative)} (95% interval {interval(around)}), {change.after:.3f} bits per byte "
        f"against {change.before:.3f}, look-ahead excluded."
    )
    prompt_only = comparer.scores[LORY].bits_per_byte_by_prompt(group="original")
    if prompt_only is not None:
        text += f" Routed once per window, by its context alone, it has {prompt_only:.3f}."
    domains = {
        domain: comparer.change(LORY, group="original", domain=domain)
        for domain in comparer.base.values("domain", group="original")
    }
    if len(domains) > 1:
        text += _by_domain({domain: each for domain, each in domains.items() if each is not None})
    verdict.sentences.append(text)


def _by_domain(domains: dict[str, Change]) -> str:
    ordered = sorted(domains, key=lambda domain: domains[domain].bits)
    better = sum(each.bits < 0 for each in domains.values())
    best, worst = ordered[0], ordered[-1]
    return (
        f" It has fewer bits per byte on {better} of {len(domains)} domains: best on {best} "
        f"({percent(domains[best].bits)}), worst on {worst} ({percent(domains[worst].bits)})."
    )


def _add_new_languages(comparer: Comparer, last: str, verdict: Verdict) -> None:
    change = comparer.change(last, group="expanded")
    if change is None:
        verdict.sentences.append("There is no held-out text in a new language: what the extension gained is unknown.")
        return
    new = _languages(comparer, "expanded")
    verdict.tiles.append(
        Tile(percent(change.bits), f"bits per byte on new languages ({new})", f"dense base to {last}", tone(change))
    )
    path = [f"{number(comparer.base.bits_per_byte(group='expanded'))} (dense base)"]
    path += [
        f"{number(comparer.scores[name].bits_per_byte(group='expanded'))} ({name})"
        for name in (STAGE_1, STAGE_2)
        if name in comparer.scores
    ]
    word = {"good": "learned", "bad": "did not learn", "even": "shows no clear change on"}[tone(change)]
    verdict.sentences.append(
        f"The extension {word} {new}: bits per byte went {' → '.join(path)}, {percent(change.bits)} "
        f"(95% interval {interval(change.bits_interval)})."
    )


def _add_retention(comparer: Comparer, last: str, verdict: Verdict) -> None:
    change = comparer.change(last, group="original")
    if change is None:
        return
    kept = 100 * change.retention
    original = _languages(comparer, "original")
    low, high = (100 * end for end in change.retention_interval)
    verdict.tiles.append(
        Tile(
            f"{kept:.1f}%",
            f"of {original} kept after {last}",
            f"bits per byte {change.before:.3f} → {change.after:.3f}",
            "good" if kept >= RETAINED else "bad",
        )
    )
    text = (
        f"Of {original}, {kept:.1f}% is kept after {last} (95% interval {low:.1f}% to {high:.1f}%; bits per byte "
        f"{change.before:.3f} → {change.after:.3f})"
    )
    first = comparer.change(STAGE_1, group="original") if last == STAGE_2 else None
    if first is not None:
        moved = kept - 100 * first.retention
        word = "recovered" if moved >= 0 else "lost"
        text += f"; after stage 1 it was {100 * first.retention:.1f}%, so the review {word} {abs(moved):.1f} points"
    verdict.sentences.append(text + ".")


def _add_other(comparer: Comparer, name: str, verdict: Verdict) -> None:
    change = comparer.change(name)
    if change is not None:
        verdict.tiles.append(
            Tile(
                percent(change.bits),
                f"bits per byte, {name} against {comparer.base.name}",
                "all held-out text",
                tone(change),
            )
        )
        verdict.sentences.append(
            f"{name} has {change.after:.3f} bits per byte on held-out text, {comparer.base.name} {change.before:.3f}: "
            f"{percent(change.bits)} (95% interval {interval(change.bits_interval)})."
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


def _languages(comparer: Comparer, group: str) -> str:
    return listed([language_name(code) for code in comparer.base.values("language", group=group)])
