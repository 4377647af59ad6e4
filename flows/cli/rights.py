"""The commands `forget` and `prove`: training again without documents, and proofs of what a model was trained on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.flows.cli.lineage import RUN_HELP
from eclectus.flows.cli.rows import print_rows
from eclectus.storage.commands import command, quoted
from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.storage.home import Home
    from eclectus.tasks.plan import Plan
    from eclectus.tasks.rights.exposure import Exposure

BY = ("source", "language", "domain")


def add_rights_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands. add: the function in `eclectus.flows.cli.main`."""
    forget = add("forget", _forget, "show which models saw documents; with --yes, train again without them")
    forget.add_argument("documents", nargs="*", metavar="DOCUMENT", help="id, at least 8 digits of it, or its own name")
    for name in BY:
        forget.add_argument(f"--{name}", help=f"every packed document of this {name}")
    forget.add_argument("--run", help=f"the job to do again without them; {RUN_HELP} (default: the last that saw them)")
    forget.add_argument("--reason", default="", help="why, for the lineage")
    forget.add_argument("--by", help="who asked for it (default: the user's name)")
    forget.add_argument("--yes", action="store_true", help="put them on the home's list, and do the job again")
    forget.add_argument("--json", action="store_true", help="one JSON object per training instead of a table")
    prove = add(
        "prove",
        _prove,
        "prove that a text is, or is not, among the documents that a checkpoint was trained on",
        file="text of the document; or its id",
        checkpoint="artifact: KIND-DIGITS as in `artifacts`, a digest or the start of one, or a tag",
    )
    prove.add_argument("-o", "--out", help="file for the proof (default: printed)")


def _forget(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.champions import user_name
    from eclectus.tasks.rights.exposure import exposures, find_documents
    from eclectus.tasks.rights.forgotten import remember_forgotten

    columns = {name: value for name in BY if (value := getattr(chosen, name))}
    if not chosen.documents and not columns:
        raise EclectusError("forget needs documents, or one of --source, --language and --domain")
    home = Home.existing(reading=not chosen.yes)
    documents = find_documents(home, chosen.documents, columns)
    seen = exposures(home, documents)
    _print_exposures(home, documents, seen, chosen.json)
    if not seen and not chosen.yes:
        return
    run, flow, parameters = _job(home, chosen.run, seen) if seen else ("", "", None)
    if not chosen.yes:
        _print_price(home, documents, run, flow, parameters)
        return
    remember_forgotten(home, documents, chosen.reason, (chosen.by or user_name()).strip())
    print(f"{len(documents)} documents are on the list of {home.shown}: no later run trains on them")
    if seen:
        _train_again(home, run, flow, parameters)


def _print_exposures(home: Home, documents: list[str], seen: list[Exposure], as_json: bool) -> None:
    from eclectus.storage.lineage.champions import PROMOTED, decisions

    champions = {each.line: each.checkpoint for each in decisions(home, writes=False) if each.verdict == PROMOTED}
    lines = {checkpoint: line for line, checkpoint in champions.items()}
    affected = {each.checkpoint for each in seen}
    rows = [
        [
            f"checkpoint-{each.checkpoint[:12]}", each.label, each.run, each.documents, each.step, each.steps,
            f"checkpoint-{each.before[:12]}" if each.before and each.before not in affected else None,
            lines.get(each.checkpoint),
        ]
        for each in seen
    ]  # fmt: skip
    names = ["checkpoint", "label", "run", "documents", "first_step", "steps", "last_before", "champion_of"]
    if rows or as_json:
        print_rows(names, rows, as_json)
    if not as_json:
        print(f"{len(documents)} documents; {len(seen)} trainings of this home read them")


def _job(home: Home, name: str | None, seen: list[Exposure]) -> tuple[str, str, Any]:
    """(run, flow, parameters) of the job to do again."""
    from eclectus.flows.parameters import PARAMETERS
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_run

    with connect(home) as connection:
        run = find_run(connection, name) if name else seen[-1].run
        ((flow, written),) = connection.execute("select flow, parameters from runs where run = ?", [run]).fetchall()
    if flow not in PARAMETERS:
        raise EclectusError(f"run {run} is of flow '{flow}', which cannot be done again from here; name one with --run")
    return run, flow, PARAMETERS[flow].read(json.loads(written), f"run {run}")


def _plan(home: Home, flow: str, parameters: Any) -> Plan:
    from eclectus.flows.flow import flow_named
    from eclectus.tasks.plan import plan_flow

    parameters.check_together()
    return plan_flow(home, flow, lambda: flow_named(flow).whole(parameters))


def _print_price(home: Home, documents: list[str], run: str, flow: str, parameters: Any) -> None:
    from eclectus.storage.lineage.costs import last_costs

    kept = {"pack_left_out": sorted({*parameters.pack_left_out, *documents})}
    plan = _plan(home, flow, parameters.model_copy(update=kept))
    costs = last_costs(home, [(each.name, each.label, each.settings) for each in plan.to_run])
    seconds = sum(cost.seconds for cost in costs if cost)
    print(f"to do run {run} ({flow}) again without them:")
    for each in plan.steps:
        if each.action == "run":
            print(f"  + {each.label}")
    print(
        f"{len(plan.to_run)} of {len(plan.steps)} steps; those that ran before took {seconds:.1f} s; what held them "
        "besides instances (tokenizer, embeddings, order of documents) stays as it is"
    )
    print("do it with the same words and --yes")


def _train_again(home: Home, run: str, flow: str, parameters: Any) -> None:
    from eclectus.flows.cli.summary import summarize
    from eclectus.flows.cli.terminal import Terminal
    from eclectus.flows.flow import flow_named, run_flow
    from eclectus.flows.run import served_run

    parameters.check_together()
    with Terminal() as terminal:
        terminal.print(f"{flow} as in run {run}, without them")
        with served_run(flow, parameters, home, [terminal]) as active:
            result = run_flow(active, flow_named(flow), parameters)
        summarize(active, result, terminal)


def _prove(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.rights.proofs import prove

    home = Home.existing()
    proof = prove(home, home.store.find(chosen.checkpoint), chosen.file)
    text = json.dumps(proof, indent=1)
    if not chosen.out:
        print(text)
        return
    Path(chosen.out).write_text(text + "\n")
    word = "is" if proof["member"] else "is not"
    print(f"document {proof['document']} {word} among the {proof['leaves']} documents of {proof['checkpoint'][:23]}")
    print(f"root {proof['root']}; proof in {quoted(chosen.out)}; check it with verify_proof.py (docs/usage.md)")
    print(f"the root of any checkpoint: {command('prove', 'FILE', 'CHECKPOINT')}")
