"""The metrics of a training: means over the steps since the last row of metrics, kept on the device until read.

Every mean is over its own items (targets, tokens of original languages, segments, ...): sums and counts are added up
over micro-batches, steps and processes, then divided; in a fixed order, if the plan asks for one.
"""

from __future__ import annotations

import time
from itertools import islice

import torch
from torch import Tensor, nn

from eclectus.models.elastic.fixed_sums import TreeSum, sum_over_processes
from eclectus.models.losses.step import Term
from eclectus.models.training.process import Process
from eclectus.models.training.throughput import flops_per_token, peak_flops


class RunningSum:
    """The sum of what was added since it was taken, in all processes."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, values: Tensor) -> None:
        self._total = values if self._total is None else self._total + values

    def end_step(self) -> None:
        """After the last micro-batch of a step."""

    def take(self, process: Process) -> Tensor:
        total, self._total = self._total, None
        assert total is not None, "nothing was added"
        return process.sum(total)


class FixedSum:
    """The same, with the same bits on any number of processes: a tree within each step, then step after step."""

    def __init__(self, in_step: int) -> None:
        """in_step: micro-batches of a step, over all processes."""
        self._tree, self._steps = TreeSum(in_step), list[Tensor]()

    def add(self, values: Tensor) -> None:
        self._tree.add(values)

    def end_step(self) -> None:
        self._steps.append(self._tree.take())

    def take(self, process: Process) -> Tensor:
        steps, self._steps = torch.stack(self._steps), []
        return sum_over_processes(steps.flatten(), process).view_as(steps).sum(0)


class Window:
    """Running sums of the metrics, so that no step waits for the accelerator."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, float],
        tokens_per_step: int,
        length: int,
        process: Process,
        sums: RunningSum | FixedSum,
    ) -> None:
        """weights: of the losses in the objective. tokens_per_step: of all processes together. length: per instance."""
        self._weights = weights
        self._tokens_per_step = tokens_per_step
        self._utilisation = flops_per_token(model, length) / (peak_flops(process.device) * process.world)
        self._sums, self._terms = sums, dict[str, tuple[type[Term], int]]()
        self._steps = 0
        self._since = time.monotonic()
        self.norm = torch.tensor(0.0)

    def add(self, terms: dict[str, Term]) -> None:
        """Adds one micro-batch; all have the same terms."""
        parts = []
        for name, term in terms.items():
            parts += [term.total.double().reshape(-1), term.count.double().reshape(1)]
            self._terms[name] = type(term), term.total.numel() + 1
        self._sums.add(torch.cat(parts))

    def end_step(self, norm: torch.Tensor) -> None:
        """norm: that of the step's gradient, before clipping."""
        self.norm = norm
        self._sums.end_step()
        self._steps += 1

    def read(self, process: Process, rate: float) -> dict[str, float]:
        """Means over the window and all processes, and learning rate and throughput; starts a new window.

        `loss` is the objective: the weighted sum of its losses. What has no items in the window is left out.
        """
        added = iter(self._sums.take(process).tolist())
        parts = {name: (kind, list(islice(added, size))) for name, (kind, size) in self._terms.items()}
        values = {name: kind.joined(each) for name, (kind, each) in parts.items() if each[-1] > 0}
        loss = sum(weight * values.get(name, 0.0) for name, weight in self._weights.items())
        if len(self._weights) == 1:
            # The only loss is the objective.
            values = {name: value for name, value in values.items() if name not in self._weights}
        seconds = time.monotonic() - self._since
        tokens_per_second = self._tokens_per_step * self._steps / seconds
        values = {
            "loss": loss,
            **values,
            "gradient_norm": float(self.norm),
            "learning_rate": rate,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._utilisation,
        }
        self._steps, self._since = 0, time.monotonic()
        return values
