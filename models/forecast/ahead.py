"""What a training stage says before its first step, and what came true of it at the end.

    ahead = look_ahead(job, process, report, work)     reports "forecast"; raises TrainingFailed where it does not fit
    with ahead:
        train(..., ahead.report)                       at the end reports "came_true"

Short trainings are not forecast ("auto"): a probe of seconds would cost more than it tells. Whether one is short is
seen from its FLOPs, at 30% of what the device can do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from eclectus.models.forecast.fit import check_fit, gigabytes, room_here
from eclectus.models.forecast.forecast import Forecast, simulated_forecast, with_seconds
from eclectus.models.forecast.job import Job
from eclectus.models.forecast.memory import DEVICE_PROGRAM, memory_of, program_bytes
from eclectus.models.forecast.peak import Peak
from eclectus.models.forecast.probe import measure
from eclectus.models.forecast.simulation import simulate
from eclectus.models.training.process import Process
from eclectus.models.training.resume import TrainingFailed
from eclectus.models.training.throughput import peak_flops

Wanted = Literal["auto", "always", "never"]
SHORT_TRAINING, UTILISATION = 60.0, 0.3
Report = Callable[..., None]


class Ahead:
    """Passes reports of a training on, and measures it from entry to exit. forecast: None where there is none."""

    def __init__(self, forecast: Forecast | None, process: Process, report: Report) -> None:
        self.forecast = forecast
        self._process, self._passed = process, report
        self._first: int | None = None
        self._done = 0

    def report(self, kind: str, **values: Any) -> None:
        if kind == "progress":
            self._done = values["done"]
            self._first = self._done if self._first is None else self._first
        self._passed(kind, **values)

    def __enter__(self) -> Self:
        self._peak, self._begun = Peak(self._process.device), (time.monotonic(), time.process_time())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None or self.forecast is None:
            return
        seconds, cpu = time.monotonic() - self._begun[0], time.process_time() - self._begun[1]
        cpu = sum(self._process.gather(cpu))
        host, device = (_most(self._process.gather(each)) for each in self._peak.read())
        # A training that resumed did not take all of its steps here.
        steps = 0 if self._first is None else self._done - self._first + 1
        memory = host if device is None else device
        self._passed(
            "came_true",
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu, 3),
            steps=steps,
            memory=memory,
            host=0 if device is None else host or 0,
        )


def _most(values: list[int | None]) -> int | None:
    return max((each for each in values if each is not None), default=None)


def look_ahead(
    job: Job,
    process: Process,
    report: Report,
    work: Path,
    step_flops: int,
    values: Mapping[str, Any] | None = None,
    wanted: Wanted = "auto",
) -> Ahead:
    """The forecast of a stage, reported, before its model is made. All processes must call it.

    step_flops: of a step of all processes. values: of the model's blueprint, some of which are in memory already. work:
    where checkpoints are written. Raises TrainingFailed, in all processes, for a training that this machine or GPU has
    not the memory for.
    """
    if wanted == "never" or (wanted == "auto" and is_short(job, process, step_flops)):
        return Ahead(None, process, report)
    on_gpu, resident = process.device.type == "cuda", max(process.gather(program_bytes(dict(values or {}))))
    program = DEVICE_PROGRAM if on_gpu else resident
    simulated = simulate(job)
    # The model is made on the host before it moves to its GPU.
    host = resident + (0 if job.sharded else simulated.parameters) if on_gpu else 0
    forecast = simulated_forecast(job, simulated, program, host)
    _check(job, forecast, process, report)
    work.mkdir(parents=True, exist_ok=True)
    measured = measure(job, process, work)
    if not on_gpu:
        # What the probe has loaded and warmed stays.
        program = max(program, max(process.gather(program_bytes(dict(values or {})))))
        forecast = dataclasses.replace(forecast, memory=memory_of(job, simulated, program))
    forecast = with_seconds(forecast, job, simulated, measured)
    report("forecast", values=forecast.values(), words=forecast.words())
    return Ahead(forecast, process, report)


def is_short(job: Job, process: Process, step_flops: int) -> bool:
    """Whether the training is so short that it is not forecast; the same in all processes."""
    seconds = step_flops * job.steps / (UTILISATION * peak_flops(process.device) * job.world)
    return bool(max(process.gather(seconds)) < SHORT_TRAINING)


def _check(job: Job, forecast: Forecast, process: Process, report: Report) -> None:
    room = room_here(process)

    def needs(changed: Job) -> int:
        if changed is job:
            return forecast.memory.total
        return memory_of(changed, simulate(changed), forecast.memory.program).total

    # The fix is looked for once; all processes end with it.
    fault = process.gather(check_fit(job, needs, room) if process.is_main else None)[0]
    if fault:
        raise TrainingFailed(fault)
    if process.device.type == "cpu" and process.is_main:
        free = psutil.virtual_memory().available
        wanted = job.world * (forecast.memory.total - forecast.memory.program)
        if wanted > free:
            report(
                "warning",
                text=f"the training takes about {gigabytes(wanted)} of memory, and {gigabytes(free)} are free now",
            )
