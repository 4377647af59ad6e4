"""Forecasts of all trainings of a flow, for this machine or for GPUs of a type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.models.forecast.fit import Room
    from eclectus.models.forecast.forecast import Forecast
    from eclectus.models.forecast.job import Job
    from eclectus.models.forecast.simulation import Simulated

# Of a process that trains on a GPU, before it has the model: Python, PyTorch with CUDA.
GPU_HOST_PROGRAM = 3 * 2**30


@dataclass(frozen=True)
class Estimate:
    """fault: why the training does not fit, and what would make it fit; None where it fits."""

    label: str
    forecast: Forecast
    fault: str | None


def estimate_here(jobs: list[tuple[str, Job]], threads: int | None, on: Callable[[str], None]) -> list[Estimate]:
    """For this machine, by probes of some seconds. threads: of each worker. on: called with each label before."""
    import torch

    from eclectus.models.forecast.fit import room_of_machine
    from eclectus.models.forecast.forecast import simulated_forecast, with_seconds
    from eclectus.models.forecast.fork import ProbeFailed, measure_here
    from eclectus.models.forecast.memory import memory_of, program_bytes
    from eclectus.models.forecast.simulation import simulate

    found, threads = [], threads or torch.get_num_threads()
    # A process that has computed with several threads cannot be forked.
    torch.set_num_threads(1)
    for label, job in jobs:
        on(label)
        simulated = simulate(job)
        forecast = simulated_forecast(job, simulated, program_bytes())
        fault = _fault(job, forecast, room_of_machine(job.world))
        if fault is None:
            try:
                measured, program = measure_here(job, threads)
            except ProbeFailed as error:
                raise EclectusError(f"{label}: {error}") from error
            forecast = dataclasses.replace(forecast, memory=memory_of(job, simulated, program))
            forecast = with_seconds(forecast, job, simulated, measured)
        found.append(Estimate(label, forecast, fault))
    return found


def estimate_on(jobs: list[tuple[str, Job]], gpu_type: str, on: Callable[[str], None]) -> list[Estimate]:
    """For GPUs of a type, as many as the jobs have workers, by what their makers say of them."""
    from eclectus.models.forecast.fit import Room
    from eclectus.models.forecast.forecast import simulated_forecast
    from eclectus.models.forecast.gpus import gpu_named
    from eclectus.models.forecast.memory import DEVICE_PROGRAM
    from eclectus.models.forecast.roofline import step_on
    from eclectus.models.forecast.simulation import simulate

    try:
        gpu = gpu_named(gpu_type)
    except ValueError as error:
        raise EclectusError(str(error)) from error
    found = []
    for label, job in jobs:
        on(label)
        simulated = simulate(job)
        host = GPU_HOST_PROGRAM + (0 if job.sharded else simulated.parameters)
        forecast = simulated_forecast(job, simulated, DEVICE_PROGRAM, host)
        seconds = job.steps * step_on(gpu, job, simulated, forecast.parameters)
        forecast = dataclasses.replace(forecast, seconds=seconds, by=gpu_type)
        room = Room(int(gpu.memory * 2**30), f"a GPU of type {gpu_type}")
        found.append(Estimate(label, forecast, _fault(job, forecast, room)))
    return found


def _fault(job: Job, forecast: Forecast, room: Room) -> str | None:
    from eclectus.models.forecast.fit import check_fit
    from eclectus.models.forecast.memory import memory_of
    from eclectus.models.forecast.simulation import simulate

    def needs(changed: Job) -> int:
        if changed is job:
            return forecast.memory.total
        simulated: Simulated = simulate(changed)
        return memory_of(changed, simulated, forecast.memory.program).total

    return check_fit(job, needs, room)


def row_of(estimate: Estimate) -> dict[str, Any]:
    """For a table or JSON."""
    values = estimate.forecast.values()
    memory = values.pop("memory_by")
    seconds = {f"{name}_seconds": value for name, value in values.pop("seconds_by").items()}
    return {"training": estimate.label, **values, **seconds, **memory, "fault": estimate.fault}
