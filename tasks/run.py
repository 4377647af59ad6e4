"""The active run of this process: its home, journal and displays, and how a step reports metrics and progress.

A process has one active run at a time. Outside a run (a unit test that calls a step's function) `progress` and `metric`
do nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, cast

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.history import Made, made_upstream, read_makers
from eclectus.storage.step_keys import KnownKeys, Record

T = TypeVar("T")
MOST_FAULTS = 3
C = TypeVar("C", bound=contextlib.AbstractContextManager)


class Display(Protocol):
    """Where a user follows the run: the terminal, or the Prefect UI."""

    def step_began(self, label: str) -> None: ...

    def step_progressed(self, label: str, what: str, done: float, total: float | None, unit: str) -> None: ...

    def step_ended(self, label: str, state: str, reason: str, seconds: float, output: Artifact | None) -> None: ...

    def notified(self, name: str, text: str) -> None:
        """A message of the run: a decision with its reason, or a warning. name: title of the Prefect artifact."""

    def linked(self, name: str, address: str, what: str) -> None:
        """A link to open in a browser; shown once per run."""


class StepCalls(Protocol):
    """What answers the calls of a run's steps instead of the steps (tasks/lookup.py).

    writes: whether it may write into the home. actions: what is done if the run does nothing else. checks: of inputs.
    """

    writes: ClassVar[bool]
    actions: list[Callable[[Run], None]]
    checks: list[Callable[[], None]]

    def call(self, run: Run, step: Any, label: str, arguments: dict[str, Any]) -> Artifact: ...

    def find(self, digest: str) -> Artifact | None:
        """The artifact of this digest if the store does not have it yet."""


@dataclass
class Run:
    """One run. id: its name in the lineage. flow: the flow that is now calling steps. interrupted: by Ctrl-C.

    step, label: of the step that is running. states: by label. results: of flows, by name and parameters.
    faults: of displays, by name. prefect_answers: whether Prefect's server, if any, is there (its client asks a dead
    one for a minute at every call). lookup: set while keys are only looked up (tasks/lookup.py). services: what was
    started for the run, ended after its displays. read: what was read from the lineage, by name. remote_seconds: CPU
    seconds of parts that Ray's workers computed.
    """

    id: str
    home: Home
    journal: Journal
    known: KnownKeys
    displays: list[Display] = field(default_factory=list)
    flow: str = ""
    in_prefect: bool = False
    interrupted: bool = False
    prefect_flow_run: str | None = None
    step: str | None = None
    label: str = ""
    states: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, contextlib.AbstractContextManager[Any]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    prefect_answers: Callable[[], bool] = lambda: True
    lookup: StepCalls | None = None
    services: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    read: dict[str, Any] = field(default_factory=dict)
    remote_seconds: float = 0.0
    _made: dict[str, dict[str, Any]] = field(default_factory=dict)
    _reused: dict[str, dict[str, Any]] = field(default_factory=dict)

    def show(self, act: Callable[[Display], None]) -> None:
        """Calls every display. None of them can end the run: a fault is logged, after MOST_FAULTS it is left out."""
        for display in list(self.displays):
            self.show_on(display, act)

    def show_on(self, display: Display, act: Callable[[Display], None]) -> None:
        """Calls one display, as `show` does; one that needs Prefect only while that answers."""
        if getattr(display, "needs_prefect", False) and not self.prefect_answers():
            return
        try:
            act(display)
        except Exception as error:
            name = type(display).__name__
            self.faults[name] += 1
            if self.faults[name] >= MOST_FAULTS:
                self.displays.remove(display)
            left = "; it is left out from now on" if display not in self.displays else ""
            logging.getLogger("eclectus").warning("%s could not show this (%s)%s", name, error, left)

    def show_lookup(self, label: str | None) -> None:
        """Shows which step is being looked up on displays that can; None: the look-up has ended."""
        for display in self.displays:
            if looking_up := getattr(display, "looking_up", None):
                self.show_on(display, lambda _: looking_up(label))

    @property
    def shown_in_prefect(self) -> bool:
        """Whether calls of steps and flows are shown in Prefect now."""
        return self.in_prefect and self.lookup is None and self.prefect_answers()

    def find(self, kind: str, digest: str) -> Artifact:
        """An artifact of the store, or one that a plan expects. Raises EclectusError when there is none."""
        planned = self.lookup.find(digest) if self.lookup else None
        return planned or self.home.store.find(f"{kind}-{digest}")

    def upstream(self, checkpoints: Iterable[Artifact]) -> dict[str, Made]:
        """By digest, what these were made from and they themselves, inputs before outputs: lineage is read once.

        What this run made or reused meanwhile is known from its own steps.
        """
        known = self.once_read("makers", lambda: read_makers(self.home, self.writes))
        return made_upstream({**self._reused, **known, **self._made}, [each.digest for each in checkpoints])

    def note_maker(self, record: Record, label: str, output: Artifact, made: bool) -> None:
        """Records the step that made an artifact of this run, or with which it was reused."""
        # As in the lineage: what trained a checkpoint says more than that it was copied.
        makers = self._made if made and record.step != "fetch" else self._reused
        makers[output.digest] = {
            "kind": output.kind, "step": "", "name": record.step, "label": label, "settings": record.settings,
            "inputs": {name: value.partition("-")[2] for name, value in record.inputs.items()}, "statistics": {},
        }  # fmt: skip

    def once_read(self, name: str, read: Callable[[], T]) -> T:
        """What `read` returns, called once per run and name: opening the lineage takes a tenth of a second and more."""
        if name not in self.read:
            self.read[name] = read()
        return cast(T, self.read[name])

    def act(self, action: Callable[[Run], None]) -> None:
        """Calls `action` with this run: now, or when a look-up has found that nothing is to be done."""
        if self.lookup is not None:
            self.lookup.actions.append(action)
        else:
            action(self)

    @property
    def writes(self) -> bool:
        """Whether the home may be written: not by a plan."""
        return self.lookup is None or self.lookup.writes

    def forget_lookup(self) -> None:
        """Drops what flows returned and steps were found to have made in a look-up that found work."""
        self.results.clear()
        self._reused.clear()
        self.read.pop("decisions", None)

    def keep(self, name: str, make: Callable[[], C]) -> C:
        """The resource of this name: made on first use, closed when the run ends (a group of workers, for example)."""
        if name not in self.kept:
            self.kept[name] = make()
        return cast(C, self.kept[name])  # The name stands for one type: that of its `make`.

    def close_kept(self, error: BaseException | None) -> None:
        """Closes what `keep` made, latest first. error: that ended the run; passed to every `__exit__`."""
        for resource in reversed(self.kept.values()):
            resource.__exit__(type(error) if error else None, error, None)
        self.kept.clear()


_current: Run | None = None


def current_run() -> Run | None:
    return _current


def require_run(what: str, instead: str = "") -> Run:
    """The active run. Raises EclectusError if there is none.

    what: the call that needs a run, for the message. instead: an alternative, as ", or ...".
    """
    if _current is None:
        raise EclectusError(f"{what} was called outside a run; use eclectus.flows.run.open_run{instead}")
    return _current


@contextlib.contextmanager
def activate(run: Run) -> Iterator[Run]:
    """Makes `run` the active run of this process for the block."""
    global _current
    previous, _current = _current, run
    try:
        yield run
    finally:
        _current = previous


@dataclass
class Outcome:
    """What became of a call that Prefect makes: whether it began, and its result or error once it ended."""

    began: bool = False
    ended: bool = False
    result: Any = None
    error: Exception | None = None

    def of(self, act: Callable[[], T]) -> T:
        """Calls `act`."""
        self.began = True
        try:
            result = act()
        except Exception as error:
            self.error = error
            raise
        self.ended, self.result = True, result
        return result


def undisturbed(call: Callable[[], T], outcome: Outcome, act: Callable[[], T]) -> T:
    """What `act` returns or raises, called by `call`, which shows it in Prefect, whatever becomes of Prefect's server.

    outcome: of `act`, if `call` came to it. If it did not, `act` is called without Prefect.
    """
    try:
        shown = call()
    except Exception as fault:
        if outcome.error is None:
            if outcome.began and not outcome.ended:
                # It was interrupted.
                raise
            logging.getLogger("eclectus").warning("Prefect cannot show this (%s: %s)", type(fault).__name__, fault)
            return cast(T, outcome.result) if outcome.ended else act()
    if outcome.error is not None:
        # Also where the call raised nothing: a task that failed with a sentence returns its state.
        raise outcome.error
    return shown


def metric(name: str, value: float, at_step: int | None = None, **tags: str) -> None:
    """Journals one metric of the running step. tags: what it was measured on (language="el", domain="code")."""
    if _current is not None and _current.step is not None:
        _current.journal.metric(_current.step, name, float(value), at_step, tags)


def progress(total: float | None, what: str, unit: str) -> Callable[[float], None]:
    """A function to call with the amount done so far:

    report_progress = progress(len(docs), "embedding", "documents")
    report_progress(64)
    """
    run, label = _current, _current.label if _current else ""

    def report_progress(done: float) -> None:
        if run:
            run.show(lambda display: display.step_progressed(label, what, done, total, unit))

    return report_progress


def notify(name: str, text: str) -> None:
    """Shows a message on all displays: a decision with its reason, or a warning. name: of the Prefect artifact."""
    if _current:
        _current.act(lambda run: run.show(lambda display: display.notified(name, text)))


def track(items: Iterable[T], total: int | None, what: str, unit: str) -> Iterator[T]:
    """Yields the items and reports progress after each."""
    report_progress = progress(total, what, unit)
    for done, item in enumerate(items, 1):
        yield item
        report_progress(done)


def describe(value: Any) -> str:
    """A number in short form: 12_345_678 -> '12.3M'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:g}" if isinstance(value, int) else f"{value:.1f}"
