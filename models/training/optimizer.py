"""AdamW for all stages, and its state as flat named tensors that pass from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from eclectus.models.sharding.slices import Slices
from eclectus.models.training.parallel import like, local, local_bounds
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
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: Mapping[str, torch.Tensor | Slices]
) -> None:
    """Restores the result of `read_moments`, whole, sharded, or read in blocks; parameters without an entry start from
    zero."""
    for name, parameter in named.items():
        state = {what: moments[f"{name}.{what}"] for what in STATE if f"{name}.{what}" in moments}
        if len(state) == len(STATE):
            optimizer.state[parameter] = {what: _moment(parameter, what, value) for what, value in state.items()}


@torch.no_grad()
def _moment(parameter: nn.Parameter, what: str, value: torch.Tensor | Slices) -> torch.Tensor:
    if what == "step":
        # Fused AdamW keeps its step counter on the parameter's device.
        step = value if isinstance(value, torch.Tensor) else value.read([])
        return step.to(local(parameter).device, copy=True)
    if isinstance(value, torch.Tensor):
        return like(parameter, value)
    moment = torch.empty_like(parameter.detach())
    local(moment).copy_(value.read(local_bounds(parameter)))
    return moment
