"""A training that is forecast: a model without weights in its form for training, an objective and a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from eclectus.models.losses.step import Objective
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.plan import Plan
from eclectus.models.training.precision import Precision, compute_dtype, is_half
from eclectus.models.training.process import Process

# In an instance of a made-up batch.
DOCUMENTS = 4


@dataclass(frozen=True)
class Job:
    """model: on the meta device; what trains requires gradients. world: processes. length: tokens of an instance.

    languages, domains: of the instances. holds_frozen: whether frozen matrices are held in bfloat16 where matrix
    products are (models/training/precision.py). device: "cpu" or "cuda", on which it will train.
    checks_frozen: whether the frozen weights are hashed at every checkpoint. data_bytes: of the instances' files.
    keeps_moments: whether AdamW's moments are part of the final checkpoint.
    """

    model: nn.Module
    objective: Objective
    plan: Plan
    world: int
    length: int
    languages: int = 1
    domains: int = 1
    holds_frozen: bool = False
    checks_frozen: bool = False
    keeps_moments: bool = False
    data_bytes: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def on(
        cls, data: Instances, model: nn.Module, objective: Objective, plan: Plan, process: Process, **options: bool
    ) -> Job:
        """The job of this process's group on these instances. options: other fields."""
        stored = len(data) * data.length * (2 if data.vocabulary <= 2**16 else 4)
        counts = len(data.languages), len(data.domains)
        return cls(
            model,
            objective,
            plan,
            process.world,
            data.length,
            *counts,
            data_bytes=stored,
            device=process.device,
            **options,
        )

    @property
    def micro_batch(self) -> int:
        """Instances in a forward pass of one process."""
        return max(1, min(self.plan.micro_batch, self.plan.batch // self.world))

    @property
    def micro_batches(self) -> int:
        """Forward passes with gradients in a step of one process."""
        return -(-(self.plan.batch // self.world) // self.micro_batch)

    @property
    def asked(self) -> Objective:
        """The objective as the training loop asks for it."""
        return dataclasses.replace(self.objective, document_mask=self.plan.document_mask)

    @property
    def steps(self) -> int:
        return self.plan.stop - self.plan.start

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return compute_dtype(self.plan.precision, self.device)

    @property
    def precision(self) -> Precision:
        return "bfloat16" if is_half(self.plan.precision, self.device) else "float32"

    @property
    def held(self) -> bool:
        """Whether frozen matrices are held in bfloat16."""
        return self.holds_frozen and self.precision == "bfloat16"

    @property
    def sharded(self) -> bool:
        return self.plan.sharded and self.world > 1

    def batch(self, seed: int = 0) -> Batch:
        """A micro-batch of random tokens without padding, on the CPU; the global random state is not used."""
        drawn = torch.Generator().manual_seed(seed)
        config: Any = self.model.config
        shape = (self.micro_batch, self.length)

        def below(most: int) -> torch.Tensor:
            return torch.randint(max(1, most), shape, generator=drawn)

        tokens = below(config.vocab_size)
        documents = (torch.arange(self.length) * DOCUMENTS // self.length).expand(shape).contiguous()
        batch = Batch(tokens, tokens.clone(), below(self.languages), below(self.domains), documents)
        return batch.without_borders() if self.plan.document_mask else batch
