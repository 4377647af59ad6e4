"""`push` and `pull`: checkpoints on a model hub, with their lineage."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


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
