"""The plan of one training stage: steps, batch, learning rates, and how it is distributed over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eclectus.models.attention.choice import Attention
from eclectus.models.elastic.fixed_sums import micro_batches_fault


@dataclass(frozen=True)
class Plan:
    """The plan of one training stage.

    start, stop: training steps, [start, stop). total: steps of the cosine schedule. batch: instances per step over all
    processes. micro_batch: instances per forward pass in one process. warmup: steps of linear warm-up from step 0.
    rewarm: (first step, steps) of a second warm-up, after a change of model, or None.
    floor: final learning rate as a fraction of the peak. clip: largest norm of the gradient.
    router_rate, expert_rate: factors on the learning rate of routers and of experts.
    checkpoint_every, log_every: steps between checkpoints, and between rows of metrics.
    sharded: processes share weights, gradients and moments (FSDP2) instead of each holding all of them (DDP).
    Then, kept: gathered weights stay from the forward pass to the backward pass. ahead: layers whose weights are
    gathered before they compute; 0 leaves that to FSDP2. reduced_once: whole gradients are added up over the
    micro-batches of a step and reduced at its end.
    compiled: torch.compile of the decoder layers. recomputed: activations of every n-th layer are recomputed in the
    backward pass instead of kept (gradient checkpointing); 0: of none. attention: models/attention/choice.py.
    document_mask: a token sees its own document only (models/attention/document_mask.py), and the first token of a
    document is no target.
    fixed_sums: gradients and metrics are added up in an order that does not depend on the number of processes
    (models/elastic/fixed_sums.py).
    precision: of matrix products (models/training/precision.py); auto is bfloat16 on CUDA, float32 on a CPU.
    """

    start: int
    stop: int
    total: int
    batch: int
    micro_batch: int
    learning_rate: float
    warmup: int
    rewarm: tuple[int, int] | None = None
    floor: float = 0.1
    router_rate: float = 1.0
    expert_rate: float = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 10
    sharded: bool = False
    kept: bool = False
    ahead: int = 0
    reduced_once: bool = False
    compiled: bool = False
    recomputed: int = 0
    attention: Attention = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    document_mask: bool = False
    fixed_sums: bool = False

    def check_sharing(self, world: int) -> None:
        """Raises ValueError if so many processes cannot share a step."""
        if self.batch % world:
            raise ValueError(
                f"batch of {self.batch} instances cannot be shared by {world} processes; make it a multiple"
            )
        if self.fixed_sums:
            fault = micro_batches_fault(self.batch, self.micro_batch, world)
            if self.sharded or fault:
                raise ValueError(f"sums in a fixed order: {fault or 'a sharded model has none'}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, cosine to floor * peak, times the second warm-up."""
        if step < self.warmup:
            rate = (step + 1) / self.warmup
        else:
            part = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
            rate = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * part))
        if self.rewarm and self.rewarm[0] <= step < sum(self.rewarm):
            rate *= (step - self.rewarm[0] + 1) / self.rewarm[1]
        return self.learning_rate * rate
