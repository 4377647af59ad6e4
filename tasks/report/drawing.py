"""Charts drawn by matplotlib from one description: SVG for the page, PNG for Markdown and Prefect.

The layout is computed here, in SVG pixels, instead of by matplotlib's constrained layout: a chart is as tall as its
rows need, with one model or with twenty, and drawing takes half the time. On the page, text has the page's font,
colours follow its theme (CSS variables), the legend is HTML, and a transparent shape with a <title> over each value
shows it on hover. Price: 40 ms per chart.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import textwrap
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from eclectus.tasks.report.chart import Chart, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light theme's colours in pictures; on the page the variables of page.css.
INK, SOFT, LINE, CELL = "#1d2428", "#5c686e", "#dfe3e1", "#14795f"
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", CELL: "var(--cell)"}

WIDTH, PLOT_HEIGHT, FONT_SIZE, TEXT_LINE = 350, 160, 11, 15
CHARACTER_WIDTH = 0.58 * FONT_SIZE
BAR, MAP_ROW, GAP = 7, 20, 10
LONGEST_LABEL = 26
PICTURE_DPI = 144
# A curve shows its values on hover at this many points, all series of a chart together.
HOVER_POINTS, HOVER_RADIUS = 240, 6
CELLS_WITH_NUMBERS = 8


def draw_svg(chart: Chart) -> Markup:
    """The chart as an inline SVG element, without title and legend, which the page writes as HTML."""
    file = io.StringIO()
    with _drawing_settings():
        figure, (axes,) = _draw([chart], columns=1, captions=False)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ET.fromstring(file.getvalue())
    _clean(root, chart.name)
    root.attrib = {
        "class": "chart",
        "role": "img",
        "aria-label": shorten(chart.title, 200),
        "viewBox": root.attrib["viewBox"],
    }
    root.append(_hover_shapes(chart, axes, figure.bbox.height))
    # Safe: ElementTree escapes every label.
    return Markup(ET.tostring(root, encoding="unicode"))


def draw_png(charts: list[Chart], columns: int = 1) -> bytes:
    """The charts in a grid as one PNG, with titles and legends, in the colours of the light theme."""
    file = io.BytesIO()
    with _drawing_settings():
        figure, _ = _draw(charts, min(columns, len(charts)), captions=True)
        figure.savefig(file, format="png", dpi=PICTURE_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


@contextlib.contextmanager
def _drawing_settings() -> Iterator[None]:
    """Text stays text, '$' in a label starts no formula, and glyphs that the pictures' font lacks raise no warning."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rc("svg", fonttype="none", hashsalt="eclectus")
        matplotlib.rc("text", parse_math=False)
        matplotlib.rc("font", size=FONT_SIZE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _draw(charts: list[Chart], columns: int, captions: bool) -> tuple[Figure, list[Axes]]:
    """The charts in rows of `columns`, each row as high as its highest chart."""
    # A canvas without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frames = [_Frame.of(chart, captions) for chart in charts]
    lines = [frames[at : at + columns] for at in range(0, len(frames), columns)]
    heights = [max(frame.height for frame in line) for line in lines]
    width, height = columns * WIDTH, sum(heights)
    figure = Figure((width / 72, height / 72), dpi=72, facecolor="none")
    FigureCanvasAgg(figure)
    drawn, top = [], height
    for line, line_height in zip(lines, heights, strict=True):
        for column, frame in enumerate(line):
            left, bottom = column * WIDTH + frame.left, top - frame.top - frame.plot
            box = (left / width, bottom / height, (WIDTH - frame.left - GAP) / width, frame.plot / height)
            axes = figure.add_axes(box, facecolor="none")
            _draw_chart(axes, frame.chart)
            if captions:
                _write_captions(figure, axes, frame, column * WIDTH, top)
            drawn.append(axes)
        top -= line_height
    return figure, drawn


@dataclass(frozen=True)
class _Frame:
    """The layout of a chart in pixels: left of and above the plot, the plot's height, and the whole height."""

    chart: Chart
    left: float
    top: float
    plot: float
    height: float
    title: tuple[str, ...] = ()
    legend_columns: int = 1

    @classmethod
    def of(cls, chart: Chart, captions: bool) -> _Frame:
        rows = [_text_width(shorten(row)) for row in chart.rows]
        left = min(10 + max(rows, default=6 * CHARACTER_WIDTH), WIDTH / 2)
        top: float = GAP + (TEXT_LINE + 4 if chart.y_label else 0)
        title: tuple[str, ...] = ()
        columns = 1
        if captions:
            title = tuple(textwrap.wrap(shorten(chart.title, 200), int((WIDTH - 2 * GAP) / CHARACTER_WIDTH)))
            widest = max((_text_width(shorten(each.name)) for each in chart.legend), default=0)
            columns = max(1, int((WIDTH - GAP) / (widest + 36)))
            top += TEXT_LINE * (len(title) + math.ceil(len(chart.legend) / columns)) + GAP / 2
        plot = _plot_height(chart)
        return cls(chart, left, top, plot, top + plot + TEXT_LINE * (2 if chart.x_label else 1) + GAP, title, columns)


def _plot_height(chart: Chart) -> float:
    if chart.kind == "lines":
        return PLOT_HEIGHT
    row = MAP_ROW if chart.kind == "map" else len(chart.series) * BAR + GAP
    return max(2, len(chart.rows)) * row


def _text_width(text: str) -> float:
    """An estimate on the safe side; East Asian characters are twice as wide."""
    return CHARACTER_WIDTH * sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _draw_chart(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, labelcolor=SOFT, labelsize=FONT_SIZE)
    axes.set_axisbelow(True)
    if chart.kind == "lines":
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.ticklabel_format(style="plain", useOffset=False)
        _draw_lines(axes, chart)
    else:
        axes.set_yticks(range(len(chart.rows)), [shorten(row) for row in chart.rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(chart.rows) - 0.5, -0.5)
        {"bars": _draw_bars, "dots": _draw_dots, "map": _draw_map}[chart.kind](axes, chart)
    if chart.kind in ("bars", "dots"):
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(chart.x_label, color=SOFT, labelpad=2)
    if chart.y_label:
        axes.annotate(
            chart.y_label, (0, 1), (-6 * CHARACTER_WIDTH, 9), "axes fraction", textcoords="offset points", color=SOFT
        )


def _draw_lines(axes: Axes, chart: Chart) -> None:
    if chart.shaded:
        axes.axvspan(*chart.shaded, facecolor=SOFT, alpha=0.14, linewidth=0)
    for each in chart.series:
        marker = "o" if len(each.x) <= 12 else None
        axes.plot(each.x, each.y, color=each.colour, linestyle=each.dash, linewidth=2, marker=marker, markersize=5)
    if chart.y_range:
        axes.set_ylim(*chart.y_range)
    low, high = axes.get_xlim()
    axes.set_xlim(min(0, low), high)


def _draw_bars(axes: Axes, chart: Chart) -> None:
    for number, each in enumerate(chart.series):
        axes.barh(_row_positions(chart, number), each.x, _bar_share(chart) * 0.92, color=each.colour)


def _draw_dots(axes: Axes, chart: Chart) -> None:
    axes.axvline(0, color=SOFT, linewidth=1)
    for number, each in enumerate(chart.series):
        positions = _row_positions(chart, number)
        low, high = zip(*each.intervals, strict=True)
        axes.hlines(positions, low, high, colors=each.colour, linewidth=2)
        axes.plot(each.x, positions, "o", color=each.colour, markersize=6)


def _draw_map(axes: Axes, chart: Chart) -> None:
    """Cells as rectangles of one colour, more opaque for higher shares."""
    from matplotlib.patches import Rectangle

    columns = 1 + max(int(max(each.x)) for each in chart.series)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_xticks(range(0, columns, math.ceil(columns / 16)))
    for each in chart.series:
        for x, y, share in zip(each.x, each.y, each.shares, strict=True):
            alpha = round(0.04 + 0.76 * share / (chart.highest or 1), 2)
            axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=CELL, alpha=alpha, linewidth=0))
            if columns <= CELLS_WITH_NUMBERS:
                axes.text(x, y, f"{100 * share:.0f}", color=INK, ha="center", va="center_baseline")


def _bar_share(chart: Chart) -> float:
    """A bar's share of its row's height."""
    return BAR / (len(chart.series) * BAR + GAP)


def _row_positions(chart: Chart, number: int) -> list[float]:
    """Positions of a series on the vertical axis, side by side with the others of its row."""
    return [row + (number - (len(chart.series) - 1) / 2) * _bar_share(chart) for row in chart.series[number].y]


def _write_captions(figure: Figure, axes: Axes, frame: _Frame, left: float, top: float) -> None:
    from matplotlib.lines import Line2D

    width, height = figure.bbox.size
    figure.text(
        (left + GAP) / width, (top - GAP / 2) / height, "\n".join(frame.title), color=INK, weight="bold", va="top"
    )
    legend_top = top - GAP - TEXT_LINE * len(frame.title)
    lines = frame.chart.kind == "lines"
    handles = [
        Line2D([], [], color=each.colour, linestyle=each.dash if lines else "solid", linewidth=2 if lines else 7)
        for each in frame.chart.legend
    ]
    if handles:
        axes.legend(
            handles, [shorten(each.name) for each in frame.chart.legend], frameon=False, ncols=frame.legend_columns,
            loc="upper left", bbox_to_anchor=((left + GAP) / width, legend_top / height),
            bbox_transform=figure.transFigure, borderpad=0, borderaxespad=0, labelcolor=INK, handlelength=1.6,
            labelspacing=0.25, columnspacing=1.2,
        )  # fmt: skip


def _clean(root: ET.Element, name: str) -> None:
    """Removes what the page does not use and sets the theme's colours; ids are prefixed with the chart's name."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")) or (child.tag.endswith("}g") and not len(child)):
                parent.remove(child)
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
        each.text, each.tail = (each.text or "").strip() or None, None
        attributes = {key.rpartition("}")[2]: value for key, value in each.attrib.items()}
        if each.tag == "g":
            attributes.pop("id", None)
        if attributes.get("transform", "").startswith("rotate(-0"):
            del attributes["transform"]
        if "style" in attributes:
            attributes["style"] = _themed(attributes["style"])
        each.attrib = {key: _shortened(key, value, name) for key, value in attributes.items()}


def _themed(style: str) -> str:
    kept = [part for part in style.split("; ") if not part.startswith("font-family")]
    return re.sub("#[0-9a-f]{6}", lambda colour: VARIABLES.get(colour[0], colour[0]), ";".join(kept))


def _shortened(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key in ("href", "clip-path"):
        return value.replace("#", f"#{name}-")
    if key == "style":
        return value
    # Tenths of a pixel are fine enough.
    return re.sub(r"(\d+\.\d)\d+", r"\1", " ".join(value.split()))


def _hover_shapes(chart: Chart, axes: Axes, height: float) -> ET.Element:
    """A transparent shape over each value, with its label as <title>. height: of the SVG, whose y axis points down."""
    group = ET.Element("g", {"class": "values"})

    def pixel(x: float, y: float) -> Point:
        right, up = axes.transData.transform((x, y))
        return float(right), height - float(up)

    def add(tag: str, label: str, **attributes: float) -> None:
        element = ET.SubElement(group, tag, {key: f"{value:.1f}" for key, value in attributes.items()})
        ET.SubElement(element, "title").text = shorten(label, 200)

    for number, each in enumerate(chart.series):
        rows = list(each.y) if chart.kind in ("lines", "map") else _row_positions(chart, number)
        points = list(zip(each.x, rows, each.labels, strict=True))
        if chart.kind == "lines":
            points = _spread(points, max(2, HOVER_POINTS // len(chart.series)))
        for x, y, label in points:
            right, down = pixel(x, y)
            if chart.kind in ("lines", "dots"):
                add("circle", label, cx=right, cy=down, r=HOVER_RADIUS)
                continue
            left = pixel(0 if chart.kind == "bars" else x - 0.5, y)[0]
            end = right if chart.kind == "bars" else pixel(x + 0.5, y)[0]
            half = (BAR if chart.kind == "bars" else MAP_ROW) / 2
            add("rect", label, x=min(left, end), y=down - half, width=abs(end - left), height=2 * half)
    return group


def _spread(points: list[tuple[float, float, str]], most: int) -> list[tuple[float, float, str]]:
    """At most that many of them, evenly spread, first and last among them."""
    if len(points) <= most:
        return points
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def shorten(text: str, longest: int = LONGEST_LABEL) -> str:
    """A label on one line, without characters that XML refuses."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
