"""The commands `promote`, `rollback`, `champions` and `compare`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from eclectus.flows.cli.lineage import RUN_HELP
from eclectus.flows.cli.rows import print_rows


def add_promotion_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands. add: the function in `eclectus.flows.cli.main`."""
    promote = add(
        "promote",
        _promote,
        "make a checkpoint champion if it passes the gate",
        checkpoint="artifact name or folder",
    )
    gate = "configs/gate.yaml"
    promote.add_argument("--gate", default=gate, help=f"YAML file with the rules (default: {gate})")
    promote.add_argument("--line", help="line of champions (default: the line of the model's name in its evaluation)")
    promote.add_argument("--force", metavar="REASON", help="promote even if the gate refuses; the reason is recorded")

    def show_champions(chosen: argparse.Namespace) -> None:
        from eclectus.flows.cli.champions import champion_rows

        print_rows(*champion_rows(chosen.all), chosen.json)

    def show_comparison(chosen: argparse.Namespace) -> None:
        from eclectus.flows.cli.compare import compare
        from eclectus.storage.commands import quoted

        page = Path(chosen.out) if chosen.out else None
        for names, rows in compare(chosen.runs, chosen.measure, page):
            if rows:
                print_rows(names, rows, chosen.json)
        if page and not chosen.json:
            print(f"\ncurves: {quoted(page)}")

    compare = add(
        "compare", show_comparison, "compare runs: differing settings, measures with their spread, curves (-o)"
    )
    compare.add_argument("runs", nargs="+", help=RUN_HELP)
    compare.add_argument("--measure", default="", metavar="WORDS", help="only measures whose name holds these words")
    compare.add_argument("-o", "--out", help="also write a page (HTML) with the curves")
    compare.add_argument("--json", action="store_true", help="one JSON object per row instead of tables")
    rollback = add("rollback", _rollback, "make the previous champion champion again")
    rollback.add_argument("--line", help="line of champions (default: the only one that has a champion)")
    champions = add("champions", show_champions, "list promoted and refused checkpoints by line, with the reasons")
    champions.add_argument(
        "--all", action="store_true", help="every decision, not only the last for each line, checkpoint and verdict"
    )
    champions.add_argument("--json", action="store_true", help="one JSON object per row instead of a table")


def _promote(chosen: argparse.Namespace) -> None:
    from eclectus.flows.cli.champions import promote

    decision = promote(chosen.checkpoint, chosen.gate, chosen.line, chosen.force)
    for rule in decision.rules:
        print(f"{'holds' if rule['passed'] else 'FAILS'}  {rule['rule']}: {rule['reason']}")
    print(f"checkpoint-{decision.checkpoint[:12]} is {decision.verdict} in line '{decision.line}': {decision.reason}")


def _rollback(chosen: argparse.Namespace) -> None:
    from eclectus.flows.cli.champions import rollback

    decision = rollback(chosen.line)
    print(f"checkpoint-{decision.checkpoint[:12]} is champion of line '{decision.line}' again: {decision.reason}")
