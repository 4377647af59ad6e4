"""Sums over the micro-batches of a step whose bits do not depend on how many processes share them.

    micro-batch    0   1   2   3   4   5   6   7
                   └─┬─┘   └─┬─┘   └─┬─┘   └─┬─┘      in one process, or each of two, or of four, ...
                     └───┬───┘       └───┬───┘        in one process, or each of two
                         └───────┬───────┘            in one process

A sum of floating-point numbers depends on where its brackets are, not on the order of the two that are added. Here the
brackets are those of a binary tree over the K = batch / micro_batch micro-batches of a step, whose sizes are fixed. Of
W processes, a power of two that divides K, each has K / W neighbouring micro-batches, which are a subtree: it adds up
its own, and what is above is added up between processes. So 1, 2, 4, ... processes make the same additions, and end
with the same bits where each computes a micro-batch with the same bits: on CPUs of one kind, with as many threads each.
A factor of K that is odd is a run of micro-batches that are added in their order, in place of a leaf.

Price of gradients [N] summed in this way, against DDP: log2(K / W) + 1 copies of them in a process, and they are
exchanged after the last backward pass, not during it. As many bytes are sent: 2 (W - 1) / W of N (halves with the
neighbour, quarters with the one behind it, ..., and back).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eclectus.models.training.process import Process


def micro_batches_fault(batch: int, micro_batch: int, world: int) -> str | None:
    """Why `world` processes cannot sum a step of `batch` instances in a fixed order; None where they can."""
    if world & (world - 1):
        return f"{world} processes are no power of two"
    if batch % micro_batch:
        return f"a batch of {batch} instances is no multiple of micro-batches of {micro_batch}"
    if (count := batch // micro_batch) % world:
        return f"a batch of {batch} instances has {count} micro-batches of {micro_batch}, too few for {world} processes"
    return None


def copies_held(micro_batches: int) -> int:
    """Partial sums that a process with so many micro-batches holds at once at most, the newest gradient included."""
    leaves = micro_batches & -micro_batches
    return leaves.bit_length() + (micro_batches > leaves)


class TreeSum:
    """The sum of a step's vectors in this process, added up as they come."""

    def __init__(self, in_step: int) -> None:
        """in_step: micro-batches of a step, over all processes."""
        self._run = in_step // (in_step & -in_step)
        self._count = 0
        self._sums: list[Tensor] = []

    def add(self, vector: Tensor) -> None:
        """The vector of the next micro-batch; it is kept, and changed in place."""
        if self._count % self._run:
            self._sums[-1] += vector
        else:
            self._sums.append(vector)
        self._count += 1
        if self._count % self._run:
            return
        leaves = self._count // self._run
        # Two sums of equally many leaves are one of twice as many.
        while leaves % 2 == 0:
            right = self._sums.pop()
            self._sums[-1] += right
            leaves //= 2

    def take(self) -> Tensor:
        """The sum, after the last micro-batch of this process; the next step begins."""
        (total,), self._sums, self._count = self._sums, [], 0
        return total


@torch.no_grad()
def sum_over_processes(vector: Tensor, process: Process) -> Tensor:
    """`vector` [N], in place: the sum of those of all processes, a power of two, added in pairs of neighbours first."""
    spans, distance = [(0, len(vector))], 1
    while distance < process.world:
        begin, end = spans[-1]
        middle = (begin + end) // 2
        halves = (begin, middle), (middle, end)
        upper = bool(process.rank & distance)
        kept, sent = halves[upper], halves[not upper]
        received = vector.new_empty(kept[1] - kept[0])
        _exchange(vector[slice(*sent)], received, process.rank ^ distance)
        vector[slice(*kept)] += received
        spans.append(kept)
        distance *= 2
    while distance > 1:
        distance //= 2
        (begin, end), (first, last) = spans.pop(), spans[-1]
        other = (end, last) if begin == first else (first, begin)
        _exchange(vector[begin:end], vector[slice(*other)], process.rank ^ distance)
    return vector


def _exchange(sent: Tensor, received: Tensor, partner: int) -> None:
    """Sends one tensor to another process and fills the other from it; empty ones are not sent."""
    operations = [dist.P2POp(dist.isend, sent, partner)] if len(sent) else []
    if len(received):
        operations.append(dist.P2POp(dist.irecv, received, partner))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


class FixedGradients:
    """The gradient of a step, from those of its micro-batches: `add` after each backward pass, then `finish`."""

    def __init__(self, parameters: Iterable[nn.Parameter], in_step: int, process: Process) -> None:
        """in_step: micro-batches of a step, over all processes."""
        self._parameters, self._process = list(parameters), process
        self._sum = TreeSum(in_step)

    @torch.no_grad()
    def add(self) -> None:
        """Takes the gradient of a micro-batch out of the parameters."""
        parts = []
        for parameter in self._parameters:
            parts.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        self._sum.add(torch.cat([part.flatten() for part in parts]))

    def finish(self) -> None:
        """Puts the sum over all micro-batches of all processes into the parameters."""
        total = sum_over_processes(self._sum.take(), self._process)
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, part in zip(self._parameters, total.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
