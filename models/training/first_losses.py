"""The loss of every document when it was first trained on: 4 bytes for each of its spans in the instances.

What a model says of text that it has never seen tells garbage (high), duplicates and memorised text (low), and what
grouping does: a document whose neighbours in the instance are alike is easier. The losses are those of the step itself
(models/losses/token_losses.py); they are added up by span on the device and fetched with the metrics.

    losses    float32 [S] beside unfinished training: mean over the targets of each span, in the order of spans.npy, NaN
              where nothing was trained on yet. Every process writes its own spans, in place, so a training that
              resumes from an earlier step writes the same numbers again.

Cost: a sum over the step's targets; docs/benchmarks.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eclectus.models.training.instances import Instances
from eclectus.models.training.plan import Plan
from eclectus.models.training.process import Process

NAME = "first_losses.f32"


class FirstLosses:
    """Notes the losses of a training's first epoch. All processes make one, on storage that they share."""

    def __init__(self, instances: Instances, plan: Plan, process: Process, work: Path) -> None:
        """work: the folder of the unfinished training, on storage that all processes share."""
        self._instances, self._plan, self._process = instances, plan, process
        self._path = work / NAME
        self._noted: list[tuple[np.ndarray, np.ndarray, Tensor]] = []
        # Mixed sets of instances have no spans of their own.
        self._kept = getattr(instances, "spans", None) is not None
        if not self._kept:
            return
        if process.is_main:
            self._create()
        process.barrier()
        # Of a process whose folder is its own.
        self._create()

    def note(self, step: int, number: int, measured: tuple[Tensor, Tensor] | None) -> None:
        """Adds a micro-batch of this process, by its number in the step.

        measured: (at, losses), as of `Step.latest`. at: positions in `[b * L]` of tokens whose next one is a target, on
        the CPU, ascending. losses: of these, on the device.
        """
        count, size = len(self._instances), self._plan.micro_batch
        share = self._plan.batch // self._process.world
        first = self._process.rank * share + number * size
        position = step * self._plan.batch + np.arange(first, min(first + size, (self._process.rank + 1) * share))
        if not self._kept or measured is None or position[0] >= count:
            return
        at, losses = measured
        rows = self._instances.rows_of_step(step, self._plan.batch, self._plan.seed)[first : first + len(position)]
        numbers, place, owner = self._instances.spans_of_tokens(rows)
        # A target belongs to the document of the token that is predicted.
        counts = np.bincount(owner[at.numpy() + 1], minlength=len(numbers))
        lengths = torch.from_numpy(counts).to(losses.device, non_blocking=True)
        sums = torch.segment_reduce(losses, "sum", lengths=lengths, unsafe=True)
        # The rest of the step is read for a second time.
        self._noted.append((numbers, np.where(position[place] < count, counts, 0), sums))

    def write(self, sync: bool = False) -> None:
        """Writes what was noted since the last time; waits for the device. sync: and for the disk."""
        if self._noted:
            numbers = np.concatenate([each for each, _, _ in self._noted])
            counts = np.concatenate([each for _, each, _ in self._noted])
            sums = torch.cat([each for _, _, each in self._noted]).cpu().numpy()
            self._noted.clear()
            known = counts > 0
            self._write(numbers[known], (sums[known] / counts[known]).astype(np.float32))
        if sync and self._kept:
            with open(self._path, "rb+") as file:
                os.fsync(file.fileno())

    def _create(self) -> None:
        count = len(self._instances.spans)
        if not self._path.exists() or self._path.stat().st_size != 4 * count:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            np.full(count, np.nan, np.float32).tofile(self._path)

    def _write(self, numbers: np.ndarray, means: np.ndarray) -> None:
        order = np.argsort(numbers, kind="stable")
        numbers, means = numbers[order], means[order]
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        handle = os.open(self._path, os.O_WRONLY)
        try:
            for begin, end in zip([0, *cuts], [*cuts, len(numbers)], strict=True):
                if end > begin:
                    os.pwrite(handle, means[begin:end].tobytes(), 4 * int(numbers[begin]))
        finally:
            os.close(handle)
