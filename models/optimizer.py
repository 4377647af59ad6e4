"""AdamW as all stages use it, and its state as flat named tensors that pass from stage to stage."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from models.parallel import like, local
from models.plan import Plan

STATE = ("exp_avg", "exp_avg_sq", "step")
EMBEDDINGS = ("embed_tokens", "lm_head")
ROUTERS = (".router.", ".mlp.gate.weight", "block_sparse_moe.gate.weight")


class ExpertAdamW(torch.optim.AdamW):
    """AdamW for experts `[E, ...]` whose differences from their mean learn `difference_rate` times as fast as the mean.

    A step D of AdamW (weight decay is part of it) becomes mean(D) + difference_rate (D - mean(D)), the mean over the
    experts. Merged experts (models/merge.py) are why: what they have in common is in every token's FFN and bears no
    higher rate than a dense FFN, while what an expert differs by enters with its weight in the mixture only.

    Done by one step at the higher rate, from which the excess of the mean is taken back: two sums over the experts and
    an addition, no state, no memory but one expert's; sharded experts exchange as much a layer.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Expects the higher rate in a group's lr (`set_rate`)."""
        apart = [
            (parameter, group["difference_rate"])
            for group in self.param_groups
            if group["difference_rate"] != 1.0
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        before = [local(parameter).sum(0) for parameter, _ in apart]
        super().step(closure)
        for (parameter, rate), sums in zip(apart, before, strict=True):
            value = local(parameter)
            moved = value.sum(0).sub_(sums)
            if isinstance(parameter, DTensor):
                distributed.all_reduce(moved, group=parameter.device_mesh.get_group())
            value.sub_(moved.mul_((1 - 1 / rate) / parameter.shape[0]))


def make_optimizer(named: dict[str, nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of attention and experts; `set_rate` gives it its learning rates.

    Norms have none, nor have embeddings, whose unseen rows it would shrink to zero, nor routers, whose certainty it would
    take away: in a review at a high rate it is what kept them from being sure of the original expert.
    """
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        router, expert = any(part in name for part in ROUTERS), ".mlp.experts" in name
        spared = router or parameter.ndim < 2 or any(part in name for part in EMBEDDINGS)
        scale = plan.router_rate if router else plan.expert_rate if expert else 1.0
        kind = 0.0 if spared else plan.weight_decay, scale, plan.difference_rate if expert else 1.0
        groups.setdefault(kind, []).append(parameter)
    names = "weight_decay", "scale", "difference_rate"
    options = [{"params": each, **dict(zip(names, kind, strict=True))} for kind, each in groups.items()]
    return ExpertAdamW(options, lr=0.0, betas=plan.betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate, scaled for routers and experts by the plan's `router_rate`, `expert_rate` and `difference_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"] * group["difference_rate"]


def read_moments(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state as a flat dict of tensors: `{parameter}.exp_avg`, `.exp_avg_sq`, `.step`; sharded as the parameters are."""
    return {
        f"{name}.{what}": value.detach()
        for name, parameter in named.items()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: dict[str, torch.Tensor]
) -> None:
    """Puts back what `read_moments` gave, whole or sharded; parameters without an entry start from zero."""
    for name, parameter in named.items():
        state = {what: moments.get(f"{name}.{what}") for what in STATE}
        if all(value is not None for value in state.values()):
            # Fused AdamW reads its step counter where the parameter is.
            device = local(parameter).device
            optimizer.state[parameter] = {
                what: value.to(device, copy=True) if what == "step" else like(parameter, value)
                for what, value in state.items()
            }
