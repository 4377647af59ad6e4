"""Tables of `lpr_claims.py`, as papers.md 2.5 has them, in bits per byte."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

ORIGINAL = "en"
TITLES = {
    "full": "full fine-tuning",
    "full_replay": "full fine-tuning with replay",
    "lora": "LoRA r=8",
    "llama_pro": "LLaMA-Pro",
    "moe_all": "MoE, all trained",
    "one_stage": "MoE-LPR in one stage",
}
ORDER = (
    *("full", "lora", "llama_pro", "moe_all", "full_replay", "MoE-LPR"),
    *("random new experts", "no review", "review without LPR", "one_stage"),
)


def markdown(about: dict[str, Any], results: list[dict[str, Any]], errors: list[str]) -> str:
    """Everything that was measured, as Markdown."""
    lines = ["# MoE-LPR: languages learnt and kept", ""]
    lines += [
        f"{about['device']}; torch {about['torch']}, transformers {about['transformers']}; `{about['command']}`",
        "",
    ]
    if "speed" in about:
        lines += speed_table(about["speed"])
    for name, size in about["sizes"].items():
        own = [each for each in results if each["size"] == name]
        if own:
            lines += size_tables(name, size, about["data"].get(name, {}), own)
    if about.get("not_run"):
        lines += [f"Not run for lack of time: {', '.join(about['not_run'])}", ""]
    if errors:
        lines += ["Failed:", *(f"- {error}" for error in errors), ""]
    return "\n".join(lines)


def speed_table(speed: dict[str, Any]) -> list[str]:
    lines = [
        f"## One training step, {speed['shape']}",
        "",
        "| | ms a step | peak GiB | trained parameters |",
        "|---|---|---|---|",
    ]
    for name, row in speed["rows"].items():
        memory = f"{row['gib']:.2f}" if row["gib"] else "-"
        lines.append(f"| {name} | {row['ms']:.1f} | {memory} | {row['trained'] / 1e6:.1f}M |")
    return [*lines, ""]


def size_tables(name: str, size: dict[str, Any], data: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    bases = {each["seed"]: each for each in results if each["kind"] == "base"}
    if not bases:
        return []
    expanded = list(size["expanded"])
    others = sorted(set(bases[min(bases)]["bpb"]) - {ORIGINAL, *expanded})
    lines = [f"## {name}: {bases[min(bases)]['parameters'] / 1e6:.1f}M dense, {size['experts']} experts", ""]
    for part in ("english", "expanded", "review"):
        if part in data:
            tokens = ", ".join(f"{language} {data[part][language] / 1e6:.2f}M" for language in data["languages"])
            lines.append(f"- {part}: {data[part]['instances']} instances of {size['length']} tokens ({tokens})")
    lines += ["", "Bits per byte on held-out text, mean over seeds (± standard deviation); lower is better.", ""]
    head = ["", *expanded, "expanded", "of full", ORIGINAL, "retention", *others, "seeds"]
    lines += [row(head), row(["---"] * len(head))]
    methods = by_method(results, bases, expanded)
    full = mean([mean_of(each["bpb"], expanded) for each in methods.get("full", [])])
    lines.append(method_row("base", list(bases.values()), bases, expanded, others, full))
    for title in ORDER:
        if title in methods:
            lines.append(method_row(TITLES.get(title, title), methods[title], bases, expanded, others, full))
    lines += ["", *proofs(results), ""]
    sweeps = defaultdict(list)
    for each in results:
        if each.get("sweep"):
            sweeps[each["sweep"]].append(each)
    for sweep, points in sweeps.items():
        note = " (beyond the paper)" if sweep == "ours" else ""
        lines += [f"### Sweep, seed 0: {sweep}{note}", "", row(head), row(["---"] * len(head))]
        lines += [
            method_row(each["title"], [each], bases, expanded, others, full)
            for each in sorted(points, key=lambda p: p["title"])
        ]
        lines.append("")
    return lines


def by_method(
    results: list[dict[str, Any]], bases: dict[int, Any], expanded: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Results by title; of a baseline those at the learning rate that is best on the expanded languages."""
    groups: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for each in results:
        if each.get("title") and not each.get("sweep") and each["seed"] in bases:
            groups[each["title"]][each["rate"]].append(each)
    best = {}
    for title, rates in groups.items():
        most = max(len(runs) for runs in rates.values())
        whole = [runs for runs in rates.values() if len(runs) == most]
        best[title] = min(whole, key=lambda runs: mean([mean_of(run["bpb"], expanded) for run in runs]))
    return best


def method_row(
    title: str,
    runs: list[dict[str, Any]],
    bases: dict[int, Any],
    expanded: list[str],
    others: list[str],
    full: float | None,
) -> str:
    means = [mean_of(run["bpb"], expanded) for run in runs]
    keeps = [100 * bases[run["seed"]]["bpb"][ORIGINAL] / run["bpb"][ORIGINAL] for run in runs]
    of_full = "-" if full is None else f"{100 * (mean(means) / full - 1):+.1f}%"
    cells = [title, *(spread([run["bpb"][language] for run in runs]) for language in expanded), spread(means), of_full]
    cells += [spread([run["bpb"][ORIGINAL] for run in runs]), f"{spread(keeps, 2)}%"]
    return row([*cells, *(spread([run["bpb"][language] for run in runs]) for language in others), str(len(runs))])


def proofs(results: list[dict[str, Any]]) -> list[str]:
    """What was checked while it ran."""
    upcycled = [each for each in results if each["kind"] == "upcycle"]
    staged = [each for each in results if each["kind"] in ("stage1", "review")]
    reviewed = [each for each in staged if each["kind"] == "review"]
    lines = []
    if upcycled:
        worst = max(each["max_abs_delta"] for each in upcycled)
        lines.append(
            f"- step 0: largest difference of a logit to the base {worst:.2g}, over {len(upcycled)} upcycled models"
        )
    if staged:
        whole = sum(each["frozen_unchanged"] and each["frozen_is_base"] for each in staged)
        lines.append(f"- original weights bit-identical to the base's after {whole} of {len(staged)} stages (sha256)")
    if reviewed:
        whole = sum(each["all_but_routers_unchanged"] for each in reviewed)
        lines.append(f"- all but the routers bit-identical through {whole} of {len(reviewed)} reviews (sha256)")
    for each in staged:
        if each["seed"] == 0 and each.get("title") in ("MoE-LPR", "no review"):
            shares = {language: mean(layers) for language, layers in each["expert_0_weight"].items()}
            words = ", ".join(f"{language} {share:.2f}" for language, share in shares.items())
            lines.append(f"- weight of expert 0, {each['title']}: {words}")
    return lines


def mean_of(values: dict[str, float], names: list[str]) -> float:
    return statistics.fmean(values[name] for name in names)


def mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: list[float], digits: int = 3) -> str:
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ±{statistics.stdev(values):.{digits}f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
