"""Tables of `lpr_claims.py`, as docs/methods.md 2.5 has them, in bits per byte."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from lpr_intervals import SEEN, HeldOut, Ratio

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
# Ends the title of a method on the base with new words.
NEW_WORDS = ", new words"

COSTS = ("parameters, active", "training TFLOPs", "CPU s of training")


def markdown(about: dict[str, Any], results: list[dict[str, Any]], errors: list[str], held: HeldOut) -> str:
    """All results, as Markdown. held: the reported documents, for intervals."""
    size = about["size"]
    lines = ["# MoE-LPR: languages learnt and kept", ""]
    if size["note"]:
        lines += [f"**{size['note'][0].upper()}{size['note'][1:]}.**", ""]
    where = f"{about['device']}; torch {about['torch']}, transformers {about['transformers']}"
    lines += [f"{where}; `{about['command']}`", ""]
    lines += size_tables(about, results, held)
    if about.get("not_run"):
        lines += [f"Not run for lack of time, the same command resumes: {len(about['not_run'])} jobs", ""]
    if errors:
        lines += ["Failed:", *(f"- {error}" for error in errors), ""]
    return "\n".join(lines)


def size_tables(about: dict[str, Any], results: list[dict[str, Any]], held: HeldOut) -> list[str]:
    bases = {each["seed"]: each for each in results if each["kind"] == "base"}
    if not bases:
        return []
    table = Table(about, bases, by_method(results, about["expanded"]))
    size, dense = about["size"], bases[min(bases)]["parameters"] / 1e6
    lines = [f"## {size['name']}: {dense:.2f}M dense, {size['experts']} experts, top 2", ""]
    lines += data_lines(about)
    lines += ["", "Bits per byte on held-out text, mean over seeds (± standard deviation); lower is better.", ""]
    lines += [*table.head(), table.row("base", list(bases.values()), "held")]
    for title in ordered(table.methods):
        lines.append(table.row(named(title), table.methods[title], "held"))
    stages = {each["name"]: each for each in results if each["kind"] == "stage1"}
    lines += ["", *claims(about, table, held, stages), *frontier(about, results, bases, held)]
    lines += ["", *proofs(results), "", *task_table(about, bases, table.methods)]
    sweeps = defaultdict(list)
    for each in results:
        if each.get("sweep"):
            sweeps[each["sweep"]].append(each)
    for sweep, points in sweeps.items():
        lines += [f"### Sweep: {sweep} (first seed, on `valid`, which is not what the table above reports)", ""]
        lines += [*table.head(), *(table.row(each["title"], [each], "valid") for each in points), ""]
    return lines


def ordered(titles: Iterable[str]) -> list[str]:
    """Titles in the tables' order, those of the base with new words last."""
    given, known = list(titles), [*ORDER, *(title + NEW_WORDS for title in ("base", *ORDER))]
    return [title for title in known if title in given]


def named(title: str) -> str:
    """A title as shown."""
    plain = title.removesuffix(NEW_WORDS)
    return TITLES.get(plain, plain) + title[len(plain) :]


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
            100 * mean_of(self.base_of(run)[part], self._original) / mean_of(run[part], self._original) for run in runs
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
        # A pretrained base was not trained here.
        rates = sorted({run.get("stage1_rate") or run["rate"] for run in runs if run.get("steps")})
        shown = " ".join(f"{rate:.3g}" for rate in rates) or "-"
        return row([*cells, f"{spread(keeps, 2)}%", shown, str(len(runs))])

    def base_of(self, run: dict[str, Any]) -> dict[str, Any]:
        return self._bases[run.get("base_seed", run["seed"])]


def cost_cells(runs: list[dict[str, Any]], stages: dict[str, dict[str, Any]]) -> list[str]:
    """Of both stages where there are two, of the first run; empty where a result has no costs."""
    parts = [runs[0], *(stages[name] for name in runs[0]["needs"][:1] if name in stages)]
    if any("training_flops" not in part for part in parts):
        return [""] * len(COSTS)
    sizes = f"{runs[0]['all_parameters'] / 1e6:.2f}M, {runs[0]['active_parameters'] / 1e6:.2f}M"
    seconds = [part.get("cpu_seconds") for part in parts]
    spent = "" if None in seconds else f"{sum(seconds):.0f}"
    return [sizes, f"{sum(part['training_flops'] for part in parts) / 1e12:.2f}", spent]


def claims(about: dict[str, Any], table: Table, held: HeldOut, stages: dict[str, dict[str, Any]]) -> list[str]:
    """Every method with 95% intervals over works and seeds, each with its base where there are as many bases."""
    bases = len({table.base_of(run)["key"] for runs in table.methods.values() for run in runs})
    lines = [
        f"### Intervals of 95% over works and seeds; {bases} base{'s' if bases > 1 else ''}",
        "",
        f"Documents with at most {SEEN:.0%} of their passages in the training text: {'; '.join(held.counts())}.",
        "",
        row(["", "seeds", "new languages against the base", "against full fine-tuning", "retention", *COSTS]),
        row(["---"] * (5 + len(COSTS))),
    ]
    full = {run["seed"]: run for run in table.methods.get("full", [])}
    for title in ordered(table.methods):
        runs = table.methods[title]
        own = [table.base_of(run) for run in runs]
        paired = [run for run in runs if run["seed"] in full and title != "full"]
        cells = [named(title), str(len(runs)), change(held.ratio(own, runs, about["expanded"]))]
        against = held.ratio([full[run["seed"]] for run in paired], paired, about["expanded"]) if paired else None
        cells += [change(against) if against else "", retention(held.ratio(own, runs, about["original"]))]
        lines.append(row([*cells, *cost_cells(runs, stages)]))
    pairs = [("MoE-LPR", other) for other in ORDER if other != "MoE-LPR"] + [("review without LPR", "no review")]
    lines += ["", row(["contrast", "seeds", "new languages", "original languages"]), row(["---"] * 4)]
    for after, before in pairs:
        ones = {run["seed"]: run for run in table.methods.get(before, [])}
        twos = [run for run in table.methods.get(after, []) if run["seed"] in ones]
        if twos:
            both = [ones[run["seed"]] for run in twos], twos
            cells = [f"{named(after)} against {named(before)}", str(len(twos))]
            lines.append(row([*cells, *(change(held.ratio(*both, about[name])) for name in ("expanded", "original"))]))
    return [*lines, ""]


def change(ratio: Ratio) -> str:
    return f"{100 * ratio.value:+.1f}% ({100 * ratio.low:+.1f} to {100 * ratio.high:+.1f})"


def retention(ratio: Ratio) -> str:
    ends = [100 / (1 + each) for each in (ratio.value, ratio.high, ratio.low)]
    return f"{ends[0]:.2f}% ({ends[1]:.2f} to {ends[2]:.2f})"


def frontier(about: dict[str, Any], results: list[dict[str, Any]], bases: dict[int, Any], held: HeldOut) -> list[str]:
    """Gain in the new languages and retention of every training, by method and rate: what keeps more at equal gain?"""
    gains: dict[tuple[str, float, str], list[tuple[int, float, float]]] = defaultdict(list)
    for each in results:
        if each.get("title") and each["kind"] in ("single", "review", "stage1") and not each.get("best_of"):
            base = bases[each.get("base_seed", each["seed"])]
            gain = -100 * held.ratio([base], [each], about["expanded"]).value
            kept = 100 / (1 + held.ratio([base], [each], about["original"]).value)
            title = "MoE-LPR" if each.get("sweep") else named(each["title"])
            # A review is known by the rate of its stage 1, where that differs.
            rate = each.get("stage1_rate", each["rate"])
            what = title, rate, each["title"] if each.get("sweep") else f"{rate:.3g}"
            gains[what].append((base["seed"], gain, kept))
    lines = ["### Gain in the new languages and retention, at every rate, by base", ""]
    lines += [row(["method", "rate", "gain, %", "kept, %"]), row(["---"] * 4)]
    for (title, _, label), found in sorted(gains.items()):
        cells = (", ".join(f"{each[part]:.1f}" for each in sorted(found)) for part in (1, 2))
        lines.append(row([title, label, *cells]))
    return [*lines, ""]


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
    """Accuracy by lm-eval task, where tasks were asked, and its difference from the base's on the same questions."""
    rows = {"base": bases[min(bases)]} | {named(title): methods[title][0] for title in ordered(methods)}
    rows = {title: each["tasks"] for title, each in rows.items() if each.get("tasks")}
    if "base" not in rows:
        return []
    names = list(rows["base"])
    questions = ", ".join(f"{name} {rows['base'][name]['questions']}" for name in names)
    lines = [
        "lm-eval tasks, 0 shots: accuracy in percent with its 95% interval; below it the difference from the base on "
        f"the same questions with its own; questions: {questions}.",
        "",
        row(["", *names]),
        row(["---"] * (len(names) + 1)),
    ]
    for title, scores in rows.items():
        lines.append(
            row([title, *(f"{100 * scores[name]['acc']:.1f} ±{196 * scores[name]['error']:.1f}" for name in names)])
        )
        if title != "base":
            lines.append(row(["", *(paired(scores[name], rows["base"][name]) for name in names)]))
    return [*lines, ""]


def paired(ours: dict[str, Any], base: dict[str, Any]) -> str:
    """Difference of two accuracies on the same questions, in percent, with its 95% interval; bold where it is below."""
    if "correct" not in ours or len(ours["correct"]) != len(base.get("correct", [])):
        return ""
    changes = [one - other for one, other in zip(ours["correct"], base["correct"], strict=True)]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    middle = statistics.fmean(changes)
    text = f"{100 * middle:+.1f} ({100 * (middle - 1.96 * error):+.1f} to {100 * (middle + 1.96 * error):+.1f})"
    return f"**{text}**" if middle + 1.96 * error < 0 else text


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
        if each["seed"] == min(run["seed"] for run in staged) and each.get("title") in ("MoE-LPR", "no review"):
            shares = {language: statistics.fmean(layers) for language, layers in each["expert_0_weight"].items()}
            words = ", ".join(f"{language} {share:.2f}" for language, share in shares.items())
            rate = each.get("stage1_rate", each["rate"])
            lines.append(f"- weight of expert 0, {each['title']} at {rate:.3g}: {words}")
    return lines


def mean_of(values: dict[str, float], names: list[str]) -> float:
    return statistics.fmean(values[name] for name in names)


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    middle = f"{statistics.fmean(values):{sign}.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ±{statistics.stdev(values):.{digits}f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
