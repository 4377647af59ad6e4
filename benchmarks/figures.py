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
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "eclectus",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


def read_table(page: str, heading: str, first: str) -> dict[str, dict[str, str]]:
    """Rows by first cell, of the table under a heading whose first column is called `first`. Raises ValueError."""
    section = page.split(f"\n{heading}\n", 1)[-1] if f"\n{heading}\n" in page else ""
    for block in re.findall(r"(?:^\|.*\n)+", re.split(r"\n## ", section)[0], re.MULTILINE):
        lines = []
        for line in block.splitlines():
            lines.append([cell.strip(" *`") for cell in line.split("|")[1:-1]])
        if lines[0][0] == first:
            return {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[2:]}
    raise ValueError(f"docs/benchmarks.md has no table '{first}' under '{heading}'")


def numbers(cell: str) -> list[float]:
    """The numbers of a cell, without the mean and deviation behind a colon."""
    return [float(number) for number in re.findall(NUMBER, cell.split(":")[0])]


def draw_lory(page: str, out: Path) -> None:
    heading = "### On passages, the default"
    models = read_table(page, heading, "model, batches")
    domains = read_table(page, heading, "domain")
    shown = {
        "Lory": "Lory, similar documents",
        "Lory, random": "Lory, random documents",
        "prefix routing": "Lory, prefix routing",
        "the same by threshold (causal)": "Expert Choice by token",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=(1, 1.1))
    for place, (row, label) in enumerate(shown.items()):
        changes = numbers(models[row]["reported half"])
        mean = sum(changes) / len(changes)
        left.barh(place, mean, color=OURS if row == "Lory" else OTHER, height=0.6)
        left.plot(changes, [place] * len(changes), "o", color="black", markeredgecolor="white", markersize=5)
        left.text(0.5, place, label, va="center")
    left.set(xlim=(-30, 24), yticks=[], xlabel="perplexity against the dense twin, % (dots: seeds)")
    left.set_xticks([-30, -20, -10, 0])
    left.spines["left"].set_visible(False)
    left.axvline(0, color="black", linewidth=0.8)
    left.invert_yaxis()
    changes = [numbers(row["change"])[0] for row in domains.values()]
    right.barh(list(domains), changes, color=OURS, height=0.6)
    right.invert_yaxis()
    right.set(xlabel="the same by domain, % (Lory, mean of seeds)")
    save(figure, out)


def draw_moe_lpr(page: str, out: Path) -> None:
    rows = read_table(page, "## MoE-LPR's claims: `python benchmarks/lpr_claims.py`", "bits per byte")
    colours = {"MoE-LPR": OURS, "no review": OTHER, "review without LPR": OTHER, "random new experts": OTHER}
    colours["MoE-LPR in one stage"] = OTHER
    # Labels that would meet another one: (points right, points up, alignment).
    moved = {
        "MoE-LPR": (0, 8, "center"),
        "MoE, all trained": (0, -16, "center"),
        "full fine-tuning": (8, -4, "left"),
        "base": (-8, -4, "right"),
        "LoRA, r = 8": (0, -14, "center"),
        "LLaMA-Pro": (8, 0, "left"),
        "no review": (-8, -10, "right"),
        "MoE-LPR in one stage": (-8, -2, "right"),
        "review without LPR": (8, -8, "left"),
    }
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    for name, row in rows.items():
        x, y = numbers(row["vs full"].strip("*"))[0], numbers(row["retention"].strip("*"))[0]
        axes.plot(x, y, "o", color=colours.get(name, BASELINE), markersize=9 if name == "MoE-LPR" else 6)
        right, up, alignment = moved.get(name, (8, -4, "left"))
        axes.annotate(name, (x, y), (right, up), textcoords="offset points", ha=alignment, va="baseline")
    axes.axhline(99, color="black", linewidth=0.6, linestyle=":")
    axes.axvline(3, color="black", linewidth=0.6, linestyle=":")
    axes.set(
        xlim=(-4.5, 10.5), ylim=(55, 103),
        xlabel="bits per byte in the new languages against full fine-tuning, % (left is better)",
        ylabel="English kept, %",
    )  # fmt: skip
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
