"""Whether a job fits into memory, and which setting makes it fit."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from eclectus.models.forecast.job import Job
from eclectus.models.training.process import Process

CGROUP = Path("/sys/fs/cgroup/memory.max")
MOST_WORKERS = 4096
# Bytes of the fullest process of a job.
Needs = Callable[[Job], int]


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes for one process of `processes` on a machine or GPU, and what these are, for a message."""

    bytes: int
    what: str


def room_here(process: Process) -> Room:
    """Memory of this machine, or of its GPU, for each of the group's processes on it. All of them must call it."""
    if process.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(process.device)
        return Room(total, "the GPU")
    here = process.gather(socket.gethostname()).count(socket.gethostname())
    return room_of_machine(here)


def room_of_machine(processes: int) -> Room:
    """Memory of this machine for each of some processes; a container's limit counts."""
    total = psutil.virtual_memory().total
    # No container, or one without a limit ("max").
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(CGROUP.read_text()))
    shared = f", shared by {processes} workers" if processes > 1 else ""
    return Room(total // processes, f"this machine with {gigabytes(total)}{shared}")


def check_fit(job: Job, needs: Needs, room: Room) -> str | None:
    """A sentence that says that a job does not fit and which setting changes that; None where it fits."""
    needed = needs(job)
    if needed <= room.bytes:
        return None
    found = next((name for name, changed in _changes(job) if needs(changed) <= room.bytes), None)
    fix = f"{found} would fit" if found else "no number of workers makes it fit: choose a smaller model or length"
    return (
        f"the training does not fit in memory: a process takes about {gigabytes(needed)}, and {room.what} has "
        f"{gigabytes(room.bytes)} for it; {fix}"
    )


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    """Changes of settings, the cheapest first, and the job with each."""
    plan = job.plan

    def changed(world: int = job.world, **plans: object) -> Job:
        return dataclasses.replace(job, world=world, plan=dataclasses.replace(plan, **plans))  # type: ignore[arg-type]

    smaller = job.micro_batch // 2
    while smaller >= 1:
        yield f"micro_batch {smaller}", changed(micro_batch=smaller)
        smaller //= 2
    can_recompute = getattr(job.model, "supports_gradient_checkpointing", False) and not plan.recomputed
    if can_recompute:
        yield "training_recompute true", changed(recomputed=1)
        yield "training_recompute true with micro_batch 1", changed(recomputed=1, micro_batch=1)
    if job.world > 1 and not plan.sharded:
        yield "training_sharded true", changed(sharded=True)
    world = max(2, 2 * job.world)
    while world <= MOST_WORKERS and can_share(job):
        batch = max(world, plan.batch)
        more = f" and a batch of {batch}" if batch % plan.batch or batch > plan.batch else ""
        yield (
            f"training_sharded true with training_workers {world}{more}, each with that memory",
            changed(world, sharded=True, batch=batch, micro_batch=1, recomputed=plan.recomputed or int(can_recompute)),
        )
        world *= 2


def can_share(job: Job) -> bool:
    """Whether the model has layers to shard."""
    return bool(getattr(job.model, "_no_split_modules", None))


def gigabytes(count: float) -> str:
    """Bytes in short form."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.0f} MB"
