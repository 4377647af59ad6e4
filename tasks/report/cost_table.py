"""The table of scores and costs."""

from __future__ import annotations

from eclectus.tasks.report.costs import Cost, flops
from eclectus.tasks.report.formatting import count, number, percent
from eclectus.tasks.report.tables import Cell, Table
from eclectus.tasks.report.verdict import Comparer

_NOTE = (
    "Bits per byte on the original languages. FLOPs of forward and backward, counted, not timed; the ratio is of "
    "matrix products, below it with attention, the same in all models of a width and depth. Training: of all steps, "
    "the shared dense warm-up included; seconds are of the last stage alone, over all processes. Active parameters: "
    "those that one token passes through."
)


def cost_table(comparer: Comparer) -> Table | None:
    """Score, parameters, FLOPs and seconds of every pre-trained model; None without any."""
    if not any(name in comparer.scores for name in comparer.costs):
        return None
    base = comparer.costs.get(comparer.base.name)
    rows = []
    for name, each in comparer.scores.items():
        if cost := comparer.costs.get(name):
            change = comparer.change(name, group="original")
            score = number(each.bits_per_byte(group="original"))
            rows.append([Cell(name), Cell(score, percent(change.bits) if change else ""), *_cells(cost, base)])
    head = ["model", "bits per byte", "parameters", "active", "FLOPs per step", "times the base's", "training"]
    on_gpu = any(cost.gpu_seconds is not None for cost in comparer.costs.values())
    return Table("Cost beside score", [*head, "GPU seconds" if on_gpu else "CPU seconds"], rows, False, _NOTE)


def _cells(cost: Cost, base: Cost | None) -> list[Cell]:
    relative, with_attention = "", ""
    if base is not None:
        relative, with_attention = f"{cost.relative(base):.2f}", f"{cost.step / base.step:.2f}"
    seconds = cost.cpu_seconds if cost.gpu_seconds is None else cost.gpu_seconds
    return [
        Cell(count(cost.parameters)),
        Cell(count(cost.active)),
        Cell(flops(cost.step)),
        Cell(relative, with_attention),
        Cell(flops(cost.training)),
        Cell(f"{seconds:.1f}"),
    ]
