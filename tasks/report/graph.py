"""The lineage graph as inline SVG: what was made of what, top to bottom.

Layers by longest path from the sources; within a layer, boxes are ordered by the mean place of what they were made of
(the barycentre heuristic), a few sweeps down and up. Enough for the dozens of artifacts of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup, escape

from tasks.report.history import Made

WIDTH, HEIGHT, GAP_X, GAP_Y = 168, 46, 18, 34
LINE = 24
SWEEPS = 4


@dataclass(frozen=True)
class Box:
    made: Made
    x: float
    y: float


def draw(made: dict[str, Made], marked: dict[str, str]) -> Markup:
    """An SVG of these artifacts. marked: names of the models by digest, drawn to stand out. Empty without artifacts."""
    if not made:
        return Markup("")
    layers = _ordered(_layers(made), made)
    wide = max(len(layer) for layer in layers)
    total_x = wide * (WIDTH + GAP_X) + GAP_X
    total_y = len(layers) * (HEIGHT + GAP_Y) - GAP_Y + 2 * 6
    boxes = {}
    for row, layer in enumerate(layers):
        left = (total_x - len(layer) * (WIDTH + GAP_X) + GAP_X) / 2
        for column, digest in enumerate(layer):
            boxes[digest] = Box(made[digest], left + column * (WIDTH + GAP_X), 6 + row * (HEIGHT + GAP_Y))
    lines = [
        _line(boxes[source], box)
        for box in boxes.values()
        for source in dict.fromkeys(box.made.inputs.values())
        if source in boxes
    ]
    drawn = [_box(box, marked.get(digest)) for digest, box in boxes.items()]
    return Markup(
        '<svg class="lineage" role="img" aria-label="Lineage of the models" width="{x:.0f}" height="{y:.0f}" '
        'viewBox="0 0 {x:.0f} {y:.0f}"><g class="lines">{lines}</g><g class="boxes">{boxes}</g></svg>'
    ).format(x=total_x, y=total_y, lines=Markup("").join(lines), boxes=Markup("").join(drawn))


def _layers(made: dict[str, Made]) -> list[list[str]]:
    """made is in order of making, so every input's depth is known before it is needed."""
    depth: dict[str, int] = {}
    for digest, each in made.items():
        depth[digest] = 1 + max((depth[source] for source in each.inputs.values() if source in depth), default=-1)
    layers: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
    for digest, level in depth.items():
        layers[level].append(digest)
    return layers


def _ordered(layers: list[list[str]], made: dict[str, Made]) -> list[list[str]]:
    above = {digest: set(each.inputs.values()) for digest, each in made.items()}
    below: dict[str, set[str]] = {digest: set() for digest in made}
    for digest, sources in above.items():
        for source in sources & below.keys():
            below[source].add(digest)
    for sweep in range(SWEEPS):
        near, order = (above, layers) if sweep % 2 == 0 else (below, list(reversed(layers)))
        place: dict[str, float] = {}
        for layer in order:
            middle = {digest: _mean([place[other] for other in near[digest] if other in place]) for digest in layer}
            kept = {digest: number for number, digest in enumerate(layer)}
            layer.sort(
                key=lambda digest: (
                    middle[digest] if middle[digest] is not None else kept[digest] / len(kept),
                    kept[digest],
                )
            )
            place |= {digest: (number + 0.5) / len(layer) for number, digest in enumerate(layer)}
    return layers


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _line(source: Box, target: Box) -> Markup:
    x1, y1, x2, y2 = source.x + WIDTH / 2, source.y + HEIGHT, target.x + WIDTH / 2, target.y
    bend = (y2 - y1) / 2
    return Markup('<path d="M{:.0f} {:.0f}C{:.0f} {:.0f} {:.0f} {:.0f} {:.0f} {:.0f}"/>').format(
        x1, y1, x1, y1 + bend, x2, y2 - bend, x2, y2
    )


def _box(box: Box, marked: str | None) -> Markup:
    label = marked or box.made.label
    shown = label if len(label) <= LINE else f"{label[: LINE - 1]}…"
    return Markup(
        '<g class="{kind}" transform="translate({x:.0f} {y:.0f})"><title>{title}</title><rect width="{w}" height="{h}" rx="8"/>'
        '<text x="10" y="19">{label}</text><text x="10" y="36" class="name">{name}</text></g>'
    ).format(
        kind=escape(f"{box.made.kind}{' model' if marked else ''}"),
        x=box.x,
        y=box.y,
        w=WIDTH,
        h=HEIGHT,
        title=f"{box.made.label}: {box.made.name}",
        label=shown,
        name=box.made.name,
    )
