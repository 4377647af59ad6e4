"""FLOPs of a training step, and parameters: what a comparison of models must show beside their scores.

    FLOPs       torch's FlopCounterMode over forward and backward of a copy of the model without data (fake tensors):
                exact, and without computing or allocating anything
    products    all matrix products: weights, routers, merging of experts and its repetition in the backward pass
    attention   queries x keys and probabilities x values, over all L x L pairs (a causal kernel can skip half of them)

The two are kept apart because attention is the same in models of one width and depth: a ratio of products alone is the
stricter one (torch counts no attention on CPU). A mixture's experts count for the tokens that choose them, however they
are computed (`masked` experts on a GPU compute more); where some experts are frozen, as if the choices were spread
evenly over all. Not counted: gradient checkpointing, losses, norms, the optimizer, and the pass without gradients over
further micro-batches by which a balance loss counts the choices of a whole step (models/losses/step.py).

Lory pays for merging: per layer and segment of T tokens one product [1, E] x [E, P] in the forward pass and three in
the backward pass (merged again, gradients of weights and of experts), P = 3 D F. So its FFNs cost 1 + 4 E / (3 T) times
the dense twin's (docs/methods.md 1.8).

Shapes: B instances, L tokens, D width, F FFN width, E experts.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from eclectus.models.training.parallel import config_of
from eclectus.models.training.plan import Plan

aten = torch.ops.aten
# Widths of an FFN are multiples of this, as matrix units and grouped kernels want them.
WIDTH_STEP = 8


@dataclass(frozen=True)
class Flops:
    """FLOPs of a training step, or of many. products, attention: as in the module's docstring."""

    products: int
    attention: int

    @property
    def total(self) -> int:
        return self.products + self.attention

    def relative(self, other: Flops) -> float:
        """These products divided by the other's; attention, which does not differ, would only hide the difference."""
        return self.products / other.products

    def times(self, factor: Fraction | int) -> Flops:
        return Flops(int(self.products * factor), int(self.attention * factor))

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.attention + other.attention)


def step_flops(model: nn.Module, plan: Plan, world: int, length: int) -> Flops:
    """FLOPs of one step of this plan, all processes together; see `count_flops`."""
    rows = max(1, min(plan.micro_batch, plan.batch // world))
    return count_flops(model, rows, length).times(Fraction(plan.batch, rows))


def training_costs(
    model: nn.Module, plan: Plan, world: int, length: int, before: Flops = Flops(0, 0)
) -> dict[str, int]:
    """What a checkpoint's statistics say of its cost: parameters, and FLOPs of a step and of the whole training.

    before: FLOPs of training before this plan's.
    """
    parameters, active = count_parameters(model)
    flops = step_flops(model, plan, world, length)
    return {
        "parameters": parameters,
        "active_parameters": active,
        "flops_per_step": flops.total,
        "attention_flops_per_step": flops.attention,
        "training_flops": (before + flops.times(plan.stop - plan.start)).total,
    }


def count_flops(model: nn.Module, batch: int, length: int) -> Flops:
    """FLOPs of forward and backward on `batch` instances of `length` tokens; the model is not changed.

    model: a causal language model of transformers or of this package, whole (not sharded). Only parameters that require
    gradients have weight gradients. Expert Choice rounds its capacity over the micro-batch: give that as `batch`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin: Any = without_data(model, mode)
    with mode, FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = twin(input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False).logits.sum()
        if loss.requires_grad:
            loss.backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if op in _ATTENTION)
    return Flops(sum(counts.values()) - attention, attention)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, active ones): active are those that one token passes through, embeddings included.

    Of a mixture's experts as many are active as a token chooses, of Expert Choice's as its capacity (the mean over
    tokens), of Lory's merged experts one.
    """
    config = config_of(model)
    chosen = getattr(config, "capacity", None) or getattr(config, "num_experts_per_tok", None) or 1
    layers: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        layer, experts, _ = name.partition(".mlp.experts")
        if experts and parameter.ndim == 3:
            layers[layer].append(parameter)
    idle = 0
    for parameters in layers.values():
        # One parameter holds some experts' matrices of one kind; the frozen and the new experts may be two parameters.
        kinds = {each.shape[1:] for each in parameters}
        experts_here = sum(len(each) for each in parameters) // len(kinds)
        size = sum(each.numel() for each in parameters) // experts_here
        idle += int(size * max(0, experts_here - chosen))
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - idle


def equal_flops_width(dense: LlamaConfig, target: Flops, batch: int, length: int) -> int:
    """The FFN width, a multiple of 8, at which a training step of `dense` costs no fewer FLOPs than `target`.

    FLOPs are linear in the width, so two counts decide.
    """
    narrow, wide = (count_flops(_dense(dense, width), batch, length).products for width in (WIDTH_STEP, 2 * WIDTH_STEP))
    each = (wide - narrow) // WIDTH_STEP
    width = WIDTH_STEP + math.ceil(max(0, target.products - narrow) / each)
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def _dense(config: LlamaConfig, width: int) -> LlamaForCausalLM:
    """A dense model of this shape with another FFN width, without data."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "intermediate_size": width}))


def without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model's structure, in training mode, with fake tensors on the CPU as parameters and buffers."""
    memo: dict[int, Any] = {}
    with mode:
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    twin: Any = copy.deepcopy(model, memo)
    twin.config._attn_implementation = "sdpa"
    twin.config._experts_implementation = "counted"
    for module in twin.modules():
        if hasattr(module, "frozen_gate_up"):
            module.forward = partial(_counted_split, module)
    return twin.train()


def _counted_experts(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The FLOPs of experts that compute the tokens that chose them: K rows per token, whichever experts they are."""
    rows = hidden.repeat_interleave(top_k_index.shape[-1], dim=0)
    gate, up = nn.functional.linear(rows, self.gate_up_proj[0]).chunk(2, dim=-1)
    y = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[0]) * top_k_weights.reshape(-1, 1)
    return y.view(len(hidden), -1, hidden.shape[-1]).sum(1).to(hidden.dtype)


def _counted_split(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The same of experts of which some are frozen (models/mixture/experts.py): their rows have no weight gradient."""
    rows = hidden.repeat_interleave(top_k_index.shape[-1], dim=0)
    border = round(len(rows) * self.num_frozen / self.num_experts)

    def linear(x: Tensor, frozen: Tensor, new: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(x[:border], frozen[0]), nn.functional.linear(x[border:], new[0])])

    gate, up = linear(rows, self.frozen_gate_up, self.new_gate_up).chunk(2, dim=-1)
    y = linear(self.act_fn(gate) * up, self.frozen_down, self.new_down) * top_k_weights.reshape(-1, 1)
    return y.view(len(hidden), -1, hidden.shape[-1]).sum(1).to(hidden.dtype)


def _addmm_in_place(total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# What torch's counter leaves out: it has no formula for accumulating products, nor for attention on CPU.
FORMULAS = {
    aten.addmm_: _addmm_in_place,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_ATTENTION = set(FORMULAS) - {aten.addmm_}
ALL_EXPERTS_FUNCTIONS.register("counted", _counted_experts)
