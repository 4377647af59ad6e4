"""Still pictures (PNG) of what the page shows, for Prefect's UI and for Markdown: scores, training loss, routing."""

from __future__ import annotations

import html
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.lineage.history import History
from eclectus.tasks.documents.language_codes import language_name
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.report import figures
from eclectus.tasks.report.verdict import Comparer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 120


def draw_pictures(comparer: Comparer, history: History, checkpoints: dict[str, Artifact], folder: Path) -> list[Path]:
    """Writes `scores.png` and, where there is something to show, `loss.png` and `routing.png`; returns what it wrote."""
    # The canvas of its own, not pyplot: no global state, no display.
    drawn = [_scores(comparer, folder / "scores.png")]
    drawn += _loss(history, checkpoints, list(comparer.scores), folder / "loss.png")
    drawn += _routing(comparer.scores, folder / "routing.png")
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        # The one font that is sure to be there lacks some alphabets; a label in them shows boxes, and nothing else fails.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
    return path


def _scores(comparer: Comparer, path: Path) -> Path:
    """Bars: bits per byte by language and by domain of the original languages."""
    rows = [
        (language_name(code), {"language": code})
        for group in ("original", "expanded")
        for code in comparer.base.values("language", group=group)
    ]
    domains = comparer.base.values("domain", group="original")
    rows += [(domain, {"group": "original", "domain": domain}) for domain in domains if len(domains) > 1]
    names = list(comparer.scores)
    figure = _figure(8, 1 + 0.18 * len(rows) * (len(names) + 1.4))
    axes = figure.subplots()
    thick = 0.8 / len(names)
    for number, (name, scores) in enumerate(comparer.scores.items()):
        places = [row + number * thick for row in range(len(rows))]
        values = [scores.bits_per_byte(**labels) or 0.0 for _, labels in rows]
        axes.barh(places, values, thick * 0.92, label=_plain(name), color=figures.colour(name, names))
    axes.set_yticks([row + 0.4 - thick / 2 for row in range(len(rows))], [_plain(title) for title, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte on held-out text (lower is better)")
    axes.legend(frameon=False, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1))
    _tidy(axes)
    return _save(figure, path)


def _loss(history: History, checkpoints: dict[str, Artifact], names: list[str], path: Path) -> list[Path]:
    panels = figures.loss_curves(history, {name: each.digest for name, each in checkpoints.items()})
    if not panels:
        return []
    figure = _figure(4.6 * len(panels), 3.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for trace in panel.data:
            style = ":" if trace["line"]["dash"] == "dot" else "-"
            axes.plot(trace["x"], trace["y"], style, color=trace["line"]["color"], label=_plain(trace["name"]))
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("training step")
        axes.set_ylabel("nats a token")
        axes.legend(frameon=False)
        _tidy(axes)
    return [_save(figure, path)]


def _routing(scores: dict[str, Scores], path: Path) -> list[Path]:
    """A row of maps for each routed model: Lory by domain, others by language; a column for each layer shown."""
    routed = {name: each for name, each in scores.items() if each.routing}
    if not routed:
        return []
    columns = max(len(figures.shown_layers(each.layers)) for each in routed.values())
    figure = _figure(2.6 * columns + 1, 2.1 * len(routed) + 0.4)
    grid = figure.subplots(len(routed), columns, squeeze=False)
    for line, (name, each) in zip(grid, routed.items(), strict=True):
        lory = each.about["model"].startswith("Lory")
        layers = figures.shown_layers(each.layers)
        maps = [each.shares("domain", i, group="original") if lory else each.shares("language", i) for i in layers]
        highest = max((max(row) for shares in maps for row in shares.values()), default=1.0)
        for axes, layer, shares in zip(line, layers, maps, strict=False):
            axes.imshow(list(shares.values()), aspect="auto", cmap="viridis", vmin=0, vmax=highest)
            titles = [row if lory else language_name(row) for row in shares]
            axes.set_yticks(range(len(titles)), [_plain(title) for title in titles] if layer == layers[0] else [])
            axes.set_title(f"{_plain(name)}, layer {layer}", fontsize=9)
            axes.set_xticks(range(each.experts) if each.experts <= 16 else [])
            axes.tick_params(labelsize=8)
        for axes in line[len(layers) :]:
            axes.axis("off")
    return [_save(figure, path)]


def _plain(text: str) -> str:
    """Matplotlib reads mathematics between dollar signs, and no HTML; a label is only a label."""
    return html.unescape(text).replace("$", r"\$")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
