"""The lineage graph as inline SVG, from the sources at the top to the models at the bottom.

A layered drawing (Sugiyama): edges implied by others are left out (transitive reduction); layers by longest path from
the sources; an edge over several layers gets a slot in each, so that it passes between the boxes; within a layer, nodes
are ordered by the mean position of their neighbours (the barycentre heuristic), in a few sweeps down and up. Enough for
the dozens of artifacts of a run.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field

from markupsafe import Markup

from eclectus.storage.lineage.history import Made

WIDTH, HEIGHT, GAP_X, GAP_Y = 172, 46, 18, 36
LINE_WIDTH = 10
CHARACTERS = 24
SWEEPS = 6

Node = str | tuple[str, str, int]


@dataclass
class Drawing:
    """layers: digests of boxes, and (source, target, layer) where an edge passes. paths: each edge's nodes in order."""

    layers: list[list[Node]]
    paths: list[list[Node]] = field(default_factory=list)


def draw_lineage(made: dict[str, Made], models: dict[str, str]) -> Markup:
    """An SVG of these artifacts, in the order of creation. models: names by digest. Empty without artifacts."""
    if not made:
        return Markup("")
    drawing = _lay_out({digest: _direct(digest, made) for digest in made})
    widths = [sum(map(_width, layer)) + len(layer) * GAP_X for layer in drawing.layers]
    total_x, total_y = max(widths) + GAP_X, len(drawing.layers) * (HEIGHT + GAP_Y) - GAP_Y + 12
    left: dict[Node, tuple[float, float]] = {}
    for row, (layer, wide) in enumerate(zip(drawing.layers, widths, strict=True)):
        x = (total_x - wide + GAP_X) / 2
        for node in layer:
            left[node] = (x, 6 + row * (HEIGHT + GAP_Y))
            x += _width(node) + GAP_X
    lines = Markup("").join(_edge(path, left) for path in drawing.paths)
    boxes = Markup("").join(_box(each, *left[digest], models.get(digest)) for digest, each in made.items())
    return Markup(
        '<svg class="lineage" role="img" aria-label="Lineage of the models" width="{x:.0f}" height="{y:.0f}" '
        'viewBox="0 0 {x:.0f} {y:.0f}"><g class="lines">{lines}</g><g class="boxes">{boxes}</g></svg>'
    ).format(x=total_x, y=total_y, lines=lines, boxes=boxes)


def _direct(digest: str, made: dict[str, Made]) -> list[str]:
    """Its inputs without those that are upstream of another input."""
    sources = [source for source in dict.fromkeys(made[digest].inputs.values()) if source in made]
    upstream = set[str]().union(*(_all_sources(source, made) for source in sources))
    return [source for source in sources if source not in upstream]


def _all_sources(digest: str, made: dict[str, Made]) -> set[str]:
    found: set[str] = set()
    waiting = [digest]
    while waiting:
        for source in made[waiting.pop()].inputs.values():
            if source in made and source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _lay_out(sources: dict[str, list[str]]) -> Drawing:
    depth: dict[str, int] = {}
    for digest, direct in sources.items():
        depth[digest] = 1 + max((depth[source] for source in direct), default=-1)
    drawing = Drawing([[] for _ in range(1 + max(depth.values()))])
    for digest, level in depth.items():
        drawing.layers[level].append(digest)
    for digest, direct in sources.items():
        for source in direct:
            passes = [(source, digest, level) for level in range(depth[source] + 1, depth[digest])]
            for level, node in enumerate(passes, depth[source] + 1):
                drawing.layers[level].append(node)
            drawing.paths.append([source, *passes, digest])
    _order(drawing)
    return drawing


def _order(drawing: Drawing) -> None:
    above: dict[Node, list[Node]] = {}
    below: dict[Node, list[Node]] = {}
    for path in drawing.paths:
        for upper, lower in itertools.pairwise(path):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    for sweep in range(SWEEPS):
        near, layers = (above, drawing.layers) if sweep % 2 == 0 else (below, drawing.layers[::-1])
        position: dict[Node, float] = {}
        for layer in layers:
            wanted = {node: (number + 0.5) / len(layer) for number, node in enumerate(layer)}
            for node in layer:
                if near.get(node):
                    wanted[node] = statistics.fmean(position[other] for other in near[node])
            layer.sort(key=wanted.__getitem__)
            position |= {node: (number + 0.5) / len(layer) for number, node in enumerate(layer)}


def _width(node: Node) -> int:
    return WIDTH if isinstance(node, str) else LINE_WIDTH


def _edge(path: list[Node], left: dict[Node, tuple[float, float]]) -> Markup:
    """A curve from below the first node to above the last, straight down past the boxes of the layers between."""
    centre = {node: left[node][0] + _width(node) / 2 for node in path}
    line = f"M{centre[path[0]]:.0f} {left[path[0]][1] + HEIGHT:.0f}"
    for upper, lower in itertools.pairwise(path):
        y1, y2 = left[upper][1] + HEIGHT, left[lower][1]
        bend = (y1 + y2) / 2
        line += f"C{centre[upper]:.0f} {bend:.0f} {centre[lower]:.0f} {bend:.0f} {centre[lower]:.0f} {y2:.0f}"
        line += f"V{y2 + HEIGHT:.0f}" if lower != path[-1] else ""
    return Markup('<path d="{}"/>').format(line)


def _box(made: Made, x: float, y: float, model: str | None) -> Markup:
    label = model or made.label
    return Markup(
        '<g class="{kind}" transform="translate({x:.0f} {y:.0f})"><title>{title}</title>'
        '<rect width="{w}" height="{h}" rx="8"/>'
        '<text x="10" y="19">{label}</text><text x="10" y="36" class="name">{name}</text></g>'
    ).format(
        kind=f"{made.kind}{' model' if model else ''}",
        x=x,
        y=y,
        w=WIDTH,
        h=HEIGHT,
        title=f"{made.label}: {made.name}",
        label=label if len(label) <= CHARACTERS else f"{label[: CHARACTERS - 1]}…",
        name=made.name,
    )
