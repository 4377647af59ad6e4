"""`eclectus plan FLOW`: what a flow would do, without doing or writing anything.

Options and errors are those of the flow's own command. Exit code 0: nothing is to be done, 3: there is work.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from eclectus.flows.cli.options import add_flows, add_models, read_parameters

if TYPE_CHECKING:
    from eclectus.storage.lineage.costs import Cost
    from eclectus.tasks.plan import Plan

WORK = 3
# Steps that a line names as those whose artifacts it waits for.
SHOWN = 3


def add_plan_command(commands: Any, flows: dict[str, tuple[str, str]], chosen: str | None, show_all: bool) -> None:
    """Adds `plan`. flows: by command, name and help. chosen: the one whose settings become options."""
    what = "show what a flow would reuse or run, why, and for how long; run nothing (exit code 3: there is work)"
    part = commands.add_parser("plan", what, f"Plans a flow: {what}.")
    for each in add_flows(part, flows, chosen, show_all, required=True):
        each.add_argument("--json", action="store_true", help="one JSON object instead of lines")
        each.set_defaults(act=_plan)
        add_models(each, each.get_default("flow"))


def _plan(chosen: argparse.Namespace) -> None:
    parameters = read_parameters(chosen)
    parameters.check_together()
    from eclectus.flows.flow import flow_named
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.costs import last_costs
    from eclectus.tasks.plan import plan_flow

    home = Home.found(reading=True)
    plan = plan_flow(home, chosen.flow, lambda: flow_named(chosen.flow).whole(parameters))
    costs = last_costs(home, [(each.name, each.label, each.settings) for each in plan.to_run])
    print(json.dumps(_as_json(plan, costs), indent=1) if chosen.json else "\n".join(_lines(plan, costs)))
    if plan.to_run:
        raise SystemExit(WORK)


def _lines(plan: Plan, costs: list[Cost | None]) -> list[str]:
    lines, waiting = [], iter(costs)
    for each in plan.steps:
        cost = next(waiting) if each.action == "run" else None
        mark = "+" if each.action == "run" else "="
        took = f"; took {cost.seconds:.1f} s on {cost.ended:%Y-%m-%d}" if cost else ""
        after = f" (after {_listed(each.after)})" if each.action == "run" and each.after else ""
        lines.append(f"{mark} {each.label:<26} {each.action:<6} {each.why}{after}{took}")
    if plan.unknown_after:
        lines.append(f"  what follows depends on the result of step '{plan.unknown_after}'")
    return [*lines, "", _total(plan, costs)]


def _listed(labels: list[str]) -> str:
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    return f"{', '.join(labels[:SHOWN])}{more}"


def _total(plan: Plan, costs: list[Cost | None]) -> str:
    to_run = len(plan.to_run)
    if not to_run:
        return f"nothing to do: {len(plan.steps)} steps reused"
    known = [cost.seconds for cost in costs if cost]
    unknown = f", {to_run - len(known)} of unknown cost" if len(known) < to_run else ""
    about = f"; they took {sum(known):.1f} s last time{unknown}" if known else "; their cost is not known yet"
    return f"{to_run} steps to run, {len(plan.steps) - to_run} reused{about}"


def _as_json(plan: Plan, costs: list[Cost | None]) -> dict[str, Any]:
    steps, waiting = [], iter(costs)
    for each in plan.steps:
        cost = next(waiting) if each.action == "run" else None
        steps.append(
            {
                "step": each.name, "label": each.label, "flow": each.flow, "action": each.action, "why": each.why,
                "after": each.after, "last_seconds": cost.seconds if cost else None,
                "last_ended": cost.ended.isoformat(sep=" ") if cost else None,
            }
        )  # fmt: skip
    known = [cost.seconds for cost in costs if cost]
    return {
        "work": bool(plan.to_run), "to_run": len(plan.to_run), "reused": len(plan.steps) - len(plan.to_run),
        "last_seconds": round(sum(known), 3), "without_cost": len(plan.to_run) - len(known),
        "depends_on": plan.unknown_after or None, "steps": steps,
    }  # fmt: skip
