"""The summary at the end of a run: scores, paths of the outputs, and commands to try next."""

from __future__ import annotations

import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from eclectus.flows.cli.terminal import Terminal
from eclectus.storage.commands import command, quoted
from eclectus.tasks.evaluation.task_scores import scores_by_task
from eclectus.tasks.evaluation.training_names import further_training

if TYPE_CHECKING:
    from eclectus.tasks.run import Run


def summarize(run: Run, result: Any, terminal: Terminal) -> None:
    """Prints the results of a flow. result: what the flow returned (see flows/*.py)."""
    counts = Counter(run.states.values())
    terminal.print("")
    terminal.print(", ".join(f"{number} steps {state}" for state, number in sorted(counts.items())))
    # `retrain` has no evaluation if it did not train.
    result = getattr(result, "evaluated", result)
    if hasattr(result, "evaluations"):
        _scores(result.evaluations, result.repeats, terminal)
        if result.repeats:
            terminal.print("")
            for sentence in result.report.statistics["verdict"]:
                terminal.print(sentence)
        _decisions(result, terminal)
    if hasattr(result, "data_report"):
        _curation(result, terminal)
    if hasattr(result, "similarity"):
        _similarity(result.similarity.statistics, terminal)
    terminal.print("")
    for name, path in _outputs(run, result).items():
        terminal.print(f"  {name:<25} {quoted(path)}")
    terminal.print("")
    terminal.print("Try next:")
    for line in _next_commands(run, "group" if hasattr(result, "grouping") else None):
        terminal.print(f"  {line}")


def _scores(evaluations: dict[str, Any], repeats: dict[str, Any], terminal: Terminal) -> None:
    """Bits per byte on held-out text by language and, for the original languages, by domain.

    repeats: evaluations of further trainings, by name as "lory seed 1"; then numbers are means with their spread.
    """
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in evaluations}
    for name, artifact in (evaluations | repeats).items():
        model, _ = further_training(name) or (name, 0)
        scores[name if name in scores else model].append(artifact.statistics["bits_per_byte"])
    for part in ("language", "domain"):
        rows = list(dict.fromkeys(row for each in scores.values() for row in each[0].get(part, {})))
        table = Table(f"bits per byte by {part}", *scores, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(
                row, *(_over_trainings([each.get(part, {}).get(row) for each in of]) for of in scores.values())
            )
        terminal.print("")
        terminal.console.print(table)
    if repeats:
        terminal.print("mean ± standard deviation over the trainings of a model, where it was trained more than once")


def _over_trainings(values: list[float | None]) -> str:
    """The mean of a model's trainings with their sample standard deviation, if it has several."""
    known = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{spread}" if known else ""


def _curation(curated: Any, terminal: Terminal) -> None:
    """Counts of records by outcome, and the similarity of adjacent documents."""
    terminal.print("")
    for name, count in sorted(curated.data_report.statistics["accounts"].items(), key=lambda account: -account[1]):
        terminal.print(f"  {name:<22} {count:>10,}")
    statistics = curated.grouping.statistics
    similarities = [statistics[f"{which}_similarity"] for which in ("adjacent", "random", "best_neighbor")]
    if None not in similarities:
        terminal.print("")
        terminal.print(
            "similarity of adjacent documents {:.3f}, of random ones {:.3f}, at best {:.3f}".format(*similarities)
        )


def _similarity(found: dict[str, Any], terminal: Terminal) -> None:
    """Similarity and proposed new experts by layer, and the options that use them."""
    table = Table("layer", "similarity", "new experts", box=None, header_style="bold", pad_edge=False)
    for layer, (value, new) in enumerate(zip(found["similarity"], found["new_experts"], strict=True)):
        table.add_row(str(layer), f"{value:.4f}", str(new))
    terminal.print("")
    terminal.console.print(table)
    experts = ",".join(str(new + 1) for new in found["new_experts"])
    terminal.print(
        f"experts per layer: --experts {experts} (upcycle), --extension-experts-per-layer {experts} (extend)"
    )


def _decisions(result: Any, terminal: Terminal) -> None:
    """Task scores, the gate's decisions and models that were not evaluated."""
    if answers := scores_by_task(result.benchmarks, result.imported):
        table = Table("task and metric", *answers, box=None, header_style="bold", pad_edge=False)
        for row in dict.fromkeys(row for each in answers.values() for row in each):
            values = (each.get(row) for each in answers.values())
            table.add_row(row, *("" if value is None else f"{value:.3f}" for value in values))
        terminal.print("")
        terminal.console.print(table)
    for line, decision in result.decisions.items():
        terminal.print(f"gate '{line}': {decision.verdict}: {decision.reason}")
    for each in result.left_out:
        terminal.print(f"not evaluated: {each}")


def _outputs(run: Run, result: Any) -> dict[str, Path]:
    """Paths of the outputs by name. Reports are copied into the home, where their paths stay the same."""
    paths: dict[str, Path] = {}
    if hasattr(result, "report"):
        page = run.home.root / "report.html"
        shutil.copyfile(result.report.file("report.html"), page)
        paths["report"] = page
    data_report = getattr(getattr(result, "curated", result), "data_report", None)
    if data_report is not None:
        paths["data report"] = run.home.root / "data.html"
        shutil.copyfile(data_report.file("data.html"), paths["data report"])
    for name, artifact in (getattr(result, "checkpoints", {}) | getattr(result, "repeated", {})).items():
        paths[f"checkpoint {name}"] = Path(artifact.path)
    for name in ("dense", "lory", "upcycled", "original", "expanded", "review"):
        if (artifact := getattr(result, name, None)) is not None:
            paths[name.replace("_", " ")] = Path(artifact.path)
    paths["lineage database"] = run.home.database
    return paths


def _next_commands(run: Run, step: str | None) -> list[str]:
    """Commands to copy. step: the step whose metrics to show; None for evaluations."""
    numbers = f"steps.label = '{step}'" if step else "metrics.name = 'bits_per_byte'"
    home = run.home.name
    return [
        command("sql", f"select label, state, seconds, reason from steps where run = '{run.id}'", home=home),
        command(
            "sql", f"select metrics.name, label, value from metrics join steps using (step) where {numbers}", home=home
        ),
        command("why", run.id, list(run.states)[-1], home=home) if run.states else command("runs", home=home),
    ]
