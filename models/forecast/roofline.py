"""Seconds of a training step on GPUs, from what their makers say of them (models/forecast/gpus.py): a roofline.

    operator        the longer of FLOPs / (peak * 0.7) and bytes / (bandwidth * 0.8), at least a kernel's launch
    micro-batch     all operators of forward and backward (models/forecast/simulation.py), so norms and losses count too
    update          AdamW reads and writes 28 bytes for each parameter that trains
    exchange        gradients (DDP: twice their bytes) or weights and gradients (FSDP) over the slowest link; the part
                    that backward does not hide

The shares are what large products and copies reach in practice. Expect the right order and a third either way: the
forecast of a GPU at hand is made by a probe.
"""

from __future__ import annotations

from eclectus.models.forecast.gpus import Gpu
from eclectus.models.forecast.job import Job
from eclectus.models.forecast.simulation import Simulated

COMPUTE, COPY, EXCHANGE, HIDDEN = 0.7, 0.8, 0.7, 0.7
LAUNCH = 6e-6
UPDATE_BYTES = 28


def step_on(gpu: Gpu, job: Job, simulated: Simulated, whole_parameters: int) -> float:
    """Seconds of a training step on `job.world` GPUs. whole_parameters: of the model."""
    peak, bandwidth = gpu.dense * 1e12 * COMPUTE, gpu.bandwidth * 1e9 * COPY
    micro = sum(
        count * max(flops / peak, moved / bandwidth, LAUNCH) for (flops, moved), count in simulated.operators.items()
    )
    share = job.world if job.sharded else 1
    update = UPDATE_BYTES * simulated.trained / share / bandwidth
    compute = job.micro_batches * micro + update
    return compute + max(0.0, _exchange(gpu, job, simulated, whole_parameters) - HIDDEN * compute)


def _exchange(gpu: Gpu, job: Job, simulated: Simulated, whole_parameters: int) -> float:
    if job.world == 1:
        return 0.0
    # Of a ring through all GPUs of a machine, each byte leaves the machine once.
    link = (min(gpu.link, gpu.network) if job.world > gpu.node else gpu.link) * 1e9 * EXCHANGE
    passed = simulated.gradients * 2
    if job.sharded:
        passed = simulated.gradients + 2 * job.micro_batches * 4 * whole_parameters
    return passed * (job.world - 1) / job.world / link
