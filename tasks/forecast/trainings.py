"""The trainings of a flow, without running any: which stages with which settings, and the shape that each starts from.

The flow is called as in a plan (tasks/plan.py), but every step returns a placeholder at once: nothing is read, hashed
or looked up. So the stages are those of the flow itself, whatever its settings ask for. A placeholder for a checkpoint
stands for a configuration of transformers, which the step that would make it decides. What only data decides is
assumed: vocabularies of their full size, and new experts of `extension_expert_budget` spread evenly over the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.lookup import run_checks
from eclectus.tasks.plan import NOWHERE, NotMadeYet, Plan, Planned
from eclectus.tasks.run import Run, activate

if TYPE_CHECKING:
    from eclectus.tasks.step import Step


@dataclass(frozen=True)
class Call:
    """A call of a step. arguments: settings, and placeholders of artifacts. made: what stands for its result."""

    step: str
    label: str
    arguments: dict[str, Any]
    made: Planned


@dataclass
class Calls(Plan):
    """Takes the calls of a flow's steps down. calls: in order."""

    calls: list[Call] = field(default_factory=list)

    def call(self, run: Run, step: Step, label: str, arguments: dict[str, Any]) -> Artifact:
        digest = hashlib.sha256(f"{len(self.calls)} {label}".encode()).hexdigest()
        made = self._planned[digest] = Planned(step.makes, digest, f"{NOWHERE}{digest}", label)
        self.calls.append(Call(step.name, label, arguments, made))
        return made

    def made_by(self, artifact: Artifact) -> Call:
        """The call that makes a placeholder."""
        return next(each for each in self.calls if each.made is artifact)


def calls_of(home: Home, flow: str, call: Callable[[], Any]) -> Calls:
    """The calls of a flow, which `call` calls as a function. Raises EclectusError as the run would before its work."""
    calls = Calls()
    run = Run("", home, cast(Journal, None), KnownKeys(home.keys, home.store), flow=flow, lookup=calls)
    try:
        with activate(run):
            call()
    except NotMadeYet as reason:
        raise EclectusError(
            f"what the flow trains depends on the result of step '{reason.label}', which has not run; name a folder as "
            "base_model"
        ) from reason
    finally:
        run_checks(calls)
    return calls
