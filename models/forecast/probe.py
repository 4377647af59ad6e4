"""Seconds of a training step on this machine, measured in seconds: the real objective on random tokens.

    step = (k - 1) survey + k micro-batch + update + exchange         k micro-batches in each process
    micro-batch   forward and backward of the objective, batch and length as in the training
    survey        the passes without gradients that a balance loss asks for
    update        clipping, AdamW, gradients dropped; by parameter that trains
    exchange      gradients between processes (DDP), by byte

A sharded job is measured sharded, over the processes that measure: micro-batch and survey then gather weights and share
gradients out, and the update is of a process's share.
A small model is measured whole, a large one by cuts of it with a few layers (models/forecast/cut.py). Weights are
random and belong to the probe, which uses no global random state: no bit of the training changes. All processes of a
group measure at the same time, as they will train. Cost: 4 to 20 seconds and the memory of the cut.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from eclectus.models.forecast.cut import Cuts, cut, drawn, layers_of
from eclectus.models.forecast.job import Job
from eclectus.models.losses.step import Step
from eclectus.models.training.loop import prepare
from eclectus.models.training.optimizer import make_optimizer, set_rate
from eclectus.models.training.precision import FrozenWeights, autocast
from eclectus.models.training.process import Process
from eclectus.models.training.repeatable import switch_off_randomness

TURNS = 4
# A whole model is measured if its micro-batch takes no longer than this; of a cut as many instances as this allows.
SHORT, LONG = 1.0, 3.0
MORE_LAYERS = 2
EXCHANGED, WRITTEN = 4 * 2**20, 16 * 2**20


@dataclass(frozen=True)
class Turn:
    """Seconds of the parts of a step. trained: parameters that the update was of."""

    micro: float
    survey: float
    update: float
    trained: int


@dataclass(frozen=True)
class Measured:
    """Seconds. micro: of a micro-batch. update: of AdamW. exchange: of one all-reduce of all gradients, per byte.

    written, hashed: to write (and hash) a byte of a checkpoint, and to hash one. layers: of the model's, measured ones.
    cpu: of CPU cores, of one process, where the others are on the clock.
    """

    micro: float
    survey: float
    update: float
    cpu: Turn
    exchange: float
    written: float
    hashed: float
    layers: int


def measure(job: Job, process: Process, folder: Path | None = None) -> Measured:
    """Measures a job on this process's device. All processes of the group must call it; each gets the slowest's.

    folder: where checkpoints will be written, whose disk is tried; None: a temporary one.
    """
    cuts, layers = Cuts.of(job.model, MORE_LAYERS), len(layers_of(job.model))
    shorter = _with(job, cut(job.model, cuts.one))
    one_row = _slowest(_timed(_rows(shorter, 1), process, 1)[0].micro, process)
    if one_row * job.micro_batch * layers / len(cuts.one) <= SHORT:
        turns, measured = _timed(job, process, TURNS), layers
    else:
        rows = min(job.micro_batch, max(1, int(LONG / one_row)))
        one = _timed(_rows(shorter, rows), process, TURNS)
        more = {
            kind: _timed(_rows(_with(job, cut(job.model, kept)), rows), process, TURNS)
            for kind, kept in cuts.more.items()
        }

        def joined(at: int) -> Turn:
            longer = {kind: each[at] for kind, each in more.items()}
            return _joined(cuts, one[at], longer, job.micro_batch / rows)

        turns = joined(0), joined(1)
        measured = max([len(cuts.one), *map(len, cuts.more.values())])
    trained = sum(each.numel() for each in job.model.parameters() if each.requires_grad)
    wall, cpu = (_of_slowest(turn, trained, process) for turn in turns)
    exchange, written, hashed = (_slowest(value, process) for value in [_exchange(process), *_stored(folder)])
    return Measured(wall.micro, wall.survey, wall.update, cpu, exchange, written, hashed, measured)


def _of_slowest(turn: Turn, trained: int, process: Process) -> Turn:
    """The parts as the slowest process took them, with an update of so many parameters."""
    update = turn.update * trained / max(1, turn.trained)
    micro, survey, update = (_slowest(value, process) for value in (turn.micro, turn.survey, update))
    return Turn(micro, survey, update, trained)


def _with(job: Job, model: nn.Module) -> Job:
    return dataclasses.replace(job, model=model)


def _rows(job: Job, rows: int) -> Job:
    return dataclasses.replace(job, plan=dataclasses.replace(job.plan, micro_batch=rows))


def _joined(cuts: Cuts, one: Turn, more: dict[Any, Turn], times: float) -> Turn:
    micro = cuts.whole(one.micro, {kind: each.micro for kind, each in more.items()}) * times
    survey = cuts.whole(one.survey, {kind: each.survey for kind, each in more.items()}) * times
    largest = max([one, *more.values()], key=lambda each: each.trained)
    return Turn(micro, survey, largest.update, largest.trained)


def _timed(job: Job, process: Process, turns: int) -> tuple[Turn, Turn]:
    """Medians over some turns, of which the first does not count: on the clock, and of CPU cores."""

    def hold(model: nn.Module) -> None:
        if job.held:
            FrozenWeights(model, {})

    model = drawn(job.model).make(process, job.sharded, hold, job.sharded and job.held)
    switch_off_randomness(model)
    model.train()
    prepare(model, job.plan, process)
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = make_optimizer(named, job.plan)
    set_rate(optimizer, job.plan.learning_rate)
    found = [_turn(job, model, named, optimizer, process) for _ in range(turns + 1)][1:]
    trained = sum(each.numel() for each in named.values())
    del model, named, optimizer
    gc.collect()

    def median(at: int) -> Turn:
        micro, survey, update = (statistics.median(part[at] for part in parts) for parts in zip(*found, strict=True))
        return Turn(micro, survey, update, trained)

    return median(0), median(1)


def _turn(
    job: Job, model: nn.Module, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, process: Process
) -> tuple[tuple[float, float], ...]:
    """(micro-batch, survey, update) of one step of two micro-batches, of which one has gradients, as `_Clock.lap`."""
    process.barrier()
    clock = _Clock(process.device)
    alone = Process(device=process.device)
    parts = Step(job.asked, [job.batch(0)] * min(2, job.micro_batches), alone)
    with autocast(process.device, job.precision):
        parts.survey(model)
    survey = clock.lap()
    with autocast(process.device, job.precision):
        loss, terms = parts.measure(model, 0)
    loss.backward()
    del loss, terms
    micro = clock.lap()
    nn.utils.clip_grad_norm_(named.values(), job.plan.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return micro, survey, clock.lap()


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last call: on the clock, and of CPU cores."""
        before, self._last = self._last, self._now()
        return self._last[0] - before[0], self._last[1] - before[1]


def _exchange(process: Process) -> float:
    """Seconds per byte of an all-reduce."""
    if process.world == 1:
        return 0.0
    buffer, taken = torch.zeros(EXCHANGED // 4, device=process.device), []
    for _ in range(TURNS):
        process.barrier()
        clock = _Clock(process.device)
        dist.all_reduce(buffer)
        taken.append(clock.lap()[0])
    # What is longer is a wait for a process that was late, which the micro-batch of that process has counted.
    return min(taken) / EXCHANGED


def _stored(folder: Path | None) -> tuple[float, float]:
    """Seconds per byte of a checkpoint: written, synced and hashed; and hashed alone."""
    content = os.urandom(WRITTEN)
    begun = time.perf_counter()
    hashlib.sha256(content).digest()
    hashed = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # Where it counts, the error says so.
        hashed = time.perf_counter()
    return (time.perf_counter() - begun) / WRITTEN, (hashed - begun) / WRITTEN


def _slowest(value: float, process: Process) -> float:
    return max(process.gather(value))


def step_cpu_seconds(job: Job, measured: Measured) -> float:
    """Seconds of CPU cores that all processes take for a step."""
    cpu = measured.cpu
    micro = job.micro_batches * cpu.micro + (job.micro_batches - 1) * cpu.survey
    return job.world * (micro + cpu.update)


def step_seconds(job: Job, measured: Measured, gradient_bytes: int) -> dict[str, float]:
    """Seconds of one step of a job, by what takes them. gradient_bytes: of the whole model."""
    return {
        "micro_batches": job.micro_batches * measured.micro,
        "survey": (job.micro_batches - 1) * measured.survey,
        "update": measured.update,
        "exchange": 0.0 if job.sharded else measured.exchange * gradient_bytes,
    }


def checkpoint_seconds(job: Job, measured: Measured, trained: int, frozen_bytes: int) -> float:
    """Seconds that all checkpoints for resuming take: weights and moments are written, frozen weights hashed."""
    count = (job.steps - 1) // job.plan.checkpoint_every
    shared = 12 * trained / (job.world if job.sharded else 1)
    return count * (measured.written * shared + (measured.hashed * frozen_bytes if job.checks_frozen else 0.0))
