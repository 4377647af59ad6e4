"""Draws the two figures of docs/results.md from the tables of docs/benchmarks.md, the only copy of the numbers.

python benchmarks/figures.py [FOLDER]          writes lory.svg and moe-lpr.svg (default: docs/figures); takes 2 seconds
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
NUMBER = r"[+-]?\d*\.?\d+"
OURS, OTHER, BASELINE = "#1f5fa8", "#9aa5b1", "#c0504d"
# Labels that would meet others: (which point, points right, points up).
LABELS = {
    "MoE-LPR": (0, -18, 9),
    "MoE-LPR in one stage": (2, 8, -3),
    "review without LPR": (0, 5, 9),
    "no review": (0, -2, -13),
    "full fine-tuning with replay": (3, -30, -14),
    "LLaMA-Pro": (2, 7, -3),
    "LoRA": (2, -4, -14),
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "eclectus",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


def read_rows(page: str, heading: str, first: str) -> list[dict[str, str]]:
    """Rows of the table under a heading whose first column is called `first`. Raises ValueError if there is none."""
    section = page.split(f"\n{heading}\n", 1)[-1] if f"\n{heading}\n" in page else ""
    for block in re.findall(r"(?:^\|.*\n)+", re.split(r"\n## ", section)[0], re.MULTILINE):
        lines = []
        for line in block.splitlines():
            lines.append([cell.strip(" *`") for cell in line.split("|")[1:-1]])
        if lines[0][0] == first:
            return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]
    raise ValueError(f"docs/benchmarks.md has no table '{first}' under '{heading}'")


def read_table(page: str, heading: str, first: str) -> dict[str, dict[str, str]]:
    """The same, by first cell."""
    return {row[first]: row for row in read_rows(page, heading, first)}


def numbers(cell: str) -> list[float]:
    """The numbers of a cell."""
    return [float(number) for number in re.findall(NUMBER, cell)]


def interval(cell: str) -> tuple[float, float, float]:
    """Mean and ends of a cell such as "-9.7% (-15.2 to -4.0)"."""
    mean, low, high = numbers(cell)
    return mean, low, high


def draw_lory(page: str, out: Path) -> None:
    heading = "## Lory's claims on works, with controls: `python benchmarks/lory_claims.py`"
    models, domains = read_table(page, heading, "model"), read_table(page, heading, "domain")
    shown = {name: row for name, row in models.items() if row["against the twin"].strip()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), width_ratios=(1, 1))
    for place, (name, row) in enumerate(shown.items()):
        mean, low, high = interval(row["against the twin"])
        colour = OURS if name.startswith("Lory") else BASELINE if name.startswith("dense") else OTHER
        left.plot([low, high], [place, place], color=colour, linewidth=2)
        left.plot(mean, place, "o", color=colour, markersize=7)
    left.set_yticks(range(len(shown)), shown)
    left.set(xlabel="perplexity against the twin, % (95% intervals)")
    left.axvline(0, color="black", linewidth=0.8)
    left.invert_yaxis()
    right.barh(list(domains), [numbers(row["Lory"])[0] for row in domains.values()], color=OURS, height=0.6)
    right.invert_yaxis()
    right.set(xlabel="by domain: Lory, mean of seeds, %")
    save(figure, out)


def draw_moe_lpr(page: str, out: Path) -> None:
    heading = "## MoE-LPR's claims on works and bases: `python benchmarks/lpr_claims.py`"
    points: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(page, heading, "method"):
        means = [sum(numbers(row[name])) / len(numbers(row[name])) for name in ("gain, %", "kept, %")]
        points.setdefault(row["method"], []).append((means[0], means[1]))
    ours = ("MoE-LPR", "MoE-LPR in one stage")
    ablations = ("no review", "review without LPR", "random new experts")
    figure, axes = plt.subplots(figsize=(7.8, 4.6))
    for name, found in points.items():
        colour = OURS if name in ours else OTHER if name in ablations else None
        x, y = zip(*found, strict=True)
        axes.plot(x, y, "o-", color=colour, linewidth=1, markersize=9 if name == "MoE-LPR" else 5, label=name)
        place, right, up = LABELS.get(name, (len(found) // 2, 7, 4))
        axes.annotate(name, found[place], (right, up), textcoords="offset points", fontsize=8)
    axes.plot(0, 100, "s", color="black", markersize=5)
    axes.annotate("base", (0, 100), (7, -3), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="bits per byte in the new languages below the base's, % (lines: learning rates, in their order)",
        ylabel="English kept, %",
    )
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/figures"
    out.mkdir(parents=True, exist_ok=True)
    page = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    with plt.rc_context(STYLE):
        draw_lory(page, out / "lory.svg")
        draw_moe_lpr(page, out / "moe-lpr.svg")


if __name__ == "__main__":
    main()
