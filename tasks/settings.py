"""Settings: flat, frozen pydantic models, written once and used as step settings, flow forms, `--help` and docs.

A step declares its own `Settings`. A flow's parameters inherit from the settings of its steps, which makes them one
flat form; every step takes its own part with `StepSettings.of(parameters)`. Field names are therefore unique across the
steps of a flow.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from eclectus.storage.errors import EclectusError

# Marks a basic setting, shown by `--help` and Prefect forms; the others are in `--help-all` and `more_settings`.
BASIC: dict[str, JsonValue] = {"basic": True}
SEED: Any = Field(0, description="Seed of everything random.", json_schema_extra=BASIC)


def RuntimeSetting(default: Any, description: str, basic: bool = False, **rules: Any) -> Any:
    """A field that says where or how fast a step runs; it does not change the result and is not part of the key."""
    extra: dict[str, JsonValue] = {"affects_output": False, **(BASIC if basic else {})}
    return Field(default, description=description, json_schema_extra=extra, **rules)


def LaterSetting(default: Any, description: str, **rules: Any) -> Any:
    """A field that came when there were keys without it: at its default, with which all is as before, it is not in the
    key."""
    return Field(default, description=description, json_schema_extra={"in_key_at_default": False}, **rules)


class Settings(BaseModel):
    """Settings of one step, or of a flow that inherits from several steps' settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, parameters: BaseModel, **overrides: Any) -> Self:
        """The part of `parameters` that belongs to this model, with `overrides` on top."""
        part = {name: getattr(parameters, name) for name in cls.model_fields if hasattr(parameters, name)}
        return cls(**{**part, **overrides})

    @classmethod
    def read(cls, values: dict[str, Any], origin: str) -> Self:
        """Checks values written by a user. Raises EclectusError naming the first wrong setting and what is expected.

        origin: where the values come from (a file name, "the command line"), for the message.
        """
        for name in values:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else f"; the settings are {', '.join(cls.model_fields)}"
                raise EclectusError(f"unknown setting '{name}' in {origin}{hint}")
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "settings"
            what = first["msg"].removeprefix("Value error, ")
            raise EclectusError(f"setting '{name}' in {origin} is {first['input']!r}: {what}") from error

    def check_together(self) -> None:
        """Raises EclectusError for settings that are valid alone but cannot work together; called before any work.

        Each class checks its own settings after `super().check_together()`, so a flow's parameters inherit all checks.
        """

    def decided(self, inputs: Mapping[str, Any]) -> Self:
        """The settings with a value in place of every "auto" that the machine or the inputs decide.

        A step calls it before it makes its key, which then holds what was decided. inputs: the step's, by name.
        """
        return self

    def key_values(self) -> dict[str, Any]:
        """JSON-ready values of the settings that can change the output."""
        return self.model_dump(
            mode="json",
            exclude={
                name
                for name, field in type(self).model_fields.items()
                if not self._matters(name) or (self.is_later(name) and getattr(self, name) == field.default)
            },
        )

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Self:
        """The settings of a step whose key held these values; what was not in it has its default."""
        return cls(**{name: value for name, value in values.items() if name in cls.model_fields})

    @classmethod
    def is_basic(cls, name: str) -> bool:
        """Whether the setting is among those that `--help` and the forms show (see `BASIC`)."""
        return cls._says(name, "basic", True)

    @classmethod
    def is_later(cls, name: str) -> bool:
        """Whether the setting is in keys only where it is not at its default (`LaterSetting`)."""
        return cls._says(name, "in_key_at_default", False)

    @classmethod
    def _matters(cls, name: str) -> bool:
        return not cls._says(name, "affects_output", False)

    @classmethod
    def _says(cls, name: str, what: str, value: bool) -> bool:
        extra = cls.model_fields[name].json_schema_extra
        return isinstance(extra, dict) and extra.get(what) is value


class CurationWorkerSettings(Settings):
    """How many calls of a step run at the same time (`eclectus.tasks.over_parts`)."""

    curation_workers: int = RuntimeSetting(
        0,
        "Workers over which a step spreads its parts; 1 uses this process only, 0 takes all CPUs of the cluster for "
        "large corpora.",
        ge=0,
    )


def parse_settings(text: str, origin: str) -> dict[str, Any]:
    """Unchecked settings from YAML text of 'setting: value' lines. Raises EclectusError naming `origin`."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EclectusError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise EclectusError(f"{origin} holds a {type(values).__name__}; expected 'setting: value' lines")
    return {str(name): value for name, value in (values or {}).items()}
