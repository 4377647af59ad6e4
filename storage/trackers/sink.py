"""One tracker of a run: what is still to be told to it, what was told, and what happens when it is gone.

What a tracker has taken is noted below the home's `trackers/told/`, so that a run that goes on, or is fed again, adds
what is missing and nothing twice. When it raises, that is said once, and it is tried again after a while: the journal
keeps what it misses.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eclectus.storage.atomic_write import write_atomically
from eclectus.storage.secrets import scrub
from eclectus.storage.trackers.tracker import Page, Point, Refused, Table, TrackedRun, Tracker

FIRST_WAIT = 10.0
LONGEST_WAIT = 300.0
NO_STEP = -1


@dataclass
class _Told:
    """What a tracker was told of a run. step: the last training step. names: of that step's numbers.

    parts: steps of the lineage, by id.
    """

    step: int = NO_STEP
    names: set[str] | None = None
    parts: set[str] = field(default_factory=set)

    def takes(self, point: Point) -> bool:
        """Whether a number of a training is news: a training that resumes logs some steps again."""
        if point.step is None or point.step < self.step:
            return False
        if point.step > self.step:
            self.step, self.names = point.step, {point.name}
            return True
        # An earlier process told all numbers of its last step.
        if self.names is None or point.name in self.names:
            return False
        self.names.add(point.name)
        return True


@dataclass
class _Call:
    """One call that is still to be made. part: of the run, which is noted once the last of its calls is made."""

    run: TrackedRun
    points: list[Point] = field(default_factory=list)
    table: Table | None = None
    page: Page | None = None
    ends: str = ""
    part: str = ""


class Sink:
    """Feeds one tracker. told: numbers that it took. place: where to look; empty without its library."""

    def __init__(
        self, name: str, make: Callable[[], Tracker], notes: Path, say: Callable[[str], None], again: str
    ) -> None:
        """make: opens the library. say: told a sentence for people. again: the command that sends what was missed."""
        self.name, self.told, self.place = name, 0, ""
        self._say, self.again = say, again
        self._tracker: Tracker | None = None
        self._offered: dict[str, _Told] = {}
        self._open: set[str] = set()
        self._calls: list[_Call] = []
        self._wait, self._next, self._complained = FIRST_WAIT, 0.0, False
        try:
            self._tracker = make()
            self.place = scrub(self._tracker.place)
        except ImportError as error:
            say(f"{name} gets nothing: {error}; pip install 'eclectus[{name}]'")
        except Exception as error:
            # A library may raise anything for a variable that it cannot read.
            say(f"{name} gets nothing: {_first_line(error)}")
        self._notes = notes / f"{name}-{hashlib.sha256(self.place.encode()).hexdigest()[:12]}"

    def log(self, run: TrackedRun, point: Point) -> None:
        """One number of a training; what was told before is left out."""
        if self._tracker is None or not self._offers(run).takes(point):
            return
        last = self._calls[-1] if self._calls else None
        if last is not None and last.run == run and last.points and not last.part:
            last.points.append(point)
        else:
            self._calls.append(_Call(run, points=[point]))

    def part(self, run: TrackedRun, part: str, points: list[Point], tables: list[Table], pages: list[Page]) -> None:
        """Everything that a step of the run gives it at its end. part: the step's id."""
        if self._tracker is None or part in self._offers(run).parts:
            return
        self._offers(run).parts.add(part)
        calls = [_Call(run, points=points)] if points else []
        calls += [_Call(run, table=table) for table in tables] + [_Call(run, page=page) for page in pages]
        for call in calls:
            call.part = part
        self._calls += calls

    def open(self, run: TrackedRun) -> None:
        """Makes a run known that has nothing to say yet."""
        if run.id not in self._open and not any(call.run == run for call in self._calls):
            self._calls.append(_Call(run))

    def end(self, run: TrackedRun, state: str) -> None:
        if run.id in self._open or any(call.run == run for call in self._calls):
            self._calls.append(_Call(run, ends=state))

    def flush(self, now: bool = False) -> None:
        """Makes the calls that are due. now: also while the tracker is left alone because it was gone."""
        if self._tracker is None or not (now or time.monotonic() >= self._next):
            return
        try:
            while self._calls:
                self._make(self._tracker, self._calls[0])
                self._note(self._calls.pop(0))
        except Exception as error:
            # Whatever a library raises when its server is gone; the other trackers are fed all the same.
            self._next, self._wait = time.monotonic() + self._wait, min(2 * self._wait, LONGEST_WAIT)
            if not self._complained:
                self._complained = True
                self._say(
                    f"{self.name} at {self.place} takes nothing now ({_first_line(error)}); the run goes on, "
                    f"and what it misses is sent when it answers again, or with: {self.again}"
                )
        else:
            self._wait = FIRST_WAIT

    def close(self) -> int:
        """Makes the last calls; returns how many numbers were not told."""
        self.flush(now=True)
        if self._tracker is not None and not self._calls:
            self._tracker.close()
        return sum(len(call.points) for call in self._calls)

    def _make(self, tracker: Tracker, call: _Call) -> None:
        run = call.run
        try:
            if run.id not in self._open:
                if call.ends:
                    return
                known = self._told(run.id)
                tracker.begin(run, resumed=known.step > NO_STEP or bool(known.parts))
                self._open.add(run.id)
            if call.points:
                tracker.log(run, call.points)
                self.told += len(call.points)
            if call.table:
                tracker.table(run, call.table)
            if call.page:
                tracker.page(run, call.page)
            if call.ends:
                tracker.end(run, call.ends)
                self._open.discard(run.id)
        except Refused as error:
            self._say(f"{self.name} at {self.place} does not take a part of {run.name}: {_first_line(error)}")

    def _offers(self, run: TrackedRun) -> _Told:
        if run.id not in self._offered:
            self._offered[run.id] = self._told(run.id)
        return self._offered[run.id]

    def _told(self, run: str) -> _Told:
        """As it was noted last."""
        try:
            noted = json.loads((self._notes / f"{run}.json").read_text())
            return _Told(int(noted["step"]), parts=set(noted["parts"]))
        except (OSError, ValueError, LookupError, TypeError):
            return _Told()

    def _note(self, call: _Call) -> None:
        """Notes what a call told, of a part after its last call."""
        followed = bool(self._calls) and self._calls[0].part == call.part
        told = call.points or call.table or call.page
        if not told or (call.part and followed):
            return
        known = self._told(call.run.id)
        if call.part:
            known.parts.add(call.part)
        else:
            known.step = max(known.step, *(each.step or 0 for each in call.points))
        self._notes.mkdir(parents=True, exist_ok=True)
        content = {"step": known.step, "parts": sorted(known.parts)}
        write_atomically(self._notes / f"{call.run.id}.json", json.dumps(content))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return scrub(f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__)
