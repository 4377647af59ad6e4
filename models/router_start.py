"""How a Lory model's routers start: at random (papers.md 1.5 leaves the rest open), but so that segments differ.

    w_i  <-  deviation * P w_i / std(w_i . h)          h: the mean hidden states of segments; P takes out the direction of their mean

for the row w_i of every expert, over the first batches of a training. A plain random row gives logits of which a good part is the
same for every segment, and what is left depends on the layer: one that hardly tells segments apart may settle on one mixture
for all of them before it learns to (docs/benchmarks.md). The experts are copies yet, so no output of the model changes.

Price: a forward pass over SEGMENTS segments, and D x D numbers a layer.
Shapes: N segments, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from models.instances import Instances
from models.lory import LoryForCausalLM
from models.lory_ffn import LoryRouter
from models.parallel import local
from models.place import Place
from models.plan import Plan
from models.train import autocast, micro_batches

SEGMENTS = 512


class Moments:
    """Count, sum `[D]` and products `[D, D]` of the mean hidden states that a router saw, in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def __call__(self, router: LoryRouter, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook."""
        h_ND = inputs[0].flatten(0, -2).double()
        h_ND = torch.cat([torch.ones_like(h_ND[:, :1]), h_ND], dim=1)
        products = h_ND.t() @ h_ND
        self._sums = products if self._sums is None else self._sums + products

    def read(self, place: Place) -> tuple[Tensor, Tensor]:
        """Mean `[D]` and covariance `[D, D]` over what all processes saw."""
        sums = place.sum(self._sums)
        mean = sums[0, 1:] / sums[0, 0]
        return mean, sums[1:, 1:] / sums[0, 0] - torch.outer(mean, mean)


@torch.no_grad()
def start_routers(model: LoryForCausalLM, instances: Instances, plan: Plan, place: Place, deviation: float) -> None:
    """Scales the routers' rows in place: over segments, each expert's logit has the mean 0 and the standard deviation `deviation`.

    All processes must call it, whether the model is whole, copied or sharded. Where all segments are alike, rows stay as they are.
    """
    seen = {module: Moments() for module in model.modules() if isinstance(module, LoryRouter)}
    hooks = [router.register_forward_pre_hook(moments) for router, moments in seen.items()]
    segments = plan.batch * -(-instances.length // model.config.segment_length)
    steps = range(plan.start, min(plan.stop, plan.start + -(-SEGMENTS // segments)))
    try:
        # Compiled layers would be compiled for the hooks, and again without them.
        with torch.compiler.set_stance("force_eager"), autocast(place.device):
            for step in steps:
                for _, batch, _ in micro_batches(instances, step, plan, place):
                    model(input_ids=batch.tokens, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Without a backward pass the outermost weights stay gathered.
            module.reshard()
    for router, moments in seen.items():
        mean, covariance = moments.read(place)
        weight = local(router.weight)
        rows = weight.double()
        rows = rows - torch.outer(rows @ mean, mean) / mean.dot(mean).clamp(min=1e-30)
        size = ((rows @ covariance) * rows).sum(1, keepdim=True).clamp(min=0).sqrt()
        alike = size <= 1e-6 * weight.double().norm(dim=1, keepdim=True) * mean.norm()
        weight.copy_(torch.where(alike, weight, rows * (deviation / size)))
