"""The step: the one abstraction of Eclectus, and the only place where keys, reuse, lineage and Prefect meet.

    @step(makes="grouping", version=1)
    def group(documents: Artifact, neighbors: Artifact, settings: GroupSettings, out: Draft) -> None: ...

    order = group(documents=documents, neighbors=neighbors, settings=settings)     # in a run: reused or computed
    group.function(documents, neighbors, settings, draft)                          # in a unit test: the plain function

Within a run, a call hashes (step, version, settings, digests of inputs) into a key. If the key is known and its
artifact is intact, that artifact is the result; else the function fills a draft, which is committed. In both cases the
journal gets the step, the reason for reuse or re-run, inputs, outputs, settings, seconds and peak memory.
A step that reads files hashes them while it reads; if they are not those of its key, it reads them once more, and what
it read last is the key under which the artifact is stored.
Cost of a reuse: one lookup and re-hashing the artifact.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from eclectus.storage.artifact import Artifact
from eclectus.storage.disk_full import no_room
from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import now
from eclectus.storage.secrets import scrub
from eclectus.storage.step_keys import Record
from eclectus.tasks.run import Outcome, Run, notify, require_run, undisturbed
from eclectus.tasks.settings import Settings

# Stands for the digest of something that changed while it was read, so that no digest is true of what was read.
CHANGED = "changed"


class Step:
    """A step made by `@step`. Call it by keyword with artifacts and settings; `label` names this call in the run."""

    def __init__(
        self,
        function: Callable[..., None],
        makes: str,
        version: int,
        fingerprint: Callable[[Any], dict[str, str]] | None,
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.makes = makes
        self.version = version
        self.fingerprint = fingerprint
        self.__doc__ = function.__doc__
        self._parameters = set(inspect.signature(function).parameters) - {"out"}

    def __call__(self, *, label: str | None = None, **arguments: Any) -> Artifact:
        """The artifact for these arguments, reused or computed. Inputs that are None are left out.

        Raises EclectusError when no run is active, or an argument is not one of the step's.
        """
        run = require_run(f"step '{self.name}'", f", or {self.name}.function")
        for name in arguments:
            if name not in self._parameters:
                raise EclectusError(
                    f"step '{self.name}' has no input '{name}'; it takes {', '.join(sorted(self._parameters))}"
                )
        label = label or self.name
        for name, value in arguments.items():
            if isinstance(value, Settings):
                arguments[name] = value.decided(arguments)
        if run.lookup is not None:
            return run.lookup.call(run, self, label, arguments)
        if run.interrupted:
            raise KeyboardInterrupt
        call = _Call(label, arguments, now(), time.monotonic())
        run.show(lambda display: display.step_began(label))
        # What is reused is no task run: Prefect takes tens of milliseconds for each.
        try:
            call.record = self.record(arguments)
            found, reason = run.known.find(call.record, label)
        except Exception as error:
            call.error = error
        else:
            if found:
                times = call.began, now(), time.monotonic() - call.started
                self.report_reuse(run, label, call.record, found["out"], reason, times)
                return found["out"]
        return self._in_prefect(run, call) if run.shown_in_prefect else self._execute(run, call)

    def record(self, arguments: dict[str, Any], read: dict[str, str] | None = None) -> Record:
        """The part of the call that the key is computed from. read: what was read, in place of the fingerprint."""
        inputs: dict[str, str] = {}
        settings: dict[str, Any] = {}
        for name, value in arguments.items():
            if isinstance(value, Settings):
                settings |= value.key_values()
                if read is None:
                    inputs |= self.fingerprint(value) if self.fingerprint else {}
            else:
                inputs |= {
                    key: f"{artifact.kind}-{artifact.digest}" for key, artifact in _artifacts(self.name, name, value)
                }
        return Record(self.name, self.version, settings, inputs | (read or {}))

    def report_reuse(
        self, run: Run, label: str, record: Record, output: Artifact, reason: str, times: tuple[str, str, float]
    ) -> None:
        """Journals and shows that the run reuses an artifact. times: when its look-up began and ended, and seconds."""
        began, ended, seconds = times
        step_id = uuid.uuid4().hex
        run.journal.event(
            "step_started", sync=False, logged=began, step=step_id, name=self.name, label=label, flow=run.flow,
            key=record.key,
        )  # fmt: skip
        run.known.note(record, label)
        columns = self._columns(step_id, run, label, record, "reused", reason, seconds)
        run.journal.event("step_ended", sync=False, logged=ended, **columns, output=describe(output))
        run.note_maker(record, label, output, made=False)
        run.states[label] = "reused"
        previous, run.step, run.label = (run.step, run.label), step_id, label
        run.show(lambda display: display.step_ended(label, "reused", reason, seconds, output))
        run.step, run.label = previous

    def artifacts(self, arguments: dict[str, Any]) -> list[Artifact]:
        """The artifacts in the arguments of a call."""
        given = {name: value for name, value in arguments.items() if not isinstance(value, Settings)}
        return [artifact for name, value in given.items() for _, artifact in _artifacts(self.name, name, value)]

    def _in_prefect(self, run: Run, call: _Call) -> Artifact:
        import prefect
        from prefect.cache_policies import NO_CACHE
        from prefect.context import TagsContext
        from prefect.states import Failed

        outcome = Outcome()

        def execute() -> Artifact:
            return self._execute(run, call)

        def execute_noted() -> Any:
            try:
                return outcome.of(execute)
            except EclectusError as error:
                # The UI then shows the sentence; the caller gets it raised.
                return Failed(message=scrub(str(error)), data=error)

        as_task = prefect.task(
            name=self.name,
            task_run_name=call.label,
            description=inspect.getdoc(self.function),
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        in_task: Callable[[], Artifact] = as_task(execute_noted)
        # Prefect leases a concurrency slot for every tag of a task run, its own and the flow run's: 0.2 s each, and the
        # task fails if the server cannot be asked.
        with TagsContext(current_tags=set()):
            return undisturbed(in_task, outcome, execute)

    def _execute(self, run: Run, call: _Call) -> Artifact:
        label = call.label
        step_id = uuid.uuid4().hex
        previous, run.step, run.label = (run.step, run.label), step_id, label
        record, state, reason, memory = call.record, "failed", "", _Memory()
        cpu = _cpu_seconds(run)
        output: Artifact | None = None
        try:
            with self._disk_full_named(run):
                if call.error is not None:
                    raise call.error
                assert record is not None
                run.journal.event(
                    "step_started",
                    step=step_id,
                    name=self.name,
                    label=label,
                    flow=run.flow,
                    key=record.key,
                    settings=record.settings,
                )
                with run.known.hold(record.key, lambda: _report_waiting(run, label)):
                    found, reason = run.known.find(record, label)
                    if found:
                        # Another run made it meanwhile.
                        state, output = "reused", found["out"]
                        run.known.note(record, label)
                    else:
                        with memory:
                            record, output = self._make(run, call.arguments, record)
                        state = "completed"
                        done = {"out": f"{output.kind}-{output.digest}"}
                        run.known.remember(Record(self.name, self.version, record.settings, record.inputs, done), label)
                run.note_maker(record, label, output, made=state == "completed")
            return output
        except BaseException as error:
            reason = scrub(f"{type(error).__name__}: {error}")
            state = "failed" if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            seconds = time.monotonic() - call.started
            run.journal.event(
                "step_ended",
                **self._columns(step_id, run, label, record, state, reason, seconds),
                peak_memory=memory.peak,
                cpu_seconds=round(_cpu_seconds(run) - cpu, 3),
                prefect_task_run=_prefect_task_run(run),
                output=describe(output),
            )
            run.states[label] = state
            run.show(lambda display: display.step_ended(label, state, reason, seconds, output))
            run.step, run.label = previous

    def _columns(
        self, step_id: str, run: Run, label: str, record: Record | None, state: str, reason: str, seconds: float
    ) -> dict[str, Any]:
        """Columns of the event `step_ended`."""
        return {
            "step": step_id,
            "name": self.name,
            "label": label,
            "flow": run.flow,
            "key": record.key if record else None,
            "version": self.version,
            "state": state,
            "reason": reason,
            "seconds": round(seconds, 3),
            "seed": record.settings.get("seed") if record else None,
            "settings": record.settings if record else {},
            "inputs": record.inputs if record else {},
        }

    def _make(self, run: Run, arguments: dict[str, Any], record: Record) -> tuple[Record, Artifact]:
        """The artifact, and the record that is true of what was read for it, which may differ from the given one.

        Raises EclectusError if what is read does not keep still.
        """
        for last in (False, True):
            with run.home.store.draft(self.makes) as draft:
                self.function(**arguments, out=draft)
                as_read = record if draft.read is None else self.record(arguments, draft.read)
                changed = [name for name, digest in as_read.inputs.items() if digest != record.inputs.get(name)]
                changed += [name for name in record.inputs if name not in as_read.inputs]
                if not changed or (last and CHANGED not in as_read.inputs.values()):
                    return as_read, run.home.store.commit(draft)
            names = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
            if not last:
                notify("changed input", f"{names} changed while being read; step '{self.name}' reads again")
                record = self.record(arguments)
        raise EclectusError(
            f"step '{self.name}' read {names} twice, and both times it changed meanwhile; run again when it is "
            "written, or name a copy"
        )

    @contextlib.contextmanager
    def _disk_full_named(self, run: Run) -> Iterator[None]:
        """Turns an error that says that nothing more can be written into one that names the home and the fix."""
        try:
            yield
        except Exception as error:
            reason = no_room(error, run.home.root)
            if reason is None:
                raise
            raise EclectusError(
                f"step '{self.name}' cannot write to {run.home.name}: {reason}; free some space or choose another "
                "home (--home); finished steps and parts are kept, and the next run reuses them"
            ) from error


def step(
    *, makes: str, version: int, fingerprint: Callable[[Any], dict[str, str]] | None = None
) -> Callable[[Callable[..., None]], Step]:
    """Turns a plain function into a step.

    makes: the kind of artifact. version: increased by hand when the function's output changes for equal inputs.
    fingerprint: for steps that read more than artifacts (files, data sets of the hub): settings -> {name: digest},
    which become part of the key like the inputs.
    """
    return lambda function: Step(function, makes, version, fingerprint)


@dataclass
class _Call:
    """A call of a step. began, started: when, as in the journal and on the monotonic clock. record: None if it could
    not be computed or looked up because of `error`.
    """

    label: str
    arguments: dict[str, Any]
    began: str
    started: float
    record: Record | None = None
    error: Exception | None = None


def _cpu_seconds(run: Run) -> float:
    """CPU seconds so far: of this process, of its children that ended, and of parts in Ray's workers."""
    return sum(os.times()[:4]) + run.remote_seconds


class _Memory:
    """Peak resident memory of this process and its children (Ray workers included), sampled twice per second."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._done = threading.Event()

    def __enter__(self) -> None:
        self.peak = _resident()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            self.peak = max(self.peak or 0, _resident())


def _resident() -> int:
    process = psutil.Process()
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += each.memory_info().rss
    return total


def _artifacts(step_name: str, name: str, value: Any) -> Iterator[tuple[str, Artifact]]:
    """(name, artifact) of everything in one argument, which is an artifact, a list or dict of them, or None."""
    if isinstance(value, Artifact):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _artifacts(step_name, f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for key, each in enumerate(value):
            yield from _artifacts(step_name, f"{name}.{key}", each)
    elif value is not None:
        raise EclectusError(
            f"input '{name}' of step '{step_name}' is a {type(value).__name__}; expected artifacts or settings"
        )


def describe(output: Artifact | None) -> dict[str, Any] | None:
    """An artifact as the journal has it."""
    if output is None:
        return None
    manifest = output.manifest()
    return {
        "kind": output.kind,
        "artifact": output.digest,
        "rows": manifest["rows"],
        "bytes": manifest["bytes"],
        "created": manifest["created"],
        "path": output.path,
        "statistics": manifest["statistics"],
    }


def _report_waiting(run: Run, label: str) -> None:
    why = "waiting: another run is making the same thing"
    run.show(lambda display: display.step_progressed(label, why, 0, None, ""))


def _prefect_task_run(run: Run) -> str | None:
    if not run.in_prefect:
        return None
    from prefect.runtime import task_run

    return str(task_run.id) if task_run.id else None
