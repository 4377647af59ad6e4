"""The interactive figures, as plotly.js specifications in plain JSON: the page draws them, in the colours of its theme.

Plotly reads a little HTML in labels, and labels come from people's documents: all are escaped here.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

from eclectus.storage.lineage.history import History
from eclectus.tasks.documents.language_codes import language_name
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.report.verdict import BASE, LORY, STAGE_1, STAGE_2, Comparer
from eclectus.tasks.report.words import interval, percent

COLOURS = {BASE: "#7d8ba1", LORY: "#e08a2e", STAGE_1: "#9b7fe0", STAGE_2: "#22a38b"}
FURTHER = ("#d45c7a", "#4f9bd9", "#8fae3c", "#c98a9b")
EARLIER = "#9aa0a3"
MOST_LAYERS = 6
CELLS_WITH_NUMBERS = 8
ROW = 30


@dataclass(frozen=True)
class Figure:
    """name: of the element on the page. small: shown beside others of its kind."""

    name: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 320
    small: bool = False

    @property
    def spec(self) -> dict[str, Any]:
        return {"data": self.data, "layout": self.layout | {"height": self.height}}


def colour(name: str, names: list[str]) -> str:
    """A model's colour: the same in every figure and table."""
    others = [each for each in names if each not in COLOURS]
    return COLOURS.get(name) or FURTHER[others.index(name) % len(FURTHER)]


def by_domain(comparer: Comparer) -> list[Figure]:
    """Change of bits per byte against the base by domain of the original languages, with intervals."""
    models = [name for name in comparer.scores if name != comparer.base.name and name not in (STAGE_1, STAGE_2)]
    domains = comparer.base.values("domain", group="original")
    data = []
    for name in models:
        changes = {domain: comparer.change(name, group="original", domain=domain) for domain in reversed(domains)}
        data += _dots(name, {domain: each for domain, each in changes.items() if each}, list(comparer.scores))
    if not data:
        return []
    title = f"Bits per byte by domain, against {comparer.base.name} (left is better; bars: 95% interval)"
    return [Figure("by-domain", title, data, _dots_layout(), 90 + ROW * (len(domains) + 1))]


def by_language(comparer: Comparer) -> list[Figure]:
    """Bits per byte of every model in every language."""
    languages = [
        language for group in ("original", "expanded") for language in comparer.base.values("language", group=group)
    ]
    names = [safe(language_name(language)) for language in languages]
    data = [
        {
            "type": "bar",
            "name": safe(name),
            "x": names,
            "y": [each.bits_per_byte(language=language) for language in languages],
            "marker": {"color": colour(name, list(comparer.scores))},
            "hovertemplate": "%{x}: %{y:.3f} bits per byte<extra>" + safe(name) + "</extra>",
        }
        for name, each in comparer.scores.items()
    ]
    layout = {"barmode": "group", "yaxis": {"title": {"text": "bits per byte"}, "rangemode": "tozero"}, **_legend()}
    return [Figure("by-language", "Bits per byte by language (lower is better)", data, layout, 340)]


def by_position(comparer: Comparer) -> list[Figure]:
    """Bits per byte by place in the window, original languages."""
    data, context = [], 0
    for name, each in comparer.scores.items():
        original = set(each.values("language", group="original"))
        sums: dict[tuple[int, int], list[float]] = {}
        for row in each.positions:
            if row["language"] in original:
                total = sums.setdefault((row["first"], row["last"]), [0.0, 0.0])
                total[0] += row["bits"]
                total[1] += row["bytes"]
                context = max(context, 0 if row["scored"] else row["last"] + 1)
        places = sorted(sums)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": safe(name),
                "x": [(first + last) / 2 for first, last in places],
                "y": [sums[place][0] / sums[place][1] for place in places],
                "text": [f"tokens {first} to {last}" for first, last in places],
                "line": {"color": colour(name, list(comparer.scores)), "width": 2},
                "hovertemplate": "%{text}: %{y:.3f}<extra>" + safe(name) + "</extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "place in the window, tokens"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "bits per byte"}},
        "shapes": [{"type": "rect", "xref": "x", "yref": "paper", "x0": 0, "x1": context, "y0": 0, "y1": 1, "line": {"width": 0}, "fillcolor": "rgba(128,128,128,0.14)"}],
        **_legend(),
    }  # fmt: skip
    title = "Bits per byte by place in the window, original languages (shaded: context, which counts in no score; there Lory looks ahead)"
    return [Figure("by-position", title, data, layout, 320)] if any(trace["x"] for trace in data) else []


def loss_curves(history: History, checkpoints: dict[str, str]) -> list[Figure]:
    """Training loss of every model with the warm-up it came from; pre-training and extension apart. checkpoints: digests."""
    panels: dict[str, list[dict[str, Any]]] = {"pretrain": [], "extend": []}
    drawn: set[str] = set()
    for name, digest in checkpoints.items():
        chain = history.chain(digest)
        for each in reversed(chain):
            made, curves = history.made[each], history.curves.get(each, {})
            points = curves.get("next_token_loss") or curves.get("loss")
            own = each == digest
            earlier = made.step == "pretrain" and history.made[digest].step == "pretrain" and each not in drawn
            if made.step in panels and points and (own or earlier):
                tint = colour(name, list(checkpoints)) if own else EARLIER
                panels[made.step].append(_curve(name if own else made.label, points, tint, own))
                drawn.add(each)
    titles = {"pretrain": "Training loss, pre-training", "extend": "Training loss (next token), extension"}
    axes = {
        "xaxis": {"title": {"text": "training step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "nats a token"}},
        **_legend(),
    }
    return [
        Figure(f"loss-{panel}", titles[panel], data, axes, 320, small=True) for panel, data in panels.items() if data
    ]


ROUTER_CURVES = {
    "router_entropy": "Entropy of routing over training, nats",
    "expert_utilisation": "Share of experts with a weight over 2/E, over training",
    "balance_loss": "Balance loss over training (1: experts used alike)",
    "lpr_loss": "Language-prior loss over training (low: expert 0 takes the original languages)",
}


def router_curves(history: History, checkpoints: dict[str, str]) -> list[Figure]:
    """What training journalled of the routers, a figure a measure. checkpoints: digests by model."""
    figures = []
    for measure, title in ROUTER_CURVES.items():
        found = {
            name: history.curves[digest][measure]
            for name, digest in checkpoints.items()
            if history.curves.get(digest, {}).get(measure)
        }
        data = [_curve(name, points, colour(name, list(checkpoints)), True) for name, points in found.items()]
        axes = {"xaxis": {"title": {"text": "training step"}, "rangemode": "tozero"}, "yaxis": {}, **_legend()}
        if data:
            figures.append(Figure(f"router-{measure.replace('_', '-')}", title, data, axes, 300, small=True))
    return figures


def lory_routing(scores: Scores) -> list[Figure]:
    """Mean mixture weights by domain and expert, a map for each layer."""
    return _maps(scores, "domain", "share", "Layer {layer}, percent", "routing-lory", group="original")


def moe_routing(scores: Scores, slug: str) -> list[Figure]:
    """Mean router probabilities by language and expert, a map for each layer."""
    return _maps(scores, "language", "share", "Layer {layer}, percent", f"routing-{slug}")


def expert_0(scores: dict[str, Scores]) -> list[Figure]:
    """The original expert's share by layer, before and after the review: the paper's figure."""
    data = []
    dashes = {name: dash for name, dash in zip(reversed(list(scores)), ("solid", "dot", "dash"), strict=False)}
    for name, each in scores.items():
        for group, tint in (("original", COLOURS[STAGE_2]), ("expanded", COLOURS[LORY])):
            shares = {layer: each.shares("group", layer).get(group) for layer in each.layers}
            points = {layer: share[0] for layer, share in shares.items() if share}
            if points:
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": f"{group} languages, {safe(name)}",
                        "x": list(points),
                        "y": list(points.values()),
                        "line": {"color": tint, "width": 2, "dash": dashes.get(name, "solid")},
                        "hovertemplate": "layer %{x}: %{y:.3f}",
                    }
                )
    layout = {
        "xaxis": {"title": {"text": "layer"}, "dtick": 1 if len(data[0]["x"]) <= 12 else None} if data else {},
        "yaxis": {"title": {"text": "share of expert 0"}, "range": [0, 1]},
        **_legend(),
    }
    return (
        [Figure("expert-0", "Router probability of expert 0, the original network", data, layout, 340)] if data else []
    )


def shown_layers(layers: list[int]) -> list[int]:
    """At most MOST_LAYERS of them, evenly spread from first to last."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def _maps(scores: Scores, label: str, field: str, title: str, slug: str, **groups: str) -> list[Figure]:
    layers = {layer: scores.shares(label, layer, field, **groups) for layer in shown_layers(scores.layers)}
    highest = max((max(row) for shares in layers.values() for row in shares.values()), default=1.0)
    figures = []
    for layer, shares in layers.items():
        rows = list(reversed(shares))
        named = [safe(language_name(row) if label == "language" else row) for row in rows]
        trace = {
            "type": "heatmap",
            "x": [f"{expert}" for expert in range(scores.experts)],
            "y": named,
            "z": [[round(value, 4) for value in shares[row]] for row in rows],
            "zmin": 0,
            "zmax": round(highest, 4),
            "showscale": False,
            "xgap": 2,
            "ygap": 2,
            "hovertemplate": "%{y}, expert %{x}: %{z:.3f}<extra></extra>",
        }
        if scores.experts <= CELLS_WITH_NUMBERS:
            trace |= {
                "text": [[f"{100 * value:.0f}" for value in shares[row]] for row in rows],
                "texttemplate": "%{text}",
                "textfont": {"size": 11},
            }
        layout = {
            "xaxis": {"title": {"text": "expert"}, "type": "category", "showgrid": False},
            "yaxis": {"showgrid": False},
        }
        figures.append(
            Figure(
                f"{slug}-{layer}", title.format(layer=layer), [trace], layout, 84 + 26 * max(2, len(rows)), small=True
            )
        )
    return figures


def _dots(name: str, changes: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    values = [100 * each.bits for each in changes.values()]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": safe(name),
            "x": values,
            "y": [safe(row) for row in changes],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [
                    100 * each.bits_interval[1] - value for each, value in zip(changes.values(), values, strict=True)
                ],
                "arrayminus": [
                    value - 100 * each.bits_interval[0] for each, value in zip(changes.values(), values, strict=True)
                ],
                "thickness": 2,
                "width": 5,
            },
            "marker": {"color": colour(name, names), "size": 10},
            "text": [
                f"{percent(each.bits)} ({interval(each.bits_interval)}), {each.before:.3f} to {each.after:.3f}, "
                f"{each.documents} documents"
                for each in changes.values()
            ],
            "hovertemplate": "%{y}: %{text}<extra>" + safe(name) + "</extra>",
        }
    ]


def _dots_layout() -> dict[str, Any]:
    return {
        "xaxis": {
            "title": {"text": "change of bits per byte, percent"},
            "zeroline": True,
            "zerolinewidth": 2,
            "rangemode": "tozero",
        },
        "yaxis": {"showgrid": False},
        **_legend(),
    }


def _curve(name: str, points: list[tuple[int, float]], tint: str, own: bool) -> dict[str, Any]:
    """own: whether it is the training that made the model, not a stage before it."""
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "name": safe(name),
        "x": [step for step, _ in points],
        "y": [round(value, 5) for _, value in points],
        "line": {"color": tint, "width": 2, "dash": "solid" if own else "dot"},
        "hovertemplate": "step %{x}: %{y:.3f}<extra>" + safe(name) + "</extra>",
    }


def _legend() -> dict[str, Any]:
    return {"showlegend": True, "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}}


def safe(text: str) -> str:
    """A label that is only a label."""
    return html.escape(str(text))
