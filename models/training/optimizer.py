"""AdamW for all stages, and its state as flat named tensors that pass from stage to stage."""

from __future__ import annotations

import torch
from torch import nn

from eclectus.models.training.parallel import like, local
from eclectus.models.training.plan import Plan

STATE = ("exp_avg", "exp_avg_sq", "step")
EMBEDDINGS = ("embed_tokens", "lm_head")
ROUTERS = (".router.", ".mlp.gate.weight", "block_sparse_moe.gate.weight")


def make_optimizer(named: dict[str, nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of attention and experts; `set_rate` sets the learning rates.

    There is no weight decay on norms; on embeddings, where it would shrink the rows of unseen tokens to zero; and on
    routers, where it limits confidence: at a high rate it kept the review from routing firmly to the original expert.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        router = any(part in name for part in ROUTERS)
        no_decay = router or parameter.ndim < 2 or any(part in name for part in EMBEDDINGS)
        scale = plan.router_rate if router else plan.expert_rate if ".mlp.experts" in name else 1.0
        groups.setdefault((0.0 if no_decay else plan.weight_decay, scale), []).append(parameter)
    options = [{"params": each, "weight_decay": decay, "scale": scale} for (decay, scale), each in groups.items()]
    return torch.optim.AdamW(options, lr=0.0, betas=plan.betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate; for routers and experts it is scaled by the plan's `router_rate` and `expert_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def read_moments(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state as a flat dict: `{parameter}.exp_avg`, `.exp_avg_sq`, `.step`; sharded as the parameters are."""
    return {
        f"{name}.{what}": value.detach()
        for name, parameter in named.items()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: dict[str, torch.Tensor]
) -> None:
    """Restores the result of `read_moments`, whole or sharded; parameters without an entry start from zero."""
    for name, parameter in named.items():
        state = {what: moments[f"{name}.{what}"] for what in STATE if f"{name}.{what}" in moments}
        if len(state) == len(STATE):
            # Fused AdamW keeps its step counter on the parameter's device.
            device = local(parameter).device
            optimizer.state[parameter] = {
                what: value.to(device, copy=True) if what == "step" else like(parameter, value)
                for what, value in state.items()
            }
