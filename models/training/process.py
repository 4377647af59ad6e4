"""A process of a training group: its rank, the number of processes, its device, and their collectives.

Works the same in a plain process, under torchrun and under Ray Train: `torch.distributed` knows the group in all three.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Of glibc's mallopt, and bytes from which a block of memory is given back to the system when it is freed.
M_MMAP_THRESHOLD, GIVEN_BACK = -3, 2**20


def give_freed_memory_back() -> None:
    """From now on memory of freed tensors goes back to the system, not into a heap; where the C library is glibc.

    It raises that limit to 32 MB by itself, with the size of what is freed. A process that gathers and drops one layer
    after the other then holds all of them: measured, twice the whole model instead of a share and a layer.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)
    trim_heap()


def trim_heap() -> None:
    """Gives what is free in this process's heap back to the system, where the C library is glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@dataclass(frozen=True)
class Process:
    """rank: from 0 to world - 1. world: number of processes. device: the one that this process computes on.

    replicas: equal groups of neighbouring ranks, each of which holds a sharded model between its processes (HSDP).
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    replicas: int = 1

    @classmethod
    def current(cls) -> Process:
        """This process; under torchrun it joins the process group first."""
        if not dist.is_initialized() and "TORCHELASTIC_RUN_ID" in os.environ:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which reports and writes files for all."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, on all of them."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.world
        return value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on all of them."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any(self, value: bool) -> bool:
        """Whether it is true in any process, on all of them."""
        return bool(self.sum(torch.tensor(int(value), device=self.device)) > 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values
