"""What users decide about artifacts and documents: `adopt` and `unadopt`, `tag` and `untag`, `forget` and `prove`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.flows.cli.lineage import RUN_HELP
from eclectus.flows.cli.options import add_flows, add_models, read_parameters
from eclectus.flows.cli.rows import print_rows
from eclectus.storage.commands import command, quoted
from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.storage.home import Home
    from eclectus.tasks.plan import Plan
    from eclectus.tasks.rights.exposure import Exposure

ARTIFACT = "artifact: KIND-DIGITS as in `artifacts`, a digest or the start of one, or a tag"
BY = ("source", "language", "domain")


def add_adopt_command(commands: Any, flows: dict[str, tuple[str, str]], chosen: str | None, show_all: bool) -> None:
    """Adds `adopt`. flows: by command, name and help. chosen: the one whose settings become options."""
    what = "accept an artifact as a step's result: made by older code, by hand or elsewhere"
    part = commands.add_parser("adopt", what, f"{what[0].upper()}{what[1:]}. The step is then reused, not run.")
    for each in add_flows(part, flows, chosen, show_all, required=True):
        each.add_argument("--step", required=True, help="the step's label, as `plan` shows it")
        each.add_argument("--artifact", required=True, help=f"{ARTIFACT}; or a checkpoint's folder, which is copied")
        each.add_argument("--reason", required=True, help="why it is as good; `why` and `lineage` show it")
        each.add_argument("--by", help="who accepts it (default: the user's name)")
        each.set_defaults(act=_adopt)
        add_models(each, each.get_default("flow"))


def add_name_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the other commands. add: the function in `eclectus.flows.cli.main`."""
    unadopt = add(
        "unadopt", _unadopt, "take an adoption back: the step runs again when it is needed", artifact=ARTIFACT
    )
    unadopt.add_argument("--step", help="only as this step, by its label (default: as any)")
    unadopt.add_argument("--by", help="who takes it back (default: the user's name)")
    tag = add(
        "tag",
        _tag,
        "name an artifact, such as greek@2: accepted wherever an artifact is, and kept from gc",
        artifact=ARTIFACT,
        tag="NAME@VERSION, or NAME for the next version; NAME@latest then means the highest",
    )
    tag.add_argument("--reason", default="", help="why, for `tags`")
    tag.add_argument("--by", help="who names it (default: the user's name)")
    untag = add("untag", _untag, "remove a tag; the artifact stays", tag="NAME@VERSION")
    untag.add_argument("--by", help="who removes it (default: the user's name)")


def _adopt(chosen: argparse.Namespace) -> None:
    parameters = read_parameters(chosen)
    parameters.check_together()
    from eclectus.flows.flow import flow_named
    from eclectus.storage.home import Home
    from eclectus.tasks.adoption import adopt
    from eclectus.tasks.plan import plan_flow

    home = Home.existing(reading=False)
    plan = plan_flow(home, chosen.flow, lambda: flow_named(chosen.flow).whole(parameters))
    adoption = adopt(home, plan, chosen.step, chosen.artifact, chosen.reason, chosen.by)
    kind, _, digest = adoption.artifact.partition("-")
    print(f"{kind}-{digest[:12]} is now the result of step '{adoption.label}', {adoption.words}")
    print(f"take it back with: {command('unadopt', f'{kind}-{digest[:12]}')}")


def _unadopt(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.adoption import unadopt

    for each in unadopt(Home.existing(reading=False), chosen.artifact, chosen.step, chosen.by):
        print(f"step '{each.label}' runs again when it is needed; it was {each.words}")


def _tag(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.adoption import tag

    name, artifact = tag(Home.existing(reading=False), chosen.artifact, chosen.tag, chosen.reason, chosen.by)
    print(f"{name} is {artifact.name}")


def _untag(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.adoption import untag

    print(f"{chosen.tag} no longer names {untag(Home.existing(reading=False), chosen.tag, chosen.by)}")


def add_rights_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands. add: the function in `eclectus.flows.cli.main`."""
    forget = add("forget", _forget, "show which models saw documents; with --yes, train again without them")
    forget.add_argument("documents", nargs="*", metavar="DOCUMENT", help="id, at least 8 digits of it, or its own name")
    for name in BY:
        forget.add_argument(f"--{name}", help=f"every packed document of this {name}")
    forget.add_argument(
        "--licence", help="every document whose record has this licence; the sources of the job are read again"
    )
    forget.add_argument("--licence-field", default="license", help="the field of licences (default: license)")
    forget.add_argument("--run", help=f"the job to do again without them; {RUN_HELP} (default: the last that saw them)")
    forget.add_argument("--reason", default="", help="why, for the lineage")
    forget.add_argument("--by", help="who asked for it (default: the user's name)")
    forget.add_argument("--yes", action="store_true", help="put them on the home's list, and do the job again")
    forget.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per training, then one of the price: what would run again, and the seconds it took",
    )
    prove = add(
        "prove",
        _prove,
        "prove that a text is, or is not, among the documents that a checkpoint was trained on",
        file="text of the document; or its id",
        checkpoint=ARTIFACT,
    )
    prove.add_argument("-o", "--out", help="file for the proof (default: printed)")


def _forget(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.champions import user_name
    from eclectus.tasks.rights.exposure import exposures, find_documents
    from eclectus.tasks.rights.forgotten import remember_forgotten

    columns = {name: value for name in BY if (value := getattr(chosen, name))}
    if not chosen.documents and not columns and chosen.licence is None:
        raise EclectusError("forget needs documents, or one of --source, --language, --domain and --licence")
    home = Home.existing(reading=not chosen.yes)
    if chosen.licence is None:
        documents = find_documents(home, chosen.documents, columns)
    else:
        licensed = _with_licence(home, chosen.run, chosen.licence_field, chosen.licence)
        if columns:
            licensed &= set(find_documents(home, [], columns))
        documents = sorted(licensed | set(find_documents(home, chosen.documents, {})))
    seen = exposures(home, documents)
    _print_exposures(home, documents, seen, chosen.json)
    if not seen and not chosen.yes:
        return
    run, flow, parameters = _job(home, chosen.run, seen) if seen else ("", "", None)
    if not chosen.yes:
        _print_price(home, documents, run, flow, parameters, chosen.json)
        return
    remember_forgotten(home, documents, chosen.reason, (chosen.by or user_name()).strip())
    print(f"documents put on the list of {home.shown}: {len(documents)}; no later run trains on them")
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
        print(f"documents: {len(documents)}; trainings of this home that read them: {len(seen)}")


def _with_licence(home: Home, name: str | None, field: str, licence: str) -> set[str]:
    """The ids of documents with a licence, among the sources of a run; without its name, of the last that had any."""
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_run
    from eclectus.tasks.documents.intake.settings import IngestSettings
    from eclectus.tasks.rights.fields import documents_with_field

    with connect(home) as connection:
        if name:
            runs = [find_run(connection, name)]
        else:
            query = "select run, parameters from runs where parameters is not null order by started desc"
            runs = [run for run, written in connection.execute(query).fetchall() if json.loads(written).get("sources")]
    parameters: Any = _parameters_of(home, runs[0])[1] if runs else None
    if not getattr(parameters, "sources", None):
        raise EclectusError(
            f"{f'run {name}' if name else 'every run of this home'} has no sources, of which a licence could be read"
        )
    return documents_with_field(IngestSettings.of(parameters), field, licence)


def _job(home: Home, name: str | None, seen: list[Exposure]) -> tuple[str, str, Any]:
    """(run, flow, parameters) of the job to do again."""
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_run

    with connect(home) as connection:
        run = find_run(connection, name) if name else seen[-1].run
    flow, parameters = _parameters_of(home, run)
    if parameters is None:
        raise EclectusError(f"run {run} is of flow '{flow}', which cannot be done again from here; name one with --run")
    return run, flow, parameters


def _parameters_of(home: Home, run: str) -> tuple[str, Any]:
    """(flow of a run, its parameters; None if it is no flow of ours)."""
    from eclectus.flows.parameters import PARAMETERS
    from eclectus.storage.lineage.connection import connect

    with connect(home) as connection:
        ((flow, written),) = connection.execute("select flow, parameters from runs where run = ?", [run]).fetchall()
    return flow, PARAMETERS[flow].read(json.loads(written), f"run {run}") if flow in PARAMETERS else None


def _plan(home: Home, flow: str, parameters: Any) -> Plan:
    from eclectus.flows.flow import flow_named
    from eclectus.tasks.plan import plan_flow

    parameters.check_together()
    return plan_flow(home, flow, lambda: flow_named(flow).whole(parameters))


def _print_price(home: Home, documents: list[str], run: str, flow: str, parameters: Any, as_json: bool) -> None:
    from eclectus.storage.lineage.costs import last_costs

    kept = {"pack_left_out": sorted({*parameters.pack_left_out, *documents})}
    plan = _plan(home, flow, parameters.model_copy(update=kept))
    costs = last_costs(home, [(each.name, each.label, each.settings) for each in plan.to_run])
    seconds = sum(cost.seconds for cost in costs if cost)
    if as_json:
        labels = [each.label for each in plan.to_run]
        print(json.dumps({"again": run, "flow": flow, "run_steps": labels, "steps": len(plan.steps), "took": seconds}))
        return
    print(f"to do run {run} ({flow}) again without them:")
    for each in plan.to_run:
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
    if not proof["member"] and Path(chosen.file).exists():
        print(
            f"no document is exactly the text of {chosen.file}, read as one document; one that differs by a character "
            "is another",
            file=sys.stderr,
        )
    text = json.dumps(proof, indent=1)
    if not chosen.out:
        print(text)
        return
    Path(chosen.out).write_text(text + "\n")
    word = "is" if proof["member"] else "is not"
    print(f"document {proof['document']} {word} among the {proof['leaves']} documents of {proof['checkpoint'][:23]}")
    print(f"root {proof['root']}; proof in {quoted(chosen.out)}; check it with verify_proof.py (docs/usage.md)")
    print(f"the root of any checkpoint: {command('prove', 'FILE', 'CHECKPOINT')}")
