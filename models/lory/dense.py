"""Maps names and tensors of a LlamaForCausalLM to those of a LoryForCausalLM.

An expert is one slice `[3F, D]` of a layer's `mlp.experts`: gate rows, up rows, transposed down rows
(models/lory/merge.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def dense_ffn_names(layer: int) -> tuple[str, str, str]:
    """Names of a LlamaForCausalLM layer's gate, up and down weights."""
    gate, up, down = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
    return gate, up, down


def expand_dense_tensors(
    dense: Mapping[str, Tensor], num_experts: int, scale: float = 1.0, shared_memory: bool = False
) -> dict[str, Tensor]:
    """From tensors named as in a LlamaForCausalLM to those of a Lory model: each FFN becomes E equal experts.

    For weights, and for AdamW's moments after a dense warm-up. Each copy receives about 1/E of the dense gradient, so
    use `scale=1/E` for `exp_avg` and `scale=1/E**2` for `exp_avg_sq`: the experts' next step then equals the dense
    model's. Only FFN tensors are scaled. Routers have no dense counterpart and are not in the result. The result shares
    no memory with `dense`. shared_memory: the experts of a layer are read-only views of one FFN and take no more
    memory.
    """
    lory = {}
    for name, tensor in dense.items():
        prefix, ffn, part = name.partition(".mlp.")
        if not ffn:
            lory[name] = tensor.clone()
        elif part == "gate_proj.weight":
            up, down = dense[f"{prefix}.mlp.up_proj.weight"], dense[f"{prefix}.mlp.down_proj.weight"]
            fused = torch.cat([tensor, up, down.t()])
            experts = (fused * scale).expand(num_experts, -1, -1)
            lory[f"{prefix}.mlp.experts"] = experts if shared_memory else experts.contiguous()
    return lory


def split_expert(merged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate `[F, D]`, up `[F, D]` and down `[D, F]` weights of one expert, or of a merged FFN, `[3F, D]`."""
    gate, up, down = merged.chunk(3, dim=0)
    return gate.contiguous(), up.contiguous(), down.t().contiguous()
