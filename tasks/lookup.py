"""Looks up what the steps of a flow would reuse, before anything is started.

While `run.lookup` is set, a flow is called as a plain function and each of its steps ends here: the key is computed and
looked up, as in a run. Either every artifact is there and whole, and the run is finished with one replay of what was
found (journal, displays), or the first one that is not ends the look-up with `WorkToDo` and the run begins as usual.
What was hashed is not hashed again (eclectus.storage.artifact.hash_unchanged).
Price: the fingerprints of the sources and one read of every artifact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import now
from eclectus.tasks.run import Run, current_run

if TYPE_CHECKING:
    from eclectus.tasks.step import Step


class WorkToDo(Exception):
    """A step has to run; ends a look-up. No EclectusError: flows leave out models whose steps raise one."""


@dataclass
class Lookup:
    """One look-up. actions: what the run does in this order once nothing is to be done, or before it reports an error.

    checks: of inputs, which are made before any work; where there is none, the keys prove that the same bytes passed.
    """

    writes: ClassVar[bool] = True

    actions: list[Callable[[Run], None]] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)

    def call(self, run: Run, step: Step, label: str, arguments: dict[str, Any]) -> Artifact:
        """The artifact that a step's call reuses. Raises WorkToDo if there is none."""
        began, started, flow = now(), time.monotonic(), run.flow
        run.show_lookup(label)
        record = step.record(arguments)
        found, reason = run.known.find(record, label)
        if found is None:
            raise WorkToDo(f"{label}: {reason}")
        output, seconds, ended = found["out"], time.monotonic() - started, now()

        def replay(of: Run) -> None:
            caller, of.flow = of.flow, flow
            step.report_reuse(of, label, record, output, reason, (began, ended, seconds))
            of.flow = caller

        self.actions.append(replay)
        run.note_maker(record, label, output, made=False)
        return output

    def find(self, digest: str) -> Artifact | None:
        """An artifact that the store does not have yet; a look-up knows none."""
        return None


def reuse_all(run: Run, call: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, the flow's result) if all of its steps are reused, which the run has then reported; else (False, None).

    call: calls the flow as a function. Raises EclectusError for what would end the run before or between its steps.
    """
    lookup = run.lookup = Lookup()
    try:
        result = call()
    except WorkToDo:
        run.forget_lookup()
        run_checks(lookup)
        return False, None
    except EclectusError:
        run.forget_lookup()
        run_checks(lookup)
        _act(run, lookup)
        raise
    finally:
        run.lookup = None
        run.show_lookup(None)
    _act(run, lookup)
    return True, result


def check_before_work(check: Callable[..., Any], *arguments: Any) -> None:
    """Calls a check of the run's inputs, or leaves it to the moment before the first step that has to run."""
    run = current_run()
    if run is not None and run.lookup is not None:
        run.lookup.checks.append(lambda: check(*arguments))
    else:
        check(*arguments)


def run_checks(lookup: Lookup) -> None:
    for check in lookup.checks:
        check()


def _act(run: Run, lookup: Lookup) -> None:
    for action in lookup.actions:
        action(run)
