"""Merge the experts of every segment into one SwiGLU FFN and apply it (Lory, docs/methods.md 1.1).

    theta_bar(s) = sum_i e[s, i] * theta_i            one GEMM  [S, E] x [E, P]
    y(s)         = (silu(x G^T) * (x U^T)) V          G, U, V are cut out of theta_bar(s)

The experts are one tensor `[E, 3F, D]` (rows: gate, up, down transposed; P = 3FD), so that one GEMM merges all three
matrices, one distributes the gradient to the experts (e^T dW) and one to the weights (dW experts^T).

Cost: E/T of the FFN's FLOPs, with T tokens per segment. Segments are processed in blocks and their merged weights are
recomputed in the backward pass, so memory is bounded whatever the number of segments, experts and layers.
Saved for backward: x, e and the two hidden projections, 2F numbers per token (a stock LlamaMLP saves 4F).
`benchmarks/lory_step.py` compares it with the direct form and the dense FFN.

Shapes: S segments, T tokens per segment, D width, F FFN width, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Blocks of this size keep merged weights and hidden states in the CPU's caches. But every block reads all experts, so
# larger FFNs take 8 segments per block if they fit in CPU_MOST_BYTES (3% faster than 4, docs/benchmarks.md).
CPU_CACHE_BYTES = 4 << 20
CPU_MOST_BYTES = 128 << 20
CPU_LEAST_SEGMENTS = 8
# On a GPU a block must fill the device: at D 1024, F 2816 in bf16 this is 15 segments of 256 tokens.
GPU_BYTES = 512 << 20


def segments_per_block(segments: int, merged_bytes: int, device_type: str, block_bytes: int | None = None) -> int:
    """Segments to process at once: the merged weights of one take `merged_bytes`, their gradients as much again."""
    cost = 2 * merged_bytes
    if block_bytes is not None:
        most = block_bytes // cost
    elif device_type == "cpu":
        most = max(CPU_CACHE_BYTES // cost, min(CPU_LEAST_SEGMENTS, CPU_MOST_BYTES // cost))
    else:
        most = GPU_BYTES // cost
    blocks = -(-segments // max(1, min(segments, most)))
    return -(-segments // blocks)


def merge_experts(weights: Tensor, experts: Tensor) -> Tensor:
    """Merged FFN parameters `[..., 3F, D]`: the experts `[E, 3F, D]` averaged with weights `[..., E]`."""
    merged = torch.matmul(weights.to(experts.dtype), experts.flatten(1))
    return merged.view(*weights.shape[:-1], *experts.shape[1:])


def apply_merged(x: Tensor, merged: Tensor) -> Tensor:
    """SwiGLU FFN of each row: x `[S, T, D]` with merged parameters `[S, 3F, D]`, or `[1, 3F, D]` for all rows."""
    width = merged.shape[-2] // 3
    if merged.shape[0] == 1:
        gate_up, down = merged[0].split([2 * width, width])
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down
    gate_up, down = merged.split([2 * width, width], dim=1)
    gate, up = torch.bmm(x, gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down)


def reference_merged_ffn(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """`merged_ffn` as the formula in docs/methods.md 1.1: slow and large, the reference for tests and benchmarks."""
    gate, up, down = torch.einsum("...e,efd->...fd", weights, experts).chunk(3, dim=-2)
    hidden = F.silu(torch.einsum("...td,...fd->...tf", x, gate)) * torch.einsum("...td,...fd->...tf", x, up)
    return torch.einsum("...tf,...fd->...td", hidden, down)


def merged_ffn(x: Tensor, weights: Tensor, experts: Tensor, block_bytes: int | None = None, frozen: int = 0) -> Tensor:
    """Applies to each segment its own mixture of the experts.

    Args:
        x: `[..., T, D]` hidden states, grouped in segments of T tokens.
        weights: `[..., E]` one mixture per segment; the leading dimensions are those of `x`.
        experts: `[E, 3F, D]` gate rows, up rows and transposed down rows of each expert.
        block_bytes: memory for merged weights and their gradients; chosen by device when None.
        frozen: leading experts whose gradient is not needed: it is 0 and costs nothing (not under torch.compile).

    Returns `[..., T, D]`, in autocast's dtype if autocast is on. Raises ValueError for shapes that do not fit.
    """
    tokens, width = x.shape[-2:]
    if weights.shape[:-1] != x.shape[:-2] or weights.shape[-1] != experts.shape[0] or experts.shape[2] != width:
        raise ValueError(
            f"Shapes do not fit: x {tuple(x.shape)} [..., T, D], weights {tuple(weights.shape)} [..., E], "
            f"experts {tuple(experts.shape)} [E, 3F, D]."
        )
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else experts.dtype
    x_STD = x.reshape(-1, tokens, width).to(dtype)
    e_SE = weights.reshape(-1, weights.shape[-1]).to(dtype)
    merged_bytes = experts.shape[1] * width * x_STD.element_size()
    block = segments_per_block(x_STD.shape[0], merged_bytes, device_type, block_bytes)
    with torch.autocast(device_type, enabled=False):
        if torch.compiler.is_compiling():
            y_STD, _ = _compiled_merged_ffn(x_STD, e_SE, experts, block)
        elif torch.is_grad_enabled():
            y_STD = _MergedFFN.apply(x_STD, e_SE, experts, block, frozen)
        else:
            y_STD = _forward(x_STD, e_SE, experts.to(dtype), block, None)
    return y_STD.view(x.shape)


def _forward(x: Tensor, e: Tensor, experts: Tensor, block: int, gate_up: Tensor | None) -> Tensor:
    """The blockwise forward pass; `gate_up` `[S, T, 2F]`, if given, receives the hidden projections."""
    segments, rows, width = x.shape[0], experts.shape[1], experts.shape[1] // 3
    flat = experts.flatten(1)
    y = torch.empty_like(x)
    merged_block = x.new_empty(min(block, segments), rows, x.shape[2])
    for start in range(0, segments, block):
        here = slice(start, min(start + block, segments))
        merged = merged_block[: here.stop - start]
        torch.mm(e[here], flat, out=merged.flatten(1))
        projections = merged[:, : 2 * width].transpose(1, 2)
        if gate_up is None:
            hidden_pair = torch.bmm(x[here], projections)
        else:
            hidden_pair = torch.bmm(x[here], projections, out=gate_up[here])
        hidden = F.silu(hidden_pair[..., :width]).mul_(hidden_pair[..., width:])
        torch.bmm(hidden, merged[:, 2 * width :], out=y[here])
    return y


def _forward_saving(x: Tensor, e: Tensor, experts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    gate_up = x.new_empty(*x.shape[:2], experts.shape[1] // 3 * 2)
    return _forward(x, e, experts.to(x.dtype), block, gate_up), gate_up


def _backward(
    dy: Tensor,
    x: Tensor,
    e: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    block: int,
    needs: tuple[bool, bool, bool] = (True, True, True),
    frozen: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, e and experts, block by block; None for those that `needs` does not ask for."""
    segments, rows, width = x.shape[0], experts.shape[1], experts.shape[1] // 3
    flat = experts.to(x.dtype).flatten(1)
    dy = dy.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    de = torch.empty_like(e) if needs[1] else None
    d_experts = None
    merged_block = x.new_empty(min(block, segments), rows, x.shape[2])
    d_merged_block = torch.empty_like(merged_block)
    for start in range(0, segments, block):
        here = slice(start, min(start + block, segments))
        merged, d_merged = merged_block[: here.stop - start], d_merged_block[: here.stop - start]
        torch.mm(e[here], flat, out=merged.flatten(1))
        gate, up = gate_up[here, :, :width], gate_up[here, :, width:]
        d_hidden = torch.bmm(dy[here], merged[:, 2 * width :].transpose(1, 2))
        activated = F.silu(gate)
        d_pair = torch.empty_like(gate_up[here])
        torch.mul(d_hidden, activated, out=d_pair[..., width:])
        torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_pair[..., :width])
        if dx is not None:
            torch.bmm(d_pair, merged[:, : 2 * width], out=dx[here])
        if not (needs[1] or needs[2]):
            continue
        torch.bmm(d_pair.transpose(1, 2), x[here], out=d_merged[:, : 2 * width])
        torch.bmm(activated.mul_(up).transpose(1, 2), dy[here], out=d_merged[:, 2 * width :])
        if de is not None:
            torch.mm(d_merged.flatten(1), flat.t(), out=de[here])
        if needs[2]:
            d_experts = _accumulate(d_experts, e[here, frozen:].t(), d_merged.flatten(1), experts.dtype)
    if d_experts is not None:
        d_experts = d_experts.view(-1, *experts.shape[1:]).to(experts.dtype)
        if frozen:
            # Zeros that nobody reads are not even in memory, on a CPU.
            whole = experts.new_zeros(experts.shape)
            whole[frozen:] = d_experts
            d_experts = whole
    return dx, de, d_experts


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left @ right`, accumulated in at least fp32: in bf16 small contributions would be rounded away."""
    dtype = torch.promote_types(dtype, torch.float32)
    if total is None:
        return torch.mm(left, right).to(dtype)
    if right.dtype == dtype:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))


class _MergedFFN(torch.autograd.Function):
    """`merged_ffn` on x `[S, T, D]` and e `[S, E]` in the compute dtype, experts in the dtype of the parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, experts: Tensor, block: int, frozen: int) -> Tensor:
        y, gate_up = _forward_saving(x, e, experts, block)
        ctx.save_for_backward(x, e, experts, gate_up)
        ctx.block, ctx.frozen = block, frozen
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, e, experts, gate_up = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            gradients = _backward(dy, x, e, experts, gate_up, ctx.block, ctx.needs_input_grad[:3], ctx.frozen)
        return *gradients, None, None


# Opaque to torch.compile, which would otherwise see that forward and backward merge the same weights, and keep the
# merged weights of all layers instead of recomputing them.
@torch.library.custom_op("eclectus::merged_ffn", mutates_args=())
def _compiled_merged_ffn(x: Tensor, e: Tensor, experts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return _forward_saving(x, e, experts, block)


@torch.library.custom_op("eclectus::merged_ffn_backward", mutates_args=())
def _compiled_backward(
    dy: Tensor, x: Tensor, e: Tensor, experts: Tensor, gate_up: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx, de, d_experts = _backward(dy, x, e, experts, gate_up, block)
    assert dx is not None and de is not None and d_experts is not None
    return dx, de, d_experts


@_compiled_merged_ffn.register_fake
def _(x: Tensor, e: Tensor, experts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:2], experts.shape[1] // 3 * 2)


@_compiled_backward.register_fake
def _(dy: Tensor, x: Tensor, e: Tensor, experts: Tensor, gate_up: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(e), torch.empty_like(experts)


def _save_for_compiled_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.block = inputs[3]


def _run_compiled_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_compiled_backward(dy, *ctx.saved_tensors, ctx.block), None


_compiled_merged_ffn.register_autograd(_run_compiled_backward, setup_context=_save_for_compiled_backward)
