"""The charts of the report: their series, colours, and the labels of their values."""

from __future__ import annotations

from eclectus.storage.lineage.history import History
from eclectus.tasks.documents.language_codes import language_name, shortened
from eclectus.tasks.evaluation.changes import Change
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.report.chart import Chart, Dash, Series
from eclectus.tasks.report.formatting import percent, within
from eclectus.tasks.report.significance import coverage
from eclectus.tasks.report.verdict import BASE, LORY, STAGE_1, STAGE_2, Comparer

COLOURS = {BASE: "#7d8ba1", LORY: "#e08a2e", STAGE_1: "#9b7fe0", STAGE_2: "#22a38b"}
FURTHER = ("#d45c7a", "#4f9bd9", "#8fae3c", "#c98a9b", "#b8863b", "#5fb7c4", "#a35fb8", "#6d7fd1")
WARM_UP = "#9aa0a3"
CURVE_COLOUR = COLOURS[STAGE_2]
MOST_LAYERS = 6
GROUP_DASHES: dict[str, Dash] = {"original": "solid", "expanded": "dotted"}

ROUTER_CURVES = {
    "router_entropy": "Routing entropy over training, nats",
    "expert_utilisation": "Share of experts with a mean weight over 2/E, over training",
    "balance_loss": "Load-balancing loss over training (1: all experts used equally)",
    "lpr_loss": "Language-prior loss over training (low: original languages go to expert 0)",
}


def colour(name: str, names: list[str]) -> str:
    """A model's colour: the same in every chart and table."""
    others = [each for each in names if each not in COLOURS]
    return COLOURS.get(name) or FURTHER[others.index(name) % len(FURTHER)]


def score_charts(comparer: Comparer) -> list[Chart]:
    """Scores by domain, by language and by position in the window."""
    return [*by_domain(comparer), *by_language(comparer), *by_position(comparer)]


def by_domain(comparer: Comparer) -> list[Chart]:
    """Change of bits per byte against the base by domain of the original languages, with intervals."""
    domains = comparer.base.domains(group="original")
    series, shown = [], []
    for name in comparer.scores:
        if name in (comparer.base.name, STAGE_1, STAGE_2):
            continue
        found = [(row, comparer.change(name, group="original", domain=domain)) for row, domain in enumerate(domains)]
        changes = [(row, change) for row, change in found if change]
        if changes:
            shown += [change for _, change in changes]
            series.append(_changes(name, changes, domains, list(comparer.scores)))
    title = (
        f"Bits per byte by domain, against {comparer.base.name} (left is better; bars: 95% interval {coverage(shown)})"
    )
    label = "change in bits per byte, percent"
    return [Chart("by-domain", title, "dots", tuple(series), label, rows=tuple(domains))] if series else []


def by_language(comparer: Comparer) -> list[Chart]:
    """Bits per byte of every model in every language."""
    codes = [code for group in ("original", "expanded") for code in comparer.base.values("language", group=group)]
    rows = tuple(language_name(code) for code in codes)
    series = []
    for name, scores in comparer.scores.items():
        found = [(row, scores.bits_per_byte(language=code)) for row, code in enumerate(codes)]
        values = [(row, value) for row, value in found if value is not None]
        series.append(
            Series(
                name,
                colour(name, list(comparer.scores)),
                x=tuple(value for _, value in values),
                y=tuple(row for row, _ in values),
                labels=tuple(f"{rows[row]}, {name}: {value:.3f} bits per byte" for row, value in values),
            )
        )
    title = "Bits per byte by language (lower is better)"
    return [Chart("by-language", title, "bars", tuple(series), "bits per byte", rows=rows)] if rows else []


def by_position(comparer: Comparer) -> list[Chart]:
    """Bits per byte by position in the window, original languages."""
    series, context = [], 0
    for name, scores in comparer.scores.items():
        original = set(scores.values("language", group="original"))
        sums: dict[tuple[int, int], list[float]] = {}
        for row in scores.positions:
            if row["language"] in original:
                total = sums.setdefault((row["first"], row["last"]), [0.0, 0.0])
                total[0] += row["bits"]
                total[1] += row["bytes"]
                context = max(context, 0 if row["scored"] else row["last"] + 1)
        values = {positions: bits / size for positions, (bits, size) in sorted(sums.items())}
        labels = [f"{name}, tokens {first} to {last}: {value:.3f}" for (first, last), value in values.items()]
        middles = tuple((first + last) / 2 for first, last in values)
        if values:
            tint = colour(name, list(comparer.scores))
            series.append(Series(name, tint, middles, tuple(values.values()), tuple(labels)))
    title = (
        "Bits per byte by position in the window, original languages "
        "(shaded: context, excluded from all scores; Lory's look-ahead applies there)"
    )
    chart = Chart(
        "by-position", title, "lines", tuple(series), "position in the window, tokens", "bits per byte",
        shaded=(0, context),
    )  # fmt: skip
    return [chart] if series else []


def loss_curves(history: History, checkpoints: dict[str, str]) -> list[Chart]:
    """Training loss of every model and of its warm-up; one chart for pre-training, one for extension.

    checkpoints: digests by model.
    """
    series: dict[str, list[Series]] = {"pretrain": [], "extend": []}
    drawn: set[str] = set()
    for name, digest in checkpoints.items():
        for each in reversed(history.chain(digest)):
            made, curves = history.made[each], history.curves.get(each, {})
            points = curves.get("next_token_loss") or curves.get("loss")
            own = each == digest
            earlier = made.step == "pretrain" and history.made[digest].step == "pretrain" and each not in drawn
            if made.step in series and points and (own or earlier):
                tint = colour(name, list(checkpoints)) if own else WARM_UP
                series[made.step].append(curve(name if own else made.label, points, tint, "solid" if own else "dotted"))
                drawn.add(each)
    titles = {"pretrain": "Training loss, pre-training", "extend": "Training loss (next token), extension"}
    return [
        Chart(f"loss-{step}", titles[step], "lines", tuple(found), "training step", "nats per token")
        for step, found in series.items()
        if found
    ]


def router_curves(history: History, checkpoints: dict[str, str]) -> list[Chart]:
    """The routers' metrics over training, one chart per metric. checkpoints: digests by model."""
    charts = []
    for metric, title in ROUTER_CURVES.items():
        series = []
        for name, digest in checkpoints.items():
            points = history.curves.get(digest, {}).get(metric)
            if points:
                series.append(curve(name, points, colour(name, list(checkpoints))))
        if series:
            charts.append(Chart(f"router-{metric.replace('_', '-')}", title, "lines", tuple(series), "training step"))
    return charts


def lory_routing(scores: Scores, slug: str) -> list[Chart]:
    """Mean mixture weights by domain and expert, one map per layer."""
    return _maps(scores, "domain", slug, group="original")


def moe_routing(scores: Scores, slug: str) -> list[Chart]:
    """Mean router probabilities by language and expert, one map per layer."""
    return _maps(scores, "language", slug)


def expert_0(scores: dict[str, Scores], names: list[str]) -> list[Chart]:
    """The original expert's share by layer, before and after the review: the paper's figure."""
    series = []
    for name, each in scores.items():
        for group, dash in GROUP_DASHES.items():
            shares = {layer: each.shares("group", layer).get(group) for layer in each.layers}
            points = [(layer, share[0]) for layer, share in shares.items() if share]
            if points:
                series.append(curve(f"{name}, {group}", points, colour(name, names), dash, "layer"))
    title = "Router probability of expert 0, the original network, for original and expanded languages"
    chart = Chart(
        "expert-0", title, "lines", tuple(series), "layer", "share of expert 0", y_range=(0, 1)
    )  # fmt: skip
    return [chart] if series else []


def curve(name: str, points: list[tuple[int, float]], tint: str, dash: Dash = "solid", of: str = "step") -> Series:
    """A series over training steps, or over what `of` names."""
    return Series(
        name,
        tint,
        x=tuple(x for x, _ in points),
        y=tuple(y for _, y in points),
        labels=tuple(f"{name}, {of} {x}: {y:.3f}" for x, y in points),
        dash=dash,
    )


def shown_layers(layers: list[int]) -> list[int]:
    """At most MOST_LAYERS of them, evenly spread from first to last."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def _changes(name: str, changes: list[tuple[int, Change]], domains: list[str], names: list[str]) -> Series:
    labels = [
        f"{shortened(domains[row])}, {name}: {percent(each.bits)} ({within(each.bits_interval, each.covers)}), "
        f"{each.before:.3f} to {each.after:.3f}, {each.documents} documents"
        for row, each in changes
    ]
    ends = [each.bits_interval or (each.bits, each.bits) for _, each in changes]
    return Series(
        name,
        colour(name, names),
        x=tuple(100 * each.bits for _, each in changes),
        y=tuple(row for row, _ in changes),
        labels=tuple(labels),
        intervals=tuple((100 * low, 100 * high) for low, high in ends),
    )


def _maps(scores: Scores, label: str, slug: str, **groups: str) -> list[Chart]:
    layers = {layer: scores.shares(label, layer, "share", **groups) for layer in shown_layers(scores.layers)}
    highest = max((max(row) for shares in layers.values() for row in shares.values()), default=1.0)
    charts = []
    for layer, shares in layers.items():
        if label == "domain":
            shares = {domain: shares[domain] for domain in scores.domains(**groups) if domain in shares}
        rows = tuple(language_name(row) if label == "language" else shortened(row) for row in shares)
        series = [
            _map_row(row, number, values)
            for number, (row, values) in enumerate(zip(rows, shares.values(), strict=True))
        ]
        name, title = f"{slug}-{layer}", f"{scores.name}: layer {layer}, percent"
        if rows:
            charts.append(Chart(name, title, "map", tuple(series), "expert", rows=rows, highest=highest))
    return charts


def _map_row(row: str, number: int, shares: list[float]) -> Series:
    experts = range(len(shares))
    return Series(
        row,
        "",
        x=tuple(experts),
        y=(number,) * len(shares),
        labels=tuple(f"{row}, expert {expert}: {shares[expert]:.3f}" for expert in experts),
        shares=tuple(shares),
    )
