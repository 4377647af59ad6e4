"""The models of pre-training as blueprints (models/sharding/blueprint.py), from that of a dense model and its moments.

As `LoryForCausalLM.from_dense`, `ExpertChoiceForCausalLM.from_dense`, `top_k_from_dense` and
`document_pools_from_dense`, bit by bit, but what is copied and cut is read by the process that trains it. AdamW's
moments follow the weights: a copy that sees a share of the dense gradient gets that share of the first moment and its
square of the second, so that its next step has the size of the dense model's. Routers start from zero moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from eclectus.models.lory.dense import dense_ffn_names
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.pretraining.baselines import (
    ExpertChoiceForCausalLM,
    aligned,
    drawn_routers,
    expert_choice_config,
    top_k_fields,
)
from eclectus.models.pretraining.document_pools import DocumentPoolConfig, DocumentPoolForCausalLM, check_pool
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.sharding.slices import (
    Cut,
    InMemory,
    Joined,
    Repeated,
    Scaled,
    Slices,
    Stacked,
    Transposed,
    Zeros,
)

# As the defaults of `top_k_from_dense` and `document_pools_from_dense`.
BALANCE, ROUTER_RANGE = 0.01, 0.02


def lory_blueprint(dense: Blueprint, experts: int, seed: int, **config: Any) -> Blueprint:
    """config: other arguments of `LoryForCausalLM.from_dense`."""
    model = LoryForCausalLM.from_dense(dense.model, num_experts=experts, seed=seed, shared_memory=True, **config)
    routers = drawn_routers(model, experts, model.config.router_initializer_range, seed)
    return _made(dense, model, lory_values(dense.values, experts), routers)


def expert_choice_blueprint(dense: Blueprint, experts: int, seed: int, **config: Any) -> Blueprint:
    """config: other arguments of `ExpertChoiceForCausalLM.from_dense`."""
    with torch.device("meta"):
        model = ExpertChoiceForCausalLM(expert_choice_config(dense.model.config, experts, **config))
    for layer in model.model.layers:
        layer.mlp.threshold = torch.zeros(experts)
    routers = drawn_routers(model, experts, model.config.router_initializer_range, seed)
    return _made(dense, model, lory_values(dense.values, experts), routers)


def top_k_blueprint(dense: Blueprint, copies: int, top_k: int, cuts: int, seed: int) -> Blueprint:
    """Raises ValueError as `top_k_from_dense`."""
    fields = top_k_fields(dense.model.config, copies, top_k, cuts, BALANCE)
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**fields))
    return _cut_blueprint(dense, model, copies, cuts, seed)


def document_pool_blueprint(dense: Blueprint, copies: int, top_k: int, pool_size: int, seed: int) -> Blueprint:
    """Raises ValueError as `document_pools_from_dense`."""
    check_pool(pool_size, top_k)
    fields = top_k_fields(dense.model.config, copies, top_k, top_k, BALANCE)
    with torch.device("meta"):
        model = DocumentPoolForCausalLM(DocumentPoolConfig(**fields, pool_size=pool_size))
    return _cut_blueprint(dense, model, copies, top_k, seed)


def _cut_blueprint(dense: Blueprint, model: PreTrainedModel, copies: int, cuts: int, seed: int) -> Blueprint:
    routers = drawn_routers(model, copies, ROUTER_RANGE, seed)
    values = cut_values(dense.values, copies, cuts, 1.0, cuts)
    return _made(dense, model, values, {name: router.repeat(cuts, 1) for name, router in routers.items()})


def _made(
    dense: Blueprint, model: PreTrainedModel, values: Mapping[str, Slices], routers: Mapping[str, torch.Tensor]
) -> Blueprint:
    """The blueprint of `model` with the files and the mode of the dense one."""
    model.tie_weights()
    # Rotary frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    stock = {**values, **{name: InMemory(router) for name, router in routers.items()}}
    if wrong := [name for name, _ in model.named_parameters() if name not in stock]:
        raise ValueError(
            f"the dense model does not fit: {', '.join(wrong[:3])}; give a SwiGLU model without FFN biases."
        )
    dense.values = stock
    return dense.formed(model.train(dense.model.training))


def lory_values(dense: Mapping[str, Slices], experts: int, scale: float = 1.0) -> dict[str, Slices]:
    """`models/lory/dense.py:expand_dense_tensors`, read in blocks. dense: by LLaMA's names."""
    values: dict[str, Slices] = {}
    for name, value in dense.items():
        prefix, ffn, part = name.partition(".mlp.")
        if not ffn:
            values[name] = value
        elif part == "gate_proj.weight":
            up, down = dense[f"{prefix}.mlp.up_proj.weight"], dense[f"{prefix}.mlp.down_proj.weight"]
            values[f"{prefix}.mlp.experts"] = Repeated(_scaled(Joined([value, up, Transposed(down)]), scale), experts)
    return values


def cut_values(
    dense: Mapping[str, Slices], copies: int, cuts: int, gate_up_scale: float, down_scale: float
) -> dict[str, Slices]:
    """From values by LLaMA's names to those by Mixtral's: expert `k * copies + g` is the k-th cut of copy g."""
    values = {name: value for name, value in dense.items() if ".mlp." not in name}
    for layer in range(sum(name.endswith(".mlp.gate_proj.weight") for name in dense)):
        gate, up, down = (dense[name] for name in dense_ffn_names(layer))
        (inner, width), wide = gate.shape, gate.shape[0] // cuts
        fill = aligned(wide) - wide
        gate_up: list[Slices] = []
        downs: list[Slices] = []
        for begin in range(0, inner, wide):
            rows = [_padded(Cut(each, begin, begin + wide), fill, (fill, width), 0) for each in (gate, up)]
            columns = _padded(Cut(down, begin, begin + wide, dim=1), fill, (width, fill), 1)
            gate_up += [Joined(rows)] * copies
            downs += [columns] * copies
        experts = f"model.layers.{layer}.mlp.experts"
        values[f"{experts}.gate_up_proj"] = _scaled(Stacked(gate_up), gate_up_scale)
        values[f"{experts}.down_proj"] = _scaled(Stacked(downs), down_scale)
    return values


def _padded(value: Slices, fill: int, shape: tuple[int, int], dim: int) -> Slices:
    return Joined([value, Zeros(shape)], dim) if fill else value


def _scaled(value: Slices, factor: float) -> Slices:
    return value if factor == 1.0 else Scaled(value, factor)


def duplicated_moments(moments: Mapping[str, Slices], experts: int, share: float | None = None) -> dict[str, Slices]:
    """AdamW's moments of a dense model, for the result of `lory_blueprint` or `expert_choice_blueprint`.

    share: the share of the dense gradient that a copy sees, by default 1/E, for equal weights.
    """
    share = 1 / experts if share is None else share
    return _converted(moments, lambda dense, power: lory_values(dense, experts, share**power))


def top_k_moments(moments: Mapping[str, Slices], copies: int, cuts: int) -> dict[str, Slices]:
    """AdamW's moments of a dense model, for the result of `top_k_blueprint`.

    An expert sees 1/copies of the dense gradient; its down projection is `cuts` times as large, its gradient `cuts`
    times smaller.
    """

    def cut(dense: Mapping[str, Slices], power: int) -> dict[str, Slices]:
        return cut_values(dense, copies, cuts, copies**-power, (copies * cuts) ** -power)

    return _converted(moments, cut)


def _converted(
    moments: Mapping[str, Slices], convert: Callable[[Mapping[str, Slices], int], dict[str, Slices]]
) -> dict[str, Slices]:
    found: dict[str, Slices] = {}
    steps = [value for name, value in moments.items() if name.endswith(".step")]
    for what, power in ((".exp_avg", 1), (".exp_avg_sq", 2)):
        dense = {name.removesuffix(what): value for name, value in moments.items() if name.endswith(what)}
        for name, value in convert(dense, power).items():
            found[name + what] = value
            found[f"{name}.step"] = steps[0]
    return found
