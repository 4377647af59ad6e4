"""Tables of `lpr_claims.py`, as docs/methods.md 2.5 has them, in bits per byte."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

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
    """All results, as Markdown."""
    size = about["size"]
    lines = ["# MoE-LPR: languages learnt and kept", ""]
    if size["note"]:
        lines += [f"**{size['note'][0].upper()}{size['note'][1:]}.**", ""]
    where = f"{about['device']}; torch {about['torch']}, transformers {about['transformers']}"
    lines += [f"{where}; `{about['command']}`", ""]
    lines += size_tables(about, results)
    if about.get("not_run"):
        lines += [f"Not run for lack of time, the same command resumes: {len(about['not_run'])} jobs", ""]
    if errors:
        lines += ["Failed:", *(f"- {error}" for error in errors), ""]
    return "\n".join(lines)


def size_tables(about: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    bases = {each["seed"]: each for each in results if each["kind"] == "base"}
    if not bases:
        return []
    table = Table(about, bases, by_method(results, about["expanded"]))
    size, dense = about["size"], bases[min(bases)]["parameters"] / 1e6
    lines = [f"## {size['name']}: {dense:.2f}M dense, {size['experts']} experts, top 2", ""]
    lines += data_lines(about)
    lines += ["", "Bits per byte on held-out text, mean over seeds (± standard deviation); lower is better.", ""]
    lines += [*table.head(), table.row("base", list(bases.values()), "held")]
    for title in ORDER:
        if title in table.methods:
            lines.append(table.row(TITLES.get(title, title), table.methods[title], "held"))
    lines += ["", *proofs(results), "", *task_table(about, bases, table.methods)]
    sweeps = defaultdict(list)
    for each in results:
        if each.get("sweep"):
            sweeps[each["sweep"]].append(each)
    for sweep, points in sweeps.items():
        lines += [f"### Sweep: {sweep} (first seed, on `valid`, which is not what the table above reports)", ""]
        lines += [*table.head(), *(table.row(each["title"], [each], "valid") for each in points), ""]
    return lines


def data_lines(about: dict[str, Any]) -> list[str]:
    """The training text, and the share of original languages in the review."""
    size, data = about["size"], about["data"]
    lines = []
    for part in ("base", "expanded", "review"):
        if part in data:
            tokens = ", ".join(f"{language} {data[part][language] / 1e3:.0f}k" for language in data["languages"])
            lines.append(f"- {part}: {data[part]['instances']} instances of {size['length']} tokens ({tokens})")
    stage1 = size["stage1_steps"] * size["batch"] * size["length"]
    once = sum(data["review"][language] for language in about["original"])
    whole = sum(data["review"][language] for language in data["languages"])
    read = once / whole * size["review_steps"] * size["review_batch"] * size["length"]
    lines.append(
        f"- stage 1 reads {stage1 / 1e3:.0f}k tokens; replay of the original languages: {once / 1e3:.1f}k tokens, "
        f"{100 * once / stage1:.2f}% of that, read {read / once:.1f} times"
    )
    return lines


class Table:
    """Rows of methods under one head. methods: by title, what is reported of each."""

    def __init__(self, about: dict[str, Any], bases: dict[int, Any], methods: dict[str, list[dict[str, Any]]]) -> None:
        self.methods = methods
        self._expanded, self._original, self._bases = about["expanded"], about["original"], bases

    def head(self) -> list[str]:
        cells = ["", *self._expanded, "expanded", "of full", *self._original, "retention", "rate", "seeds"]
        return [row(cells), row(["---"] * len(cells))]

    def row(self, title: str, runs: list[dict[str, Any]], part: str) -> str:
        """part: `held` or `valid`. of full: the mean over the same seeds' expanded languages / full fine-tuning's."""
        means = [mean_of(run[part], self._expanded) for run in runs]
        keeps = [
            100 * mean_of(self._base(run)[part], self._original) / mean_of(run[part], self._original) for run in runs
        ]
        full = {run["seed"]: mean_of(run[part], self._expanded) for run in self.methods.get("full", [])}
        over = [
            100 * (value / full[run["seed"]] - 1) for run, value in zip(runs, means, strict=True) if run["seed"] in full
        ]

        def by_language(languages: list[str]) -> list[str]:
            cells = []
            for name in languages:
                cells.append(spread([run[part][name] for run in runs]))
            return cells

        cells = [title, *by_language(self._expanded), spread(means)]
        cells.append(f"{spread(over, 1, '+')}%" if over else "-")
        cells += by_language(self._original)
        rates = sorted({run.get("rate") or 0.0 for run in runs})
        return row([*cells, f"{spread(keeps, 2)}%", " ".join(f"{rate:.1g}" for rate in rates), str(len(runs))])

    def _base(self, run: dict[str, Any]) -> dict[str, Any]:
        return self._bases[run.get("base_seed", run["seed"])]


def by_method(results: list[dict[str, Any]], expanded: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Results by title; of a seed that tried several learning rates the one that is best on `valid`."""
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for each in results:
        if not each.get("title") or each.get("sweep"):
            continue
        before = groups[each["title"]].get(each["seed"])
        if before is None or mean_of(each["valid"], expanded) < mean_of(before["valid"], expanded):
            groups[each["title"]][each["seed"]] = each
    return {title: [runs[seed] for seed in sorted(runs)] for title, runs in groups.items()}


def task_table(about: dict[str, Any], bases: dict[int, Any], methods: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Accuracy by lm-eval task, where tasks were asked."""
    rows = {"base": bases[min(bases)]} | {
        TITLES.get(title, title): methods[title][0] for title in ORDER if title in methods
    }
    rows = {title: each["tasks"] for title, each in rows.items() if each.get("tasks")}
    if not rows:
        return []
    names = list(next(iter(rows.values())))
    questions = ", ".join(f"{name} {next(iter(rows.values()))[name]['questions']}" for name in names)
    lines = [f"lm-eval tasks, 0 shots, accuracy in percent ± standard error; questions: {questions}.", ""]
    lines += [row(["", *names]), row(["---"] * (len(names) + 1))]
    for title, scores in rows.items():
        lines.append(
            row([title, *(f"{100 * scores[name]['acc']:.1f} ±{100 * scores[name]['error']:.1f}" for name in names)])
        )
    return [*lines, ""]


def proofs(results: list[dict[str, Any]]) -> list[str]:
    """The checks made during the runs."""
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
            shares = {language: statistics.fmean(layers) for language, layers in each["expert_0_weight"].items()}
            words = ", ".join(f"{language} {share:.2f}" for language, share in shares.items())
            lines.append(f"- weight of expert 0, {each['title']}: {words}")
    return lines


def mean_of(values: dict[str, float], names: list[str]) -> float:
    return statistics.fmean(values[name] for name in names)


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    middle = f"{statistics.fmean(values):{sign}.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ±{statistics.stdev(values):.{digits}f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
