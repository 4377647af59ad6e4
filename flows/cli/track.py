"""The command `track`: a run that was made without trackers, or of which they missed a part, told to them now."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable

from eclectus.storage.errors import EclectusError


def add_track_command(add: Callable[..., argparse.ArgumentParser], run_help: str) -> None:
    """add: the function in `eclectus.flows.cli.lineage`."""
    part = add("track", _track, "show a run in trackers: what they do not have of it yet", run=run_help)
    part.add_argument(
        "--to", metavar="A,B", help="tensorboard, wandb, mlflow, trackio (default: as their variables say)"
    )
    part.add_argument("--project", help="project or experiment in them (default: eclectus)")


def _track(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_run
    from eclectus.storage.trackers.feeder import feed_recorded
    from eclectus.storage.trackers.tracker import VARIABLES
    from eclectus.storage.trackers.tracker import chosen as of_environment
    from eclectus.tasks.tracking import TrackerSettings, check_libraries

    given = {"trackers": [each for each in (chosen.to or "").split(",") if each]}
    given |= {"tracker_project": chosen.project} if chosen.project else {}
    settings = TrackerSettings.read(given, "the options")
    names = of_environment(settings.trackers, os.environ)
    if not names:
        variables = ", ".join(name for each in VARIABLES.values() for name in each)
        raise EclectusError(f"no tracker is named; say which with --to, or set one of {variables}")
    check_libraries(names)
    home = Home.existing(reading=False)
    with connect(home) as connection:
        run = find_run(connection, chosen.run)
    troubles: list[str] = []
    # Some libraries print where nobody asked.
    with contextlib.redirect_stdout(sys.stderr):
        sinks = feed_recorded(home, run, names, settings.tracker_project, troubles.append)
    for sink in sinks:
        row = {"run": run, "tracker": sink.name, "place": sink.place, "numbers": sink.told}
        if chosen.json:
            print(json.dumps(row))
        elif sink.place:
            news = f"{sink.told} numbers of run {run}" if sink.told else f"nothing new of run {run}"
            print(f"{sink.name}: {news}: {sink.place}")
    if troubles:
        raise EclectusError("; ".join(troubles))
