"""The options of commands that run a flow: one per setting, described by the setting itself.

`--help` shows the basic settings, `--help-all` all of them, both by group (`eclectus.flows.parameters`).
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eclectus.storage.errors import EclectusError

if typing.TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from eclectus.tasks.settings import Settings

HELP_ALL = "--help-all"
LONGEST_CHOICES = 40


def add_settings(parser: argparse.ArgumentParser, command: str, flow: str, show_all: bool) -> None:
    """Adds `--config` and every setting of the flow. show_all: the help describes those that are not basic, too."""
    from eclectus.flows.parameters import PARAMETERS

    model = PARAMETERS[flow]
    hidden = 0
    for title, names in model.grouped().items():
        group = parser.add_argument_group(title)
        for name in names:
            field = model.model_fields[name]
            shown = show_all or model.is_basic(name)
            hidden += not shown
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=f"setting_{name}",
                metavar=_value(field.annotation),
                help=_describe(field) if shown else argparse.SUPPRESS,
            )
    words = " [CHECKPOINT ...]" if flow == "evaluate" else ""
    parser.usage = f"eclectus {command} [--config FILE] [--SETTING VALUE ...]{words}"
    if hidden:
        parser.epilog = f"{hidden} more settings are options too: eclectus {command} {HELP_ALL}"


def add_flows(
    part: argparse.ArgumentParser, flows: dict[str, tuple[str, str]], chosen: str | None, show_all: bool, **more: Any
) -> Iterator[argparse.ArgumentParser]:
    """Adds the flows as sub-commands of a command, each with its settings as options; yields each parser.

    flows: by command, name and help. chosen: the one whose settings become options. more: arguments of
    `add_subparsers`.
    """
    parts = part.add_subparsers(metavar="FLOW", dest="command", **more)
    own = part.prog.split()[-1]
    for command, (flow, help_text) in flows.items():
        # The UI and the lineage name the flow of `run` "main".
        aliases = [flow] if flow != command else []
        each = parts.add_parser(command, aliases=aliases, help=help_text, formatter_class=part.formatter_class)
        each.add_argument("--home", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        each.set_defaults(flow=flow)
        yield each
        add_config(each)
        if command == chosen:
            add_settings(each, f"{own} {command}", flow, show_all)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(HELP_ALL, action="help", help="show all settings and exit")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of 'setting: value' lines; options on the command line win over it"
    )


def add_models(parser: argparse.ArgumentParser, flow: str) -> None:
    """Adds the models that `evaluate` takes as words, too; the usage shows them, and a setting describes them."""
    if flow == "evaluate":
        parser.add_argument("models", nargs="*", metavar="CHECKPOINT", help=argparse.SUPPRESS)


def read_parameters(chosen: argparse.Namespace) -> Settings:
    """The flow's parameters from `--config` and the options. Raises EclectusError naming the culprit."""
    from eclectus.flows.parameters import PARAMETERS

    model = PARAMETERS[chosen.flow]
    values = read_config(chosen.config, model)
    options = {
        # The sources themselves know which commas are in names of files.
        name: value if name == "sources" else _parse(value, model.model_fields[name].annotation)
        for name in model.model_fields
        if (value := getattr(chosen, f"setting_{name}")) is not None
    }
    if models := getattr(chosen, "models", None):
        if "evaluate_checkpoints" in options:
            raise EclectusError(
                f"models are given twice: '{models[0]}' as a word, and by --evaluate-checkpoints; choose one way"
            )
        options["evaluate_checkpoints"] = models
    model.read(options, "the command line")
    return model.read({**values, **options}, chosen.config or "the command line")


def read_config(path: str | Path | None, model: type[Settings]) -> dict[str, Any]:
    """The settings in a YAML file that are the model's; one file serves all flows, and others are checked too."""
    if not path:
        return {}
    from eclectus.flows.parameters import FileParameters
    from eclectus.tasks.settings import parse_settings

    written = parse_settings(_read(Path(path)), f"config file {path}")
    values = FileParameters.read(written, str(path)).model_dump(exclude_unset=True)
    return {name: value for name, value in values.items() if name in model.model_fields}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise EclectusError(f"config file {path} cannot be read: {error.strerror}") from error


def _describe(field: FieldInfo) -> str:
    """The field's description and default, for argparse."""
    default = field.default
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, list):
        default = ",".join(str(part) for part in default)
    shown = "required" if field.is_required() else default
    note = "" if shown == "" else f" (default: {shown})"
    return f"{field.description}{note}".replace("%", "%%")


def _value(annotation: Any) -> str:
    """What stands for the option's value in the help."""
    origin = typing.get_origin(annotation)
    if origin in (list, tuple):
        return "A,B"
    if origin is typing.Literal:
        choices = "|".join(str(choice) for choice in typing.get_args(annotation) if choice != "")
        return choices if len(choices) <= LONGEST_CHOICES else "NAME"
    return {bool: "true|false", int: "N", float: "X"}.get(annotation, "TEXT")


def _parse(text: str, annotation: Any) -> Any:
    """A command-line word for a field: lists are separated by commas, everything else is left to pydantic."""
    is_list = typing.get_origin(annotation) in (list, tuple)
    if isinstance(annotation, types.UnionType) or not is_list:
        return text
    return [part for part in text.split(",") if part]
