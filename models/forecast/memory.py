"""Bytes of a process at its fullest moment, by what they hold, and of the disk.

program        Python, PyTorch and what else is there before the model; pages of the instances
parameters     4 bytes each; 2 where frozen ones are held in bfloat16
gradients      4 bytes for each parameter that trains: kept by DDP and over several micro-batches; of sums in a fixed
               order some copies (models/elastic/fixed_sums.py)
moments        AdamW's, 8 bytes for each
activations    what autograd keeps of a micro-batch, and temporaries beside it (models/forecast/simulation.py)
gathered       FSDP's: weights of a layer, and of what is in none, while they are whole
holes          of the C library's heap, in which blocks below 32 MB lie: three fifths of them (docs/benchmarks.md)
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass

import psutil

from eclectus.models.elastic.fixed_sums import copies_held
from eclectus.models.forecast.job import Job
from eclectus.models.forecast.simulation import Simulated
from eclectus.models.sharding.slices import InMemory
from eclectus.models.training.instances import RESIDENT_BYTES
from eclectus.models.training.process import trim_heap

HOLES = 0.6
# Of a process before it has a model, on a GPU: contexts and kernels. Its allocator keeps a share more than is in use.
DEVICE_PROGRAM, DEVICE_HOLES = 700 * 2**20, 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, at its fullest moment."""

    program: int
    parameters: int
    gradients: int
    moments: int
    activations: int
    gathered: int
    holes: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def memory_of(job: Job, simulated: Simulated, program: int) -> Memory:
    """Memory on the device that trains. program: bytes of the process before it has the model."""
    share = job.world if job.sharded else 1
    gradients, moments = simulated.gradients, simulated.moments // share
    if job.plan.fixed_sums:
        gradients *= copies_held(job.micro_batches)
    several, on_cpu = job.micro_batches > 1, job.device.type == "cpu"
    if job.sharded:
        activations, gathered = simulated.activations, _gathered(job, simulated)
        # With training_shard_reduce step the whole gradient of several micro-batches is added up before it is shared.
        gradients = gradients if several and job.plan.reduced_once else gradients // share
    elif several or job.world > 1:
        activations, gathered = simulated.activations, 0
    else:
        activations, gathered = simulated.growing - gradients, 0
    held = gradients + moments + activations
    if on_cpu:
        small = simulated.small + (0 if job.sharded else 8 * simulated.trained_small)
        # Sharded training gives freed memory back (models/training/process.py).
        holes = 0 if job.sharded else int(HOLES * min(small, held))
    else:
        holes = int(DEVICE_HOLES * (held + simulated.parameters // share))
    pages = min(RESIDENT_BYTES, job.data_bytes) if on_cpu else 0
    return Memory(program + pages, simulated.parameters // share, gradients, moments, activations, gathered, holes)


def _gathered(job: Job, simulated: Simulated) -> int:
    """What is whole at once: the root's weights, and of a layer its weights, gradients, and the copies of both that are
    exchanged (as measured on gloo: docs/benchmarks.md); on a GPU also the next layer's weights.

    In bfloat16 all of that is of half the bytes, but for the copy of gradients. What is held in it is so already.
    """
    copies = 4.0 if job.device.type == "cpu" else 5.0
    if job.precision == "bfloat16" and not job.held:
        copies = (copies + 1) / 2
    return simulated.root + int(copies * simulated.layer)


def disk_of(job: Job, simulated: Simulated, whole_parameters: int) -> int:
    """Bytes on disk: the checkpoint that is written, and two for resuming, of which one is being written.

    whole_parameters: of the model.
    """
    final = 4 * whole_parameters + (simulated.moments if job.keeps_moments else 0)
    resumable = 24 * simulated.trained if job.steps > job.plan.checkpoint_every else 0
    return final + resumable


def program_bytes(values: object = None) -> int:
    """Resident bytes of this process now, without those of `values`, a blueprint's, which become the model.

    What is free in its heap is given back first: later stages of a run take it again.
    """
    gc.collect()
    trim_heap()
    held = {
        each.value.untyped_storage().data_ptr(): each.value.untyped_storage().nbytes()
        for each in (values.values() if isinstance(values, dict) else ())
        if isinstance(each, InMemory) and each.value.device.type == "cpu"
    }
    return max(0, psutil.Process().memory_info().rss - sum(held.values()))
