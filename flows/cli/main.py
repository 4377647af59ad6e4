"""The command line `eclectus`. Imports that take time are made by the command that needs them."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eclectus.flows.cli.checkpoints import add_checkpoint_commands
from eclectus.flows.cli.decisions import add_adopt_command, add_name_commands, add_rights_commands
from eclectus.flows.cli.estimate import add_estimate_command
from eclectus.flows.cli.exchange import add_results_commands
from eclectus.flows.cli.lineage import add_lineage_commands
from eclectus.flows.cli.options import HELP_ALL, add_config, add_models, add_settings, read_parameters
from eclectus.flows.cli.plan import add_plan_command
from eclectus.flows.cli.promotion import add_promotion_commands
from eclectus.storage.commands import command, quoted
from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrub

# Flags for `chaos`: a checkpoint every other step, so that a small job has something to resume from.
CHECKPOINTS_OFTEN = ["--checkpoint-every", "2"]
FLOWS = {
    "run": ("main", "the whole job: curate, pre-train, extend, evaluate, report"),
    "curate": ("curate", "turn sources into training instances"),
    "pretrain": ("pretrain", "train a Lory model and its dense twin"),
    "extend": ("extend", "extend a model to new languages by MoE-LPR or a baseline"),
    "similarity": ("similarity", "measure language similarity by layer and propose experts per layer (LayerMoE)"),
    "evaluate": ("evaluate", "score models on held-out documents and tasks, and write the report"),
    "retrain": ("retrain", "if enough documents are new, train on from the champion; promote what passes the gate"),
}
# The commands as `eclectus --help` lists them.
GROUPS = {
    "run": [*FLOWS, "plan", "estimate"],
    "models": [
        "upcycle", "export", "export-instances", "certify", "push", "pull", "export-results", "import-results",
        "promote", "rollback", "champions", "tag", "untag",
    ],
    "lineage": [
        "sql", "runs", "lineage", "trace", "diff", "compare", "why", "adopt", "unadopt", "forget",
        "prove", "verify", "bundle", "openlineage", "track",
    ],
    "operate": ["up", "down", "deploy", "chaos", "corpus", "parallel", "keep", "gc", "compact"],
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. An EclectusError is one line on stderr and exit code 2, any other exception exit code 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # `plan` and `estimate` take flows by their names too, of which that of `run` is another.
    named = {flow: command for command, (flow, _) in FLOWS.items()} | {command: command for command in FLOWS}
    parser = make_parser(next((named[word] for word in words if word in named), None), show_all=HELP_ALL in words)
    chosen, unknown = parser.parse_known_args(words)
    if chosen.home:
        os.environ["ECLECTUS_HOME"] = chosen.home
    try:
        _check_known(unknown, chosen)
        chosen.act(chosen)
        sys.stdout.flush()
    except EclectusError as error:
        print(f"eclectus: {scrub(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("eclectus: interrupted; finished steps are kept and the next run resumes from them", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # `| head` has what it wants; what is still buffered goes nowhere, or Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        log = _write_traceback()
        message = scrub(f"{type(error).__name__}: {error}")
        print(f"eclectus: internal error: {message}; traceback in {log}", file=sys.stderr)
        raise SystemExit(1) from None


def _check_known(unknown: list[str], chosen: argparse.Namespace) -> None:
    """Raises EclectusError for the first word that is not an option of the command, with the nearest option."""
    if not unknown:
        return
    names = [name.removeprefix("setting_") for name in vars(chosen) if name not in ("act", "flow")]
    options = [f"--{name.replace('_', '-')}" for name in names]
    close = difflib.get_close_matches(unknown[0], options, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see --help"
    raise EclectusError(f"unknown option '{unknown[0]}'; {hint}")


def _write_traceback() -> str:
    """Writes the traceback of the current exception into the home, or prints it if the home is not writable.

    Returns where it is, for the message.
    """
    import traceback

    from eclectus.storage.home import Home

    text = scrub(traceback.format_exc())
    try:
        path = Home.existing(reading=False).root / "fault.log"
        path.write_text(text)
        return quoted(path)
    except (OSError, EclectusError):
        print(text, file=sys.stderr)
        return "the lines above"


class Commands:
    """The commands of a parser, each with one line of help, which the parser's own help lists by group."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(
            prog=parser.prog, metavar="COMMAND", required=True, help=argparse.SUPPRESS
        )
        self.help: dict[str, str] = {}

    def add_parser(self, name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
        self.help[name] = help
        part = self._parsers.add_parser(name, description=description or help, formatter_class=_formatter)
        # As the program's own option, before the command.
        part.add_argument("--home", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return part

    def listing(self) -> str:
        lines = []
        for title, names in GROUPS.items():
            lines += ["", f"{title}:", *(f"  {name:<17}{self.help[name]}" for name in names)]
        return "\n".join(lines[1:])


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns - 2, 118))


class _ShowVersion(argparse.Action):
    """Prints the version; it is only looked up when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from eclectus import __version__

        print(f"eclectus {__version__}")
        parser.exit()


def make_parser(command: str | None = None, show_all: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands.

    command: the one whose settings become options; loading only those keeps the rest fast. show_all: its help
    describes all of its settings.
    """
    parser = argparse.ArgumentParser(
        prog="eclectus",
        usage="eclectus [-h] [--version] [--home HOME] COMMAND ...",
        description="Mixture-of-experts language models from a corpus of documents, with the lineage of every model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", help="folder of artifacts, journal and database (default: $ECLECTUS_HOME or ./home)")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = Commands(parser)
    for name, (flow, help_text) in FLOWS.items():
        part = commands.add_parser(name, help_text, f"Runs the flow '{flow}': {help_text}.")
        part.set_defaults(act=_run_flow, flow=flow)
        add_config(part)
        add_models(part, flow)
        if name == command:
            add_settings(part, name, flow, show_all)

    add_plan_command(commands, FLOWS, command, show_all)
    add_estimate_command(commands, FLOWS, command, show_all)
    add_adopt_command(commands, FLOWS, command, show_all)

    def add(name: str, act: Callable[[Any], None], help_text: str, **positional: str) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help_text)
        for word, meaning in positional.items():
            part.add_argument(word, help=meaning)
        part.set_defaults(act=act)
        return part

    add_checkpoint_commands(add)
    add_results_commands(add)
    add_promotion_commands(add)
    add_name_commands(add)
    add_rights_commands(add)
    add("corpus", _corpus, "write the default corpus from installed packages, as JSONL", out="folder to write")
    parallel = add(
        "parallel",
        _parallel,
        "write the same pages in several languages as questions, from unpacked packages of documentation",
        folder="folder with installed or unpacked packages, such as libreoffice-help-*",
        out="folder to write, for --benchmark-files",
    )
    parallel.add_argument("--languages", help="languages beside English, as A,B (default: all in the folder)")
    parallel.add_argument("--pages", type=int, help="at most this many pages (default: 300)")
    parallel.add_argument(
        "--share", type=float, help="without --languages, drop those with fewer translated pages (default: 0.2)"
    )
    add("up", _up, "start a local Prefect server with UI, Ray, a worker and all deployments, in the background")
    add("down", _down, "stop what `up` started, and all of its child processes")
    add("deploy", _deploy, "register all deployments and automations with the server at PREFECT_API_URL")
    chaos = add(
        "chaos",
        _chaos,
        "kill processes of a job at random and check that its last checkpoint equals an undisturbed run's",
    )
    chaos.add_argument("--flow", default="run", choices=[*FLOWS], help="the job (default: run)")
    chaos.add_argument("--config", default="configs/small.yaml", help="its settings (default: configs/small.yaml)")
    chaos.add_argument("--sources", help="its documents, instead of the config's")
    chaos.add_argument("--seed", type=int, default=0, help="seed of what is killed, and when (default: 0)")
    chaos.add_argument(
        "--kills", type=int, default=4, help="number of kills; any four in a row are of different kinds (default: 4)"
    )
    add_lineage_commands(commands)
    parser.epilog = commands.listing() + "\n\neclectus COMMAND --help describes a command."
    return parser


def _run_flow(chosen: argparse.Namespace) -> None:
    parameters = read_parameters(chosen)
    from eclectus.storage.home import Home

    parameters.check_together()
    from eclectus.flows.cli.summary import summarize
    from eclectus.flows.cli.terminal import Terminal
    from eclectus.flows.flow import flow_named, run_flow
    from eclectus.flows.run import served_run

    home = Home.open()
    with Terminal() as terminal:
        terminal.print(f"{chosen.flow} in home {home.shown}")
        with served_run(chosen.flow, parameters, home, [terminal]) as run:
            result = run_flow(run, flow_named(chosen.flow), parameters)
        summarize(run, result, terminal)


def _corpus(chosen: argparse.Namespace) -> None:
    from eclectus.tasks.corpus import CorpusSettings, write_corpus

    summary = write_corpus(Path(chosen.out), CorpusSettings())
    megabytes, files = summary.bytes / 1e6, len(summary.files)
    print(f"{summary.documents} documents, {megabytes:.1f} MB of text in {files} files in {quoted(chosen.out)}")


def _parallel(chosen: argparse.Namespace) -> None:
    from eclectus.tasks.corpus.parallel_text import ParallelSettings, describe, write_parallel_text

    languages = [each for each in (chosen.languages or "").split(",") if each]
    given = {"parallel_languages": languages, "parallel_pages": chosen.pages, "parallel_share": chosen.share}
    settings = ParallelSettings.read({name: each for name, each in given.items() if each is not None}, "the options")
    print(describe(write_parallel_text(Path(chosen.folder), Path(chosen.out), settings)))
    print(f"evaluate with them: {command('evaluate', 'CHECKPOINT', '--benchmark-files', chosen.out)}")


def _up(_: argparse.Namespace) -> None:
    from eclectus.flows.services.up import up
    from eclectus.storage.home import Home

    print(f"Prefect is up: {up(Home.open())}   (stop it with: {command('down')})")


def _down(_: argparse.Namespace) -> None:
    from eclectus.flows.services.up import down
    from eclectus.storage.home import Home

    print(f"stopped: {', '.join(down(Home.existing())) or 'nothing was running'}")


def _deploy(_: argparse.Namespace) -> None:
    from eclectus.flows.services.deploy import deploy

    print(f"registered: every deployment of prefect.yaml; {'; '.join(deploy())}")


def _chaos(chosen: argparse.Namespace) -> None:
    from eclectus.flows.services.chaos import chaos

    words = [chosen.flow, "--config", str(Path(chosen.config).absolute()), *CHECKPOINTS_OFTEN]
    words += ["--sources", chosen.sources] if chosen.sources else []
    outcome = chaos(words, chosen.seed, chosen.kills, lambda text: print(text, flush=True))
    for kill in outcome.kills:
        print(kill)
    print(f"same bits after {len(outcome.kills)} kills and {outcome.starts} starts: checkpoint-{outcome.digest[:12]}")


if __name__ == "__main__":
    main()
