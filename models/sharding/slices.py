"""Tensors that are read in blocks: what a parameter will hold, before any process has memory for it.

    Stacked([Joined([Stored(reader, gate 0), Stored(reader, up 0)]), ...]).read([(2, 4), (0, 64), (0, 16)])

reads, of the files, the rows of experts 2 and 3 and no others. So a process fills its share of a sharded parameter, and
copies of an expert are made where they will be trained. Every class has a `shape` and reads a block, which it returns
on the CPU and which may be a view. Cost: the rows of the stored tensors that the block needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from eclectus.models.checkpoints.door import check_finite
from eclectus.models.checkpoints.tensor_files import Bounds, CheckpointReader


class Slices(Protocol):
    """A tensor of which blocks are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, bounds: Bounds) -> Tensor:
        """The block between `bounds`, a pair (begin, end) for each dimension."""
        ...


def whole_of(values: Slices) -> Tensor:
    """All of a tensor."""
    return values.read([(0, size) for size in values.shape])


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, in float32. Reading raises CheckpointError where it is missing, cut or not finite."""

    reader: CheckpointReader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.spec(self.name).shape

    def read(self, bounds: Bounds) -> Tensor:
        block = self.reader.block(self.name, bounds)
        check_finite([(self.name, block)], self.reader.directory, bounds[0][0] if bounds else 0)
        return block.float()


@dataclass(frozen=True)
class InMemory:
    """A small tensor, such as random routers, or one that has no file."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self, bounds: Bounds) -> Tensor:
        return self.value[tuple(slice(*each) for each in bounds)]


def in_memory(model: nn.Module) -> dict[str, Slices]:
    """Copies of what the parameters of a model hold that do not train."""
    frozen = (each for each in model.named_parameters() if not each[1].requires_grad)
    return {name: InMemory(parameter.detach().clone()) for name, parameter in frozen}


@dataclass(frozen=True)
class Zeros:
    shape: tuple[int, ...]

    def read(self, bounds: Bounds) -> Tensor:
        return torch.zeros([end - begin for begin, end in bounds])


@dataclass(frozen=True)
class Cut:
    """The part [begin, end) of another tensor along a dimension."""

    of: Slices
    begin: int
    end: int
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[: self.dim], self.end - self.begin, *self.of.shape[self.dim + 1 :])

    def read(self, bounds: Bounds) -> Tensor:
        moved = list(bounds)
        begin, end = bounds[self.dim]
        moved[self.dim] = begin + self.begin, end + self.begin
        return self.of.read(moved)


@dataclass(frozen=True)
class Joined:
    """torch.cat of others along a dimension."""

    parts: Sequence[Slices]
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        total = sum(part.shape[self.dim] for part in self.parts)
        return (*first[: self.dim], total, *first[self.dim + 1 :])

    def read(self, bounds: Bounds) -> Tensor:
        begin, end = bounds[self.dim]
        blocks, start, own = [], 0, list(bounds)
        for part in self.parts:
            size = part.shape[self.dim]
            own[self.dim] = max(begin - start, 0), min(end - start, size)
            if own[self.dim][0] < own[self.dim][1]:
                blocks.append(part.read(own))
            start += size
        if not blocks:
            own[self.dim] = 0, 0
            return self.parts[0].read(own)
        return torch.cat(blocks, self.dim) if len(blocks) > 1 else blocks[0]


@dataclass(frozen=True)
class Stacked:
    """torch.stack of others: a new first dimension."""

    parts: Sequence[Slices]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def read(self, bounds: Bounds) -> Tensor:
        (begin, end), *inner = bounds
        if begin >= end:
            return torch.zeros([0, *(stop - start for start, stop in inner)])
        return torch.stack([part.read(inner) for part in self.parts[begin:end]])


@dataclass(frozen=True)
class Repeated:
    """Equal copies of another: a new first dimension. What is read takes the memory of one."""

    of: Slices
    times: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.times, *self.of.shape)

    def read(self, bounds: Bounds) -> Tensor:
        (begin, end), *inner = bounds
        block = self.of.read(inner)
        return block.expand(max(end - begin, 0), *block.shape)


@dataclass(frozen=True)
class Transposed:
    """A matrix with rows and columns exchanged."""

    of: Slices

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[::-1]

    def read(self, bounds: Bounds) -> Tensor:
        return self.of.read(list(bounds)[::-1]).t()


@dataclass(frozen=True)
class Scaled:
    """Another times a number."""

    of: Slices
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, bounds: Bounds) -> Tensor:
        return self.of.read(bounds) * self.factor
