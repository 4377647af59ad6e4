"""Causal attention on CPUs, in blocks of queries that read no key behind them: half of the products, and no mask.

    for each block of queries:   S = q k[: end]^T      P = softmax(S)      out = P v[: end]
    backward:                    dv += P^T g      dS = P (g v^T - sum(g out))      dq = dS k      dk += dS^T q

P is kept for the backward pass: 2 L^2 bytes per head and instance in fp32, so only up to LONGEST tokens; there torch's
kernel for CPUs takes 1.4 to 1.6 times as long (docs/benchmarks.md), most of it in the backward pass, which it repeats
the forward pass for. What has a mask, another dtype or is longer goes to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "causal_blocks"
QUERIES, LONGEST = 128, 1024


def causal_blocks_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. query `[B, H, L, D]`; key, value `[B, G, L, D]`. Returns `[B, L, H, D]`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    ours = (
        causal and attention_mask is None and not dropout and query.dtype == torch.float32
        and query.device.type == "cpu" and 1 < length <= LONGEST and key.shape[2] == length
        and not torch.is_autocast_enabled("cpu") and more.get("position_bias") is None and more.get("softcap") is None
    )  # fmt: skip
    if not ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _CausalBlocks.apply(query * scale, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, causal_blocks_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _CausalBlocks(torch.autograd.Function):
    """query `[B, H, L, D]`, scaled; key and value `[B, G, L, D]`, each for H / G heads of the queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups, length = key.shape[0] * key.shape[1], key.shape[2]
        # [B * G, H / G, L, D] and [B * G, L, D]
        q = query.reshape(groups, -1, length, query.shape[-1])
        k, v = key.reshape(groups, length, -1), value.reshape(groups, length, -1)
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        ahead = q.new_full((QUERIES, QUERIES), -torch.inf).triu(1)
        kept = []
        for begin in range(0, length, QUERIES):
            end = min(begin + QUERIES, length)
            size = end - begin
            scores = _rows(q, begin, end) @ k[:, :end].transpose(1, 2)
            scores.view(groups, -1, size, end)[..., begin:].add_(ahead[:size, :size])
            weights = scores.softmax(-1)
            out[:, :, begin:end] = (weights @ v[:, :end]).view(groups, -1, size, v.shape[-1])
            kept.append(weights)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.shapes = query.shape, key.shape, value.shape
        return out.view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, out, *kept = ctx.saved_tensors
        g = gradient.reshape(out.shape)
        # What each row of the softmax's gradient sums to.
        sums = (g * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, weights in enumerate(kept):
            begin = number * QUERIES
            end = begin + weights.shape[1] // q.shape[1]
            rows = _rows(g, begin, end)
            dv[:, :end].baddbmm_(weights.transpose(1, 2), rows)
            ds = (rows @ v[:, :end].transpose(1, 2)).sub_(_rows(sums, begin, end)).mul_(weights)
            dq[:, :, begin:end] = (ds @ k[:, :end]).view(len(q), -1, end - begin, q.shape[-1])
            dk[:, :end].baddbmm_(ds.transpose(1, 2), _rows(q, begin, end))
        shapes = ctx.shapes
        return dq.view(shapes[0]), dk.view(shapes[1]), dv.view(shapes[2])


def _rows(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Rows of all heads of a group, one after the other: `[groups, heads * (end - begin), D]`."""
    return tensor[:, :, begin:end].flatten(1, 2)
