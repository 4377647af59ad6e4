"""A plan: which steps of a flow would be reused and which would run, and why, without running any.

The flow is called as in a look-up (eclectus.tasks.lookup), but a step that has to run does not end it: it returns an
artifact that is `Planned`, whose digest stands for content that nobody knows yet. Keys that depend on it are new, as
they are in the run, and equal calls have equal keys. An artifact that was made before and is gone or damaged is made
again with the same content, so what follows is planned with its digest.
Where a flow asks for the content of a planned artifact, the plan ends: the rest depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys, Record
from eclectus.tasks.lookup import Lookup, run_checks
from eclectus.tasks.run import Run, activate
from eclectus.tasks.settings import Settings

if TYPE_CHECKING:
    from eclectus.tasks.step import Step

# Begins the path of what is not made yet; no path of a file holds it.
NOWHERE = "\0planned:"


class NotMadeYet(Exception):
    """The content of a planned artifact was asked for. label: of the step that makes it."""

    def __init__(self, label: str) -> None:
        super().__init__(f"step '{label}' has to run first")
        self.label = label


@dataclass(frozen=True)
class Planned(Artifact):
    """What a step will make. label: of the step. again: it was made before, so its digest is known."""

    label: str = ""
    again: bool = False

    def manifest(self) -> dict[str, Any]:
        raise NotMadeYet(self.label)

    def file(self, name: str) -> Any:
        raise NotMadeYet(self.label)


@dataclass(frozen=True)
class PlannedStep:
    """One step. why: as the reason in a run. after: labels of steps that make its inputs.

    record: of its key. makes: the kind of artifact. known: False if an input is not made yet, so that the key will be
    another one.
    """

    name: str
    label: str
    flow: str
    action: Literal["reuse", "run"]
    why: str
    after: list[str]
    record: Record
    makes: str
    known: bool

    @property
    def settings(self) -> dict[str, Any]:
        return self.record.settings


@dataclass
class Plan(Lookup):
    """steps: in the order of the flow. unknown_after: the step on whose result it depends what else is done, if any."""

    writes: ClassVar[bool] = False

    steps: list[PlannedStep] = field(default_factory=list)
    unknown_after: str = ""
    _made: dict[str, Artifact] = field(default_factory=dict)
    _planned: dict[str, Planned] = field(default_factory=dict)

    @property
    def to_run(self) -> list[PlannedStep]:
        return [each for each in self.steps if each.action == "run"]

    def call(self, run: Run, step: Step, label: str, arguments: dict[str, Any]) -> Artifact:
        """The artifact of a step's call: the one that is reused, or a planned one."""
        inputs = [each for each in step.artifacts(arguments) if isinstance(each, Planned)]
        named = self._named_in_settings(arguments)
        waits_for = list(dict.fromkeys(each.label for each in [*inputs, *named]))
        record = self._record(run, step, label, arguments, named)
        unknown = [each.label for each in [*inputs, *named] if not each.again]
        output: Artifact | None = self._made.get(record.key)
        action: Literal["reuse", "run"]
        if output is not None:
            action, why = "reuse", "same settings and inputs as an earlier step of this run"
        elif unknown:
            action, why = "run", f"its input of step '{unknown[0]}' is not made yet"
            output = self._plan(step, label, record, None)
        else:
            found, why = run.known.find(record, label)
            action = "reuse" if found else "run"
            output = found["out"] if found else self._plan(step, label, record, run.known.expected(record))
            if found and waits_for:
                why = f"{why}, if step '{waits_for[0]}' makes the same again"
        self._made[record.key] = output
        self.steps.append(
            PlannedStep(step.name, label, run.flow, action, why, waits_for, record, step.makes, not unknown)
        )
        run.note_maker(record, label, output, made=False)
        return output

    def find(self, digest: str) -> Artifact | None:
        return self._planned.get(digest)

    def _plan(self, step: Step, label: str, record: Record, expected: dict[str, Artifact] | None) -> Planned:
        before = expected["out"].digest if expected else ""
        digest = before or hashlib.sha256(f"planned {record.key}".encode()).hexdigest()
        planned = Planned(step.makes, digest, f"{NOWHERE}{digest}", label, bool(before))
        self._planned[digest] = planned
        return planned

    def _record(self, run: Run, step: Step, label: str, arguments: dict[str, Any], named: list[Planned]) -> Record:
        if not named:
            return step.record(arguments)
        # What is read from a folder that is not there yet is taken to be what it was.
        last = run.known.last(label)
        inputs = step.record(arguments, {}).inputs
        read = {name: value for name, value in last.inputs.items() if name not in inputs} if last else {}
        placed = {
            name: self._at_place(run, value) if isinstance(value, Settings) else value
            for name, value in arguments.items()
        }
        return step.record(placed, read)

    def _named_in_settings(self, arguments: dict[str, Any]) -> list[Planned]:
        """The planned artifacts whose paths are settings of the call."""
        values = [each for value in arguments.values() if isinstance(value, Settings) for each in dict(value).values()]
        digests = [each.removeprefix(NOWHERE) for each in values if isinstance(each, str) and each.startswith(NOWHERE)]
        return [self._planned[each] for each in digests]

    def _at_place(self, run: Run, settings: Settings) -> Settings:
        """Settings with the paths that artifacts will have, where these are known."""
        changes = {}
        for name, value in dict(settings).items():
            if isinstance(value, str) and value.startswith(NOWHERE):
                planned = self._planned[value.removeprefix(NOWHERE)]
                changes[name] = str(run.home.store.place(planned.kind, planned.digest)) if planned.again else value
        return settings.model_copy(update=changes)


def plan_flow(home: Home, flow: str, call: Callable[[], Any]) -> Plan:
    """The plan of a flow, which `call` calls as a function. Raises EclectusError as the run would before its work."""
    plan = Plan()
    # Nothing is journaled: a plan is no run.
    journal = cast(Journal, None)
    run = Run(id="", home=home, journal=journal, known=KnownKeys(home.keys, home.store), flow=flow, lookup=plan)
    try:
        with activate(run):
            call()
    except NotMadeYet as reason:
        plan.unknown_after = reason.label
    except EclectusError:
        run_checks(plan)
        raise
    if plan.to_run:
        run_checks(plan)
    return plan
