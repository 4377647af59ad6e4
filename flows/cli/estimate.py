"""`eclectus estimate FLOW`: what the trainings of a flow will take, without running any; `--history`: what came true.

Options and errors are those of the flow's own command. Nothing is written into the home. Exit code 3: a training does
not fit in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from eclectus.flows.cli.options import add_flows, read_parameters
from eclectus.flows.cli.rows import print_rows
from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.tasks.forecast.estimate import Estimate

FLOWS = ("run", "pretrain", "extend")
DOES_NOT_FIT = 3
UNREAD = ["dataset:not/read"]
LATEST = 20
_HISTORY = """
    select run, label, strftime(made, '%Y-%m-%d %H:%M') as made, round(seconds, 1) as seconds,
           round(actual_seconds, 1) as actual_seconds, seconds_error, round(memory / 1e6) as memory_mb,
           round(actual_memory / 1e6) as actual_memory_mb, memory_error, steps, actual_steps
    from forecasts order by forecasts.made desc limit ?"""


def add_estimate_command(commands: Any, flows: dict[str, tuple[str, str]], chosen: str | None, show_all: bool) -> None:
    """Adds `estimate`. flows: by command, name and help. chosen: the one whose settings become options."""
    what = "forecast seconds, memory, disk and FLOPs of a flow's trainings, here or on GPUs (exit code 3: no fit)"
    part = commands.add_parser("estimate", what, f"{what[0].upper()}{what[1:]}.")
    part.add_argument("--history", action="store_true", help="show forecasts of earlier runs and what came true")
    part.add_argument("--limit", type=int, default=LATEST, help=f"of --history, how many (default: {LATEST})")
    part.add_argument("--json", action="store_true", help="one JSON object per training instead of a table")
    part.set_defaults(act=_history)
    trained = {command: flows[command] for command in FLOWS}
    for each in add_flows(part, trained, chosen, show_all):
        each.add_argument("--json", action="store_true", help="one JSON object per training instead of a table")
        each.add_argument(
            "--gpus", type=int, metavar="N", help="forecast for N GPUs of --gpu-type, one training worker on each"
        )
        each.add_argument("--gpu-type", metavar="TYPE", help="such as h100; another one lists all that are known")
        each.set_defaults(act=_estimate)


def _history(chosen: argparse.Namespace) -> None:
    if not chosen.history:
        raise EclectusError(f"estimate needs a flow ({', '.join(FLOWS)}), or --history")
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.connection import connect

    with connect(Home.existing(), writes=False) as connection:
        answer = connection.execute(_HISTORY, [chosen.limit])
        names, rows = [column[0] for column in answer.description], answer.fetchall()
    print_rows(names, rows, chosen.json)


def _estimate(chosen: argparse.Namespace) -> None:
    parameters: Any = read_parameters(chosen)
    # No document is read: they may be elsewhere, or not yet there.
    parameters = parameters.model_copy(update={"sources": UNREAD})
    on_gpus = chosen.gpus is not None or chosen.gpu_type is not None
    if on_gpus:
        parameters = _on_gpus(parameters, chosen)
    parameters.check_together()
    from eclectus.flows.flow import flow_named
    from eclectus.storage.home import Home
    from eclectus.tasks.forecast.estimate import estimate_here, estimate_on
    from eclectus.tasks.forecast.shapes import Shapes
    from eclectus.tasks.forecast.trainings import calls_of

    home = Home.found(reading=True)
    calls = calls_of(home, chosen.flow, lambda: flow_named(chosen.flow).whole(parameters))
    languages = [*parameters.original_languages, *parameters.expanded_languages]
    sizes = parameters.tokenizer_vocabulary, parameters.extension_vocabulary, parameters.instance_tokens
    jobs = Shapes(calls, languages, *sizes).jobs(on_gpus)
    if not jobs:
        raise EclectusError(f"flow '{chosen.flow}' trains nothing with these settings")

    def show(label: str) -> None:
        if sys.stderr.isatty():
            print(f"{label} ...", file=sys.stderr)

    found = estimate_on(jobs, chosen.gpu_type, show) if on_gpus else estimate_here(jobs, _threads(parameters), show)
    _print(found, chosen.json)
    if any(each.fault for each in found):
        raise SystemExit(DOES_NOT_FIT)


def _on_gpus(parameters: Any, chosen: argparse.Namespace) -> Any:
    """The parameters of training on GPUs. Raises EclectusError for a type or a number that cannot be."""
    from eclectus.models.forecast.gpus import GPUS, gpu_named

    if chosen.gpu_type is None:
        raise EclectusError(f"--gpus {chosen.gpus} needs --gpu-type; the types are {', '.join(GPUS)}")
    try:
        gpu_named(chosen.gpu_type)
    except ValueError as error:
        raise EclectusError(f"--gpu-type: {error}") from error
    count = 1 if chosen.gpus is None else chosen.gpus
    if count < 1:
        raise EclectusError(f"--gpus is {count}: choose 1 or more")
    return parameters.model_copy(update={"training_workers": count, "training_gpus": True})


def _threads(parameters: Any) -> int | None:
    """Threads of a worker: Ray gives each as many as it has CPUs; in one process PyTorch decides."""
    return max(1, int(parameters.worker_cpus)) if parameters.training_workers else None


def _print(found: list[Estimate], as_json: bool) -> None:
    from eclectus.models.forecast.fit import gigabytes
    from eclectus.models.forecast.forecast import duration
    from eclectus.tasks.forecast.estimate import row_of
    from eclectus.tasks.run import describe

    if as_json:
        for each in found:
            print(json.dumps(row_of(each)))
        return
    names = ["training", "time", "a step", "steps", "tokens", "FLOPs", "parameters", "trained", "disk"]
    held = ["memory", "program", "weights", "gradients", "moments", "activations", "gathered", "holes"]
    rows = []
    for each in found:
        ahead, memory = each.forecast, each.forecast.memory
        time = "" if ahead.seconds is None else duration(ahead.seconds)
        step = "" if ahead.step is None else duration(ahead.step)
        numbers = [describe(ahead.tokens), f"{ahead.flops:.2e}", describe(ahead.parameters), describe(ahead.trained)]
        bytes_held = [
            memory.total, memory.program, memory.parameters, memory.gradients, memory.moments, memory.activations,
            memory.gathered, memory.holes,
        ]  # fmt: skip
        shown = [gigabytes(count) if count else "" for count in bytes_held]
        rows.append([each.label, time, step, ahead.steps, *numbers, gigabytes(ahead.disk), *shown])
    print_rows([*names, *held], rows, False)
    total = sum(each.forecast.seconds or 0.0 for each in found)
    unknown = sum(each.forecast.seconds is None for each in found)
    hosts = max(each.forecast.host for each in found)
    print()
    print(
        f"all trainings: {duration(total)}{f' and {unknown} of unknown time' if unknown else ''}, "
        f"{found[0].forecast.workers} workers; memory is that of each"
        + (f", on its GPU; on the host {gigabytes(hosts)} each" if hosts else "")
    )
    for each in found:
        if each.fault:
            print(f"{each.label}: {each.fault}")
