"""The tables of `lory_claims.py`, as Markdown, from the results of the finished trainings."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from lory_claims_intervals import SEEN, Documents, cell, contrast

TITLES = {
    "dense": "dense twin",
    "dense_wide": "dense control of equal FLOPs",
    "lory": "Lory",
    "prefix": "prefix routing",
    "expert_choice": "Expert Choice, tokens (looks ahead)",
    "expert_choice_threshold": "Expert Choice, tokens, by threshold (causal)",
    "segment_choice": "Expert Choice, segments (looks ahead)",
    "top_k": "top-2 of twice as many experts of half the width (Mixtral)",
    "emo": "top-2 within a pool of experts for each document (EMO)",
}
EVERYTHING = "all"
# Parts of the held-out text: settings are chosen on one, the other is reported.
TEST, CHOICE = "test", "validation"

# (model, variant, grouping) -> seed -> result
Runs = dict[tuple[str, str, str], dict[int, dict[str, Any]]]


def collect(results: list[dict[str, Any]]) -> Runs:
    """The results that hold scores; Expert Choice's causal scores are listed as a separate model."""
    runs: Runs = defaultdict(dict)
    for result in results:
        job = result["job"]
        if "scores" not in result:
            continue
        runs[job["model"], job["variant"], job["grouping"]][job["seed"]] = result
        if "scores_by_threshold" in result:
            causal = {**result, "scores": result["scores_by_threshold"]}
            runs[f"{job['model']}_threshold", job["variant"], job["grouping"]][job["seed"]] = causal
    return runs


def bits_by(result: dict[str, Any], what: str, part: str) -> dict[str, float]:
    """Bits for each of `what` ("tokens" or "bytes") of a part of the held-out text, by domain and over all of it."""
    scores = result["scores"]
    bits, count = np.array(scores[part]["bits"]), np.array(scores[part][what])
    each = {name: b / n for name, b, n in zip(scores["domains"], bits, count, strict=True) if n}
    return {**each, EVERYTHING: bits.sum() / count.sum()}


def perplexities(result: dict[str, Any], part: str = TEST) -> dict[str, float]:
    return {name: 2**bits for name, bits in bits_by(result, "tokens", part).items()}


def bits_per_byte(result: dict[str, Any]) -> dict[str, float]:
    return bits_by(result, "bytes", TEST)


def changes(runs: Runs, key: tuple[str, str, str], part: str = TEST) -> dict[str, list[float]]:
    """By domain: change of the perplexity against the dense twin in percent, for every seed that has both."""
    twins, found = runs.get(("dense", "", key[2]), {}), defaultdict(list)
    for seed, result in sorted(runs.get(key, {}).items()):
        if seed in twins:
            dense = perplexities(twins[seed], part)
            for name, value in perplexities(result, part).items():
                found[name].append(100 * (value / dense[name] - 1))
    return dict(found)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], digits: int = 1, signed: bool = True) -> str:
    """Mean and, with two or more values, their standard deviation."""
    if not values:
        return ""
    mean = f"{np.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def report(
    size: str,
    results: list[dict[str, Any]],
    times: list[dict[str, Any]],
    surroundings: str,
    documents: Documents | None = None,
) -> str:
    """The tables of all results so far. documents: the reported ones, for intervals."""
    runs = collect(results)
    main = [key for key in runs if not key[1]]
    order = list(TITLES)
    main.sort(key=lambda key: (key[2] != "similarity", key[2], order.index(key[0])))
    parts = [f"## Lory's claims at size {size}\n\n{surroundings}\n"]
    if main and documents:
        parts += [_claims(runs, main, documents), _contrasts(runs, documents), _fixed_routing(runs, documents)]
    if main:
        parts += [
            _by_domain(runs, main),
            _change_by_domain(runs, main),
            _groupings(runs),
            _routing(runs),
            _domains(runs),
        ]
    variants = sorted(key for key in runs if key[1])
    if variants:
        parts.append(_variants(runs, variants))
    if times:
        parts.append(_times(times))
    failed = [f"- {r['name']}: {r['error'].strip().splitlines()[-1]}" for r in results if "error" in r]
    return "\n".join(part for part in [*parts, *failed] if part)


def _label(key: tuple[str, str, str]) -> str:
    return TITLES[key[0]] + ("" if key[2] == "similarity" else f", {key[2]} batches")


def _claims(runs: Runs, keys: list[tuple[str, str, str]], documents: Documents) -> str:
    """Every model against its dense twin and the control of equal FLOPs, beside its cost."""
    rows = []
    for key in keys:
        twin, wide = ("dense", "", key[2]), ("dense_wide", "", key[2])
        found = contrast(runs, [(1, key), (-1, twin)], documents) if key != twin else None
        against = contrast(runs, [(1, key), (-1, wide)], documents) if key != wide else None
        one = max(runs[key].values(), key=lambda result: "flops_relative" in result)
        cpu = [each["cpu_seconds"] for each in runs[key].values() if "cpu_seconds" in each]
        rows.append(
            [
                _label(key),
                str(len(runs[key])),
                cell(found),
                " ".join(f"{value:+.1f}" for value in found["by_seed"]) if found else "",
                cell(against),
                f"{one['flops_relative']:.2f}" if "flops_relative" in one else "",
                f"{one['active_parameters'] / 1e6:.3f}M",
                f"{one['parameters'] / 1e6:.2f}M",
                f"{np.mean(cpu):.0f}" if cpu else "",
            ]
        )
    head = [
        "model",
        "seeds",
        "perplexity against the twin",
        "by seed",
        "against equal FLOPs",
        "FLOPs, times the twin's",
    ]
    head += ["active", "all parameters", "CPU s"]
    return (
        f"### Claims: {documents.works} works, {len(documents.rows)} documents with at most {SEEN:.0%} of their "
        "passages in the training text; 95% intervals over works and seeds\n\n" + table(head, rows)
    )


def _contrasts(runs: Runs, documents: Documents) -> str:
    """Differences between models other than the twin."""
    lory, random = ("lory", "", "similarity"), ("lory", "", "random")
    twin, random_twin = ("dense", "", "similarity"), ("dense", "", "random")
    pairs: dict[str, list[tuple[int, tuple[str, str, str]]]] = {
        "Lory: similar against random batches": [(1, lory), (-1, random)],
        "twin: similar against random batches": [(1, twin), (-1, random_twin)],
        "Lory's gain: similar against random batches": [(1, lory), (-1, twin), (-1, random), (1, random_twin)],
    }
    for model in ("prefix", "segment_choice", "expert_choice_threshold", "top_k", "emo"):
        pairs[f"Lory against {TITLES[model]}"] = [(1, lory), (-1, (model, "", "similarity"))]
    rows = []
    for name, terms in pairs.items():
        if found := contrast(runs, terms, documents):
            rows.append([name, str(found["seeds"]), cell(found), f"{found['p']:.2g}"])
    return "### Contrasts, perplexity\n\n" + table(["what", "seeds", "change", "p"], rows) if rows else ""


def _fixed_routing(runs: Runs, documents: Documents) -> str:
    """Lory scored with weights that no router chose, against its own routing."""
    rows = []
    for grouping in ("similarity", "random"):
        own: Runs = {}
        for seed, result in runs.get(("lory", "", grouping), {}).items():
            own.setdefault(("routed", "", ""), {})[seed] = result
            others = []
            for name, bits in result.get("fixed_routing", {}).items():
                scores = {"by_document": {**result["scores"]["by_document"], "bits": bits}}
                if name.startswith("other"):
                    others.append(np.array(bits))
                    continue
                own.setdefault((name, "", ""), {})[seed] = {"scores": scores}
            if others:
                scores = {"by_document": {**result["scores"]["by_document"], "bits": np.mean(others, axis=0)}}
                own.setdefault(("another", "", ""), {})[seed] = {"scores": scores}
        for name, title in (
            ("own", "its domain's mean"),
            ("another", "another domain's"),
            ("mean", "all domains' mean"),
        ):
            if found := contrast(own, [(1, (name, "", "")), (-1, ("routed", "", ""))], documents):
                rows.append([f"Lory, {grouping} batches, weights of {title}", str(found["seeds"]), cell(found)])
    title = "### Expert weights fixed by domain, perplexity against the model's own routing\n\n"
    return title + table(["what", "seeds", "change"], rows) if rows else ""


def _by_domain(runs: Runs, keys: list[tuple[str, str, str]]) -> str:
    parts = []
    for title, measure, digits in (("Perplexity", perplexities, 2), ("Bits per byte", bits_per_byte, 4)):
        domains = list(measure(next(iter(runs[keys[0]].values()))))
        rows = []
        for key in keys:
            each = [measure(result) for result in runs[key].values()]
            means = []
            for domain in domains:
                means.append(f"{np.mean([one[domain] for one in each]):.{digits}f}")
            rows.append([_label(key), str(len(each)), *means])
        parts.append(f"### {title} on held-out text, mean over seeds\n\n" + table(["model", "seeds", *domains], rows))
    return "\n".join(parts)


def _change_by_domain(runs: Runs, keys: list[tuple[str, str, str]]) -> str:
    rows, domains = [], []
    for key in keys:
        found = changes(runs, key)
        if key[0] != "dense" and found:
            domains = list(found)
            rows.append([_label(key), str(len(found[EVERYTHING])), *(spread(found[name]) for name in domains)])
    title = "### Perplexity against the dense twin of the same batches and seed, %, mean ± standard deviation\n\n"
    return title + table(["model", "seeds", *domains], rows) if rows else ""


def _groupings(runs: Runs) -> str:
    rows = []
    for grouping in ("similarity", "domain", "random"):
        dense, lory = runs.get(("dense", "", grouping), {}), runs.get(("lory", "", grouping), {})
        gain = changes(runs, ("lory", "", grouping)).get(EVERYTHING, [])
        if lory:
            cells = []
            for each in (dense, lory):
                values = [bits_per_byte(result)[EVERYTHING] for result in each.values()]
                cells.append(spread(values, 4, signed=False))
            rows.append([grouping, *cells, spread(gain)])
    return (
        "### Similarity batches against random ones, all domains\n\n"
        + table(["batches", "dense, bits per byte", "Lory, bits per byte", "perplexity, %"], rows)
        if rows
        else ""
    )


def _routing(runs: Runs) -> str:
    rows = []
    for key in runs:
        layers = [r["scores"]["divergence"] for r in runs[key].values()]
        if key[1] or not layers[0]:
            continue
        training = [r["training"] for r in runs[key].values()]
        entropy = [t["router_entropy"] for t in training if "router_entropy" in t]
        used = [100 * t["expert_utilisation"] for t in training if "expert_utilisation" in t]
        by_layer = " ".join(f"{value:.3f}" for value in np.mean(layers, axis=0))
        rows.append(
            [_label(key), by_layer, f"{np.mean(layers):.3f}", spread(entropy, 2, False), spread(used, 1, False)]
        )
    head = [
        "model",
        "divergence by layer, first to last",
        "mean",
        "router entropy, nats",
        "experts above 2/E for a segment, %",
    ]
    return (
        "### Specialisation: mean Jensen-Shannon divergence of routing between domains, bits\n\n" + table(head, rows)
        if rows
        else ""
    )


def _domains(runs: Runs) -> str:
    """Mean routing weights by domain in the layer where they differ most, of the first seed."""
    lory = runs.get(("lory", "", "similarity"), {})
    if not lory:
        return ""
    scores = lory[min(lory)]["scores"]
    layer = int(np.argmax(scores["divergence"]))
    weights = np.array(scores["routing"][layer])
    rows = []
    for name, row in zip(scores["domains"], weights, strict=True):
        rows.append([name, *(f"{w:.2f}" for w in row)])
    head = ["domain", *(f"expert {i}" for i in range(weights.shape[1]))]
    return f"### Mean routing weights of Lory in layer {layer + 1}, seed {min(lory)}\n\n" + table(head, rows)


def _variants(runs: Runs, keys: list[tuple[str, str, str]]) -> str:
    twins, defaults = runs.get(("dense", "", "similarity"), {}), runs.get(("lory", "", "similarity"), {})
    rows = [["defaults", str(len(defaults)), *_against_dense(runs, ("lory", "", "similarity")), ""]]
    for key in sorted(keys, key=lambda key: np.mean(changes(runs, key, CHOICE).get(EVERYTHING, [0]))):
        seeds = [seed for seed in runs[key] if seed in twins and seed in defaults]
        to_defaults = [
            100 * (perplexities(runs[key][s], CHOICE)[EVERYTHING] / perplexities(defaults[s], CHOICE)[EVERYTHING] - 1)
            for s in seeds
        ]
        rows.append([key[1], str(len(runs[key])), *_against_dense(runs, key), spread(to_defaults, 2)])
    head = ["variant of Lory", "seeds", "validation, % against dense", "test, % against dense"]
    head.append("validation, % against the defaults, same seeds")
    return "### The switch and other settings, perplexity\n\n" + table(head, rows)


def _against_dense(runs: Runs, key: tuple[str, str, str]) -> list[str]:
    return [spread(changes(runs, key, part).get(EVERYTHING, [])) for part in (CHOICE, TEST)]


def _times(times: list[dict[str, Any]]) -> str:
    rows = []
    for row in times:
        twin = next(t for t in times if t["model"] == "dense" and t["compiled"] == row["compiled"])
        memory = f"{row['peak_megabytes']} MiB" if row["peak_megabytes"] else ""
        rows.append(
            [
                TITLES[row["model"]] + (", compiled" if row["compiled"] else ""),
                f"{row['milliseconds']:.2f}",
                f"{row['milliseconds'] / twin['milliseconds']:.2f}",
                memory,
                f"{row['parameters'] / 1e6:.1f}M",
            ]
        )
    return (
        "### A training step alone on the device, in the production loop (optimizer included)\n\n"
        + table(["model", "ms", "times dense", "peak memory", "parameters"], rows)
        + "\nOn a GPU the top-2 mixture computes every expert for every token; a grouped kernel would be faster.\n"
    )
