"""The forecast of a training: seconds, memory of the fullest process, disk, tokens and FLOPs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclectus.models.forecast.fit import gigabytes
from eclectus.models.forecast.job import Job
from eclectus.models.forecast.memory import Memory, disk_of, memory_of
from eclectus.models.forecast.probe import Measured, checkpoint_seconds, measure, step_cpu_seconds, step_seconds
from eclectus.models.forecast.simulation import Simulated, simulate
from eclectus.models.training.process import Process


@dataclass(frozen=True)
class Forecast:
    """seconds: of all steps and their checkpoints, without start and end of the stage; None where nothing says.

    seconds_by: the same by what takes them. cpu_seconds: of CPU cores, all processes together. by: "probe"
    or the type of a GPU. memory: of the device that trains. host: bytes of the process on the machine of a GPU, 0 on a
    CPU, where that is `memory`. disk: bytes that are written and kept or needed to resume.
    """

    steps: int
    workers: int
    tokens: int
    flops: int
    parameters: int
    trained: int
    seconds: float | None
    seconds_by: dict[str, float]
    cpu_seconds: float | None
    by: str
    memory: Memory
    host: int
    disk: int

    @property
    def step(self) -> float | None:
        """Seconds of one step."""
        return None if self.seconds is None else self.seconds / max(1, self.steps)

    def values(self) -> dict[str, Any]:
        """For a journal: numbers and words by name."""
        memory = dataclasses.asdict(self.memory)
        return {
            **{name: value for name, value in dataclasses.asdict(self).items() if name != "memory"},
            "memory": self.memory.total,
            "memory_by": memory,
        }

    def words(self) -> str:
        """One line."""
        time = (
            "" if self.seconds is None else f"{duration(self.seconds)} ({duration(self.seconds / self.steps)} a step), "
        )
        each = " in each of its processes" if self.workers > 1 else ""
        return f"{time}{gigabytes(self.memory.total)} of memory{each}, {gigabytes(self.disk)} on disk"


def simulated_forecast(job: Job, simulated: Simulated, program: int, host: int = 0) -> Forecast:
    """A forecast without seconds. program: bytes of the process before it has the model; host: on a GPU's machine."""
    parameters = sum(each.numel() for each in job.model.parameters())
    return Forecast(
        steps=job.steps,
        workers=job.world,
        tokens=job.steps * job.plan.batch * job.length,
        flops=job.steps * job.world * job.micro_batches * simulated.flops,
        parameters=parameters,
        trained=simulated.trained,
        seconds=None,
        seconds_by={},
        cpu_seconds=None,
        by="",
        memory=memory_of(job, simulated, program),
        host=host,
        disk=disk_of(job, simulated, parameters),
    )


def with_seconds(forecast: Forecast, job: Job, simulated: Simulated, measured: Measured) -> Forecast:
    """The forecast with what a probe measured."""
    weights = 4 * forecast.parameters
    step = step_seconds(job, measured, simulated.gradients)
    frozen = weights - 4 * simulated.trained
    by = {name: job.steps * seconds for name, seconds in step.items()}
    by["checkpoints"] = checkpoint_seconds(job, measured, simulated.trained, frozen)
    cpu = job.steps * step_cpu_seconds(job, measured) + job.world * by["checkpoints"]
    return dataclasses.replace(forecast, seconds=sum(by.values()), seconds_by=by, cpu_seconds=cpu, by="probe")


def forecast_here(job: Job, process: Process, program: int, folder: Path | None = None) -> Forecast:
    """The forecast for this process's device. All processes of the group must call it."""
    simulated = simulate(job)
    forecast = simulated_forecast(job, simulated, program)
    return with_seconds(forecast, job, simulated, measure(job, process, folder))


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
