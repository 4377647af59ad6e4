"""Grouped GEMMs over new experts followed by frozen ones, with weight gradients only for experts that train.

`torch.nn.functional.grouped_mm` multiplies the rows of each group by that group's matrix in one kernel. Autograd's own
formula would compute the weight gradients of all groups or of none; ours stops after the last group that trains. Rows
of a group are contiguous, `ends_E[i]` is where group i ends; both stay on the device.

On CPU in fp32 grouped_mm is as fast as a loop of matrix products (0.13 ms against 0.13 ms for 512 rows of 64 x 128,
13.3 against 13.1 ms for 2048 rows of 256 x 1024), so both devices use it; the loop is only for what the kernel refuses:
sizes whose rows do not start at multiples of 16 bytes, and fp64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def expert_linear(x_SD: Tensor, new_NFD: Tensor, frozen_MFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row s of x times the matrix of its group: `[S, D]` to `[S, F]`; the groups are new experts, then frozen ones.

    ends_E: int32 `[N + M]`, the end of each group's rows. Weights are cast to the dtype of x.
    """
    if torch.compiler.is_compiling():
        return _compiled_expert_linear(x_SD, new_NFD, frozen_MFD, ends_E)
    return _ExpertLinear.apply(x_SD, new_NFD, frozen_MFD, ends_E)


def dispatch_tokens(x_TH: Tensor, permutation_S: Tensor, top_k: int) -> Tensor:
    """Row of token s // top_k for every s of the permutation: `[T, H]` to `[T * top_k, H]`, sorted by expert."""
    return _Dispatch.apply(x_TH, permutation_S, top_k)


def combine_tokens(y_SH: Tensor, weights_TK: Tensor, permutation_S: Tensor) -> Tensor:
    """Weighted sum of each token's K expert outputs: `[T * K, H]` sorted by expert to `[T, H]`.

    Sums in the wider of the two dtypes, in the router's order, so that the result is deterministic.
    """
    return _Combine.apply(y_SH, weights_TK, permutation_S)


def grouped_rows(x_SD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """`[S, F]`: the rows of group i times w[i]. Rows after the last end are undefined."""
    if _grouped(x_SD) and _grouped(w_EDF):
        return torch.nn.functional.grouped_mm(x_SD, w_EDF, offs=ends_E)
    out_SF = x_SD.new_zeros(x_SD.shape[0], w_EDF.shape[2])
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        torch.mm(x_SD[start:end], w_EDF[group], out=out_SF[start:end])
        start = end
    return out_SF


def grouped_outer(g_SF: Tensor, x_SD: Tensor, ends_E: Tensor) -> Tensor:
    """`[E, F, D]`: for each group, the sum over its rows of g outer x. Rows after the last end are ignored."""
    if _grouped(g_SF) and _grouped(x_SD):
        out_EFD = torch.nn.functional.grouped_mm(g_SF.T, x_SD, offs=ends_E)
        # On Blackwell the kernel leaves groups without rows unwritten (pytorch issue 172439).
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        return out_EFD.masked_fill_(empty_E.view(-1, 1, 1), 0.0)
    out_EFD = x_SD.new_zeros(ends_E.numel(), g_SF.shape[1], x_SD.shape[1])
    start = 0
    for group, end in enumerate(ends_E.tolist()):
        torch.mm(g_SF[start:end].T, x_SD[start:end], out=out_EFD[group])
        start = end
    return out_EFD


def _grouped(tensor: Tensor) -> bool:
    """Whether the grouped kernel takes the tensor: its dtype, and every row and matrix at a multiple of 16 bytes."""
    aligned = all(stride == 1 or stride * tensor.itemsize % 16 == 0 for stride in tensor.stride())
    return aligned and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _side_by_side(new: Tensor, frozen: Tensor, dtype: torch.dtype, fill: bool = True) -> Tensor:
    """`[N + M, F, D]` in `dtype`: a view if the two are adjacent in one allocation, else a copy.

    Where the frozen ones are of `dtype` and the new ones are not, and there is room for these in front of the former
    (`room_for_new`), the new ones are cast into it. fill: False if that was done in this step's forward pass.
    """
    count = len(new) + len(frozen)
    if new.dtype == frozen.dtype == dtype and _adjacent(new, frozen):
        return new.as_strided((count, *new.shape[1:]), new.stride(), new.storage_offset())
    if frozen.dtype == dtype != new.dtype and has_room(frozen, new):
        # `.data` has a version counter of its own: the frozen part, which backward has saved, does not change.
        both = frozen.data.as_strided((count, *new.shape[1:]), frozen.stride(), 0)
        if fill:
            both[: len(new)] = new
        return both
    both = torch.empty((count, *new.shape[1:]), dtype=dtype, device=new.device)
    both[: len(new)] = new
    both[len(new) :] = frozen
    return both


def _adjacent(new: Tensor, frozen: Tensor) -> bool:
    return (
        new.is_contiguous()
        and frozen.is_contiguous()
        and new.untyped_storage().data_ptr() == frozen.untyped_storage().data_ptr()
        and new.storage_offset() + new.numel() == frozen.storage_offset()
    )


def room_for_new(new: Tensor, frozen: Tensor) -> Tensor:
    """A copy of the frozen matrices at the end of an allocation that begins with room for the new ones."""
    both = torch.empty((len(new) + len(frozen), *frozen.shape[1:]), dtype=frozen.dtype, device=frozen.device)
    both[len(new) :] = frozen
    return both[len(new) :]


def has_room(frozen: Tensor, new: Tensor) -> bool:
    """Whether `frozen` is as `room_for_new` makes it."""
    whole = (new.numel() + frozen.numel()) * frozen.itemsize
    plain = type(frozen) in (Tensor, torch.nn.Parameter) and frozen.is_contiguous()
    return plain and frozen.storage_offset() == new.numel() and frozen.untyped_storage().nbytes() == whole


def _forward(x_SD: Tensor, new_NFD: Tensor, frozen_MFD: Tensor, ends_E: Tensor) -> Tensor:
    return grouped_rows(x_SD, _side_by_side(new_NFD, frozen_MFD, x_SD.dtype).transpose(-2, -1), ends_E)


def _backward(
    g_SF: Tensor, x_SD: Tensor | None, new_NFD: Tensor, frozen_MFD: Tensor, ends_E: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, new and frozen experts; None for those that `needs` does not ask for. x: None if it is neither of
    the last two."""
    g_SF = g_SF.contiguous()
    grad_x = grad_new = grad_frozen = None
    if needs[0]:
        grad_x = grouped_rows(g_SF, _side_by_side(new_NFD, frozen_MFD, g_SF.dtype, fill=False), ends_E)
    if needs[2]:
        assert x_SD is not None
        grad_EFD = grouped_outer(g_SF, x_SD, ends_E)
        grad_frozen = grad_EFD[len(new_NFD) :].to(frozen_MFD.dtype)
        grad_new = grad_EFD[: len(new_NFD)].to(new_NFD.dtype) if needs[1] else None
    elif needs[1]:
        assert x_SD is not None
        grad_new = grouped_outer(g_SF, x_SD, ends_E[: len(new_NFD)]).to(new_NFD.dtype)
    return grad_x, grad_new, grad_frozen


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x_SD, *weights_and_ends = inputs
    trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    # The concatenation, if there was one, is repeated in backward instead of being kept for every layer.
    ctx.save_for_backward(x_SD if trains else None, *weights_and_ends)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, new_NFD: Tensor, frozen_MFD: Tensor, ends_E: Tensor) -> Tensor:
        _save(ctx, (x_SD, new_NFD, frozen_MFD, ends_E), x_SD)
        return _forward(x_SD, new_NFD, frozen_MFD, ends_E)

    @staticmethod
    def backward(ctx: Any, g_SF: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, new_NFD, frozen_MFD, ends_E = ctx.saved_tensors
        return *_backward(g_SF, x_SD, new_NFD, frozen_MFD, ends_E, ctx.needs_input_grad), None


# Opaque to torch.compile, which cannot trace where a tensor lies in memory, and would keep a concatenation.
@torch.library.custom_op("eclectus::expert_linear", mutates_args=())
def _compiled_expert_linear(x: Tensor, new: Tensor, frozen: Tensor, ends: Tensor) -> Tensor:
    return _forward(x, new, frozen, ends)


@torch.library.custom_op("eclectus::expert_linear_backward", mutates_args=())
def _compiled_backward(
    g: Tensor, x: Tensor | None, new: Tensor, frozen: Tensor, ends: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, but empty where it returns None, and in memory of their own: an operator returns tensors that
    share none."""
    found = _backward(g, x, new, frozen, ends, needs)
    dx, d_new, d_frozen = (g.new_empty(0) if each is None else each for each in found)
    return dx, d_new.clone() if needs[2] else d_new, d_frozen


@_compiled_expert_linear.register_fake
def _(x: Tensor, new: Tensor, frozen: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], new.shape[1])


@_compiled_backward.register_fake
def _(
    g: Tensor, x: Tensor | None, new: Tensor, frozen: Tensor, ends: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((g.shape[0], new.shape[2]), new.shape, frozen.shape)
    dtypes = (g.dtype, new.dtype, frozen.dtype)
    dx, d_new, d_frozen = (
        g.new_empty(shape if need else (0,), dtype=dtype if need else g.dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )
    return dx, d_new, d_frozen


def _run_compiled_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = _compiled_backward(g, *ctx.saved_tensors, needs)
    return *(each if need else None for each, need in zip(found, needs, strict=True)), None


_compiled_expert_linear.register_autograd(_run_compiled_backward, setup_context=_save)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, permutation_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(permutation_S)
        ctx.top_k = top_k
        return x_TH.index_select(0, permutation_S // top_k)

    @staticmethod
    def backward(ctx: Any, g_SH: Tensor) -> tuple[Tensor, None, None]:
        (permutation_S,) = ctx.saved_tensors
        # A gather and a sum instead of autograd's scatter-add: deterministic on CUDA.
        g_TKH = g_SH.index_select(0, _inverse(permutation_S)).view(-1, ctx.top_k, g_SH.shape[-1])
        return g_TKH.sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SH: Tensor, weights_TK: Tensor, permutation_S: Tensor) -> Tensor:
        ctx.save_for_backward(y_SH, weights_TK, permutation_S)
        y_TKH = y_SH.index_select(0, _inverse(permutation_S)).view(*weights_TK.shape, -1)
        return (y_TKH * weights_TK.unsqueeze(-1)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, g_TH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y_SH, weights_TK, permutation_S = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            g_SH = (g_TH.unsqueeze(1) * weights_TK.unsqueeze(-1)).flatten(0, 1)
            grad_y = g_SH.index_select(0, permutation_S).to(y_SH.dtype)
        if ctx.needs_input_grad[1]:
            y_TKH = y_SH.index_select(0, _inverse(permutation_S)).view(*weights_TK.shape, -1)
            grad_weights = (g_TH.unsqueeze(1) * y_TKH).sum(dim=-1).to(weights_TK.dtype)
        return grad_y, grad_weights, None


def _inverse(permutation_S: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation_S)
    inverse[permutation_S] = torch.arange(permutation_S.numel(), device=permutation_S.device)
    return inverse
