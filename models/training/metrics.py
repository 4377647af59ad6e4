"""The metrics of a training: means over the steps since the last row of metrics, kept on the device until read."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from eclectus.models.training.process import Process
from eclectus.models.training.throughput import flops_per_token, peak_flops


class Window:
    """Running sums of the metrics, so that no step waits for the accelerator.

    A scalar is averaged over the window; a pair [2] is a sum and a count, logged as their ratio if the count is not 0.
    """

    def __init__(self, model: nn.Module, tokens_per_step: int, length: int, process: Process) -> None:
        """tokens_per_step: of all processes together. length: tokens per instance."""
        self._tokens_per_step = tokens_per_step
        self._utilisation = flops_per_token(model, length) / (peak_flops(process.device) * process.world)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._since = time.monotonic()
        self.norm = torch.tensor(0.0)

    def add(self, loss: torch.Tensor, extra: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        """Adds one micro-batch. weight: its share of the step, as in the gradient."""
        for name, value in {"loss": loss, **extra}.items():
            # Only means are weighted; sums and counts are not.
            value = value.detach().float()
            self._sums[name] = self._sums.get(name, 0.0) + (value * weight if value.ndim == 0 else value)

    def end_step(self, norm: torch.Tensor) -> None:
        """norm: that of the step's gradient, before clipping."""
        self.norm = norm
        self._steps += 1

    def read(self, process: Process, rate: float) -> dict[str, float]:
        """Means over the window and all processes, and learning rate and throughput; starts a new window."""
        pairs = torch.stack([F.pad(total.view(-1), (0, 2 - total.numel())) for total in self._sums.values()])
        means = process.mean(pairs / self._steps).tolist()
        seconds = time.monotonic() - self._since
        values = {}
        for (name, total), (mean, count) in zip(self._sums.items(), means, strict=True):
            if total.ndim == 0 or count > 0:
                values[name] = mean if total.ndim == 0 else mean / count
        tokens_per_second = self._tokens_per_step * self._steps / seconds
        values |= {
            "gradient_norm": float(self.norm),
            "learning_rate": rate,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._utilisation,
        }
        self._sums, self._steps, self._since = {}, 0, time.monotonic()
        return values
