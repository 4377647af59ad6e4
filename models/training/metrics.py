"""What a training logs: means over the steps since the last row of metrics, kept on the device until they are read."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from eclectus.models.training.process import Process
from eclectus.models.training.throughput import flops_per_token, peak_flops


class Window:
    """Sums of what is logged, so that no step waits for the accelerator.

    A number is averaged over the window; a pair [2] is a sum and a count, and is logged as their ratio where there is any count.
    """

    def __init__(self, model: nn.Module, tokens_a_step: int, length: int, process: Process) -> None:
        """tokens_a_step: of all processes together. length: of an instance."""
        self._tokens_a_step = tokens_a_step
        self._utilisation = flops_per_token(model, length) / (peak_flops(process.device) * process.world)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._since = time.monotonic()
        self.norm = torch.tensor(0.0)

    def add(self, loss: torch.Tensor, extra: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
        """One micro-batch. weight: its share of the step, as in the gradient."""
        for name, value in {"loss": loss, **extra}.items():
            # Sums and counts are whole already; only means are weighted.
            value = value.detach().float()
            self._sums[name] = self._sums.get(name, 0.0) + (value * weight if value.ndim == 0 else value)

    def end_step(self, norm: torch.Tensor) -> None:
        """norm: of the step's gradient, before clipping."""
        self.norm = norm
        self._steps += 1

    def read(self, process: Process, rate: float) -> dict[str, float]:
        """Means over the window and all processes, and the rates; starts a new window."""
        pairs = torch.stack([F.pad(total.view(-1), (0, 2 - total.numel())) for total in self._sums.values()])
        means = process.mean(pairs / self._steps).tolist()
        seconds = time.monotonic() - self._since
        values = {}
        for (name, total), (mean, count) in zip(self._sums.items(), means, strict=True):
            if total.ndim == 0 or count > 0:
                values[name] = mean if total.ndim == 0 else mean / count
        tokens_per_second = self._tokens_a_step * self._steps / seconds
        values |= {
            "gradient_norm": float(self.norm),
            "learning_rate": rate,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self._utilisation,
        }
        self._sums, self._steps, self._since = {}, 0, time.monotonic()
        return values
