"""The commands `adopt` and `unadopt`, `tag` and `untag`: what users decide about artifacts, with name and reason."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from eclectus.flows.cli.options import add_config, add_models, add_settings, read_parameters
from eclectus.storage.commands import command

ARTIFACT = "artifact: KIND-DIGITS as in `artifacts`, a digest or the start of one, or a tag"


def add_adopt_command(commands: Any, flows: dict[str, tuple[str, str]], chosen: str | None, show_all: bool) -> None:
    """Adds `adopt`. flows: by command, name and help. chosen: the one whose settings become options."""
    what = "accept an artifact as a step's result: made by older code, by hand or elsewhere"
    part = commands.add_parser("adopt", what, f"{what[0].upper()}{what[1:]}. The step is then reused, not run.")
    parts = part.add_subparsers(metavar="FLOW", required=True, dest="command")
    for name, (flow, help_text) in flows.items():
        aliases = [flow] if flow != name else []
        each = parts.add_parser(name, aliases=aliases, help=help_text, formatter_class=part.formatter_class)
        each.add_argument("--home", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        each.add_argument("--step", required=True, help="the step's label, as `plan` shows it")
        each.add_argument("--artifact", required=True, help=f"{ARTIFACT}; or a checkpoint's folder, which is copied")
        each.add_argument("--reason", required=True, help="why it is as good; `why` and `lineage` show it")
        each.add_argument("--by", help="who accepts it (default: the user's name)")
        each.set_defaults(act=_adopt, flow=flow)
        add_config(each)
        add_models(each, flow)
        if name == chosen:
            add_settings(each, f"adopt {name}", flow, show_all)


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
