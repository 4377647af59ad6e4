"""What goes to and comes from elsewhere: checkpoints on a model hub, and results of tasks as files of `lm_eval`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from eclectus.storage.errors import EclectusError


def add_hub_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands. add: the function in `eclectus.flows.cli.main`."""
    push = add(
        "push",
        _push,
        "put a checkpoint on a model hub, with its card, digests and lineage; private unless --public",
        checkpoint="checkpoint, as in `artifacts`, or the folder of an export",
        repository="OWNER/NAME on the hub (HF_ENDPOINT, HF_TOKEN)",
    )
    push.add_argument("--public", action="store_true", help="make it visible to everyone")
    push.add_argument("--dry-run", action="store_true", help="list the files and their sizes, and push nothing")
    push.add_argument("--message", help="of the commit (default: the checkpoint's name)")
    add(
        "pull",
        _pull,
        "take a checkpoint from a model hub into the home, with its lineage where the repository has it",
        repository="OWNER/NAME, or OWNER/NAME@REVISION, on the hub",
    )


def add_results_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands. add: the function in `eclectus.flows.cli.main`."""
    export = add(
        "export-results", _export_results, "write results of tasks as `lm_eval --output_path --log_samples` does"
    )
    export.add_argument(
        "evaluations", nargs="+", metavar="EVALUATION", help="evaluation of tasks, or a checkpoint that has some"
    )
    export.add_argument("-o", "--out", required=True, metavar="DIR", help="folder; files go to DIR/MODEL/")
    export.add_argument("--model", help="name of the model in the files (default: that of its checkpoint)")
    made = add(
        "import-results",
        _import_results,
        "take results of `lm_eval` that ran elsewhere as an evaluation of a checkpoint",
        results="results_DATE.json with its samples_TASK_DATE.jsonl, or a folder: the latest in it",
    )
    made.add_argument("--checkpoint", required=True, help="the model that was asked, as in `artifacts`")
    made.add_argument("--model", metavar="NAME", help="the model's name in the file, where it is not the checkpoint's")
    made.add_argument("--by", help="who imports it (default: the user's name)")


def _push(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.hub.push import plan_push, push

    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        plan = plan_push(Home.found(), chosen.checkpoint, chosen.repository, Path(scratch))
        if chosen.dry_run:
            for each in sorted(plan.uploads, key=lambda upload: upload.name):
                print(f"{each.bytes:>16,}  {each.name}")
        for note in plan.notes:
            print(f"  note         {note}")
        total = f"{len(plan.uploads)} files, {plan.bytes / 1e6:,.1f} MB"
        if chosen.dry_run:
            print(f"{total}: nothing was pushed to {chosen.repository}")
            return
        message = chosen.message or f"{Path(chosen.checkpoint).name}, by eclectus push"
        address = push(plan, chosen.public, message, lambda text: print(f"  {text}", flush=True))
    print(f"{total} pushed to {chosen.repository}, {'public' if chosen.public else 'private'}: {address}")


def _pull(chosen: argparse.Namespace) -> None:
    from eclectus.flows.cli.terminal import Terminal
    from eclectus.flows.run import open_run
    from eclectus.storage.home import Home
    from eclectus.tasks.hub.pull import pull, resolve, take_lineage

    home = Home.open()
    settings, there = resolve(chosen.repository, lambda text: print(f"  {text}", flush=True))
    with Terminal() as terminal, open_run("pull", settings, home, [terminal]):
        made = pull(label=f"pull {settings.hub_repository}", settings=settings)
    print(f"  {take_lineage(home, settings, there)}")
    print(f"{made.name}: {chosen.repository} at commit {settings.hub_commit[:12]}, in {home.shown}")


def _export_results(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.tasks.evaluation.lm_eval_files.export import export_results, find_evaluations

    home = Home.found()
    for evaluation in find_evaluations(home, chosen.evaluations):
        done = export_results(home, evaluation, Path(chosen.out), chosen.model)
        print(f"{done.results}: {evaluation.name}, with samples of {len(done.samples)} tasks")
        if done.without_items:
            print(f"  scores only, without samples: {', '.join(done.without_items)}")


def _import_results(chosen: argparse.Namespace) -> None:
    from eclectus.flows.cli.terminal import Terminal
    from eclectus.flows.run import open_run
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.champions import user_name
    from eclectus.tasks.evaluation.benchmark_tasks import Harness
    from eclectus.tasks.evaluation.lm_eval_files.import_results import (
        ImportResultsSettings,
        check_model,
        import_results,
    )
    from eclectus.tasks.evaluation.lm_eval_files.read import ResultFile, find_result_file

    Harness.check_installed()
    home = Home.existing(reading=False)
    checkpoint = home.store.find_whole(chosen.checkpoint)
    if checkpoint.kind != "checkpoint":
        raise EclectusError(f"--checkpoint {chosen.checkpoint} is {checkpoint.name}, no checkpoint")
    path, notes = find_result_file(Path(chosen.results).absolute())
    file = ResultFile.read(path)
    check_model(home.store, checkpoint, file, chosen.model)
    by = (chosen.by or user_name()).strip()
    settings = ImportResultsSettings(imported_results=str(path), imported_model=file.model, imported_by=by)
    label = f"import results of {checkpoint.name}"
    with Terminal() as terminal, open_run("import-results", settings, home, [terminal]) as run:
        for note in notes:
            terminal.print(note)
        made = import_results(label=label, checkpoint=checkpoint, settings=settings)
        known = run.states[label] == "reused"
    tasks = len({name.partition(" ")[0] for name in made.statistics["scores"]})
    again = "was imported before, nothing is new" if known else f"{tasks} tasks and groups, by {by}"
    print(f"{made.name}: {path.name} of {checkpoint.name}, {again}")
