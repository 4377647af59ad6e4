"""The loss of every predicted token and its gradient, without the logits of the whole batch.

Logits `[N, V]` are the largest tensor of a training step, and between the output layer and its gradient four of that
size are written: the logits, their log-softmax, the gradient of each. Here rows pass through the output layer, the loss
and the gradient of both in chunks that stay in the cache, in one go: when the loss is known, so are the gradients of
the layer's input and weights, but for the factor that comes from behind.

    logits = x W^T      log p = log softmax(logits)      loss = -log p[target]
    g = p - onehot(target)      dx = g W      dW = g^T x

Same products as the plain way, in the precision of autocast, softmax in fp32. Cost in memory: two chunks of logits, dx
and, where the weights train, dW. At width 64 and a vocabulary of 4,096 it takes 0.4 of the plain way's time on a CPU
(docs/benchmarks.md); torch.nn.functional.linear_cross_entropy takes 0.55, and does not tell the loss of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclectus.models.losses.router_losses import at_least_fp32

# Logits of a chunk: 8 MB fit in a CPU's cache; on a GPU a chunk must be worth a kernel's start.
CHUNK = {"cpu": 2**21, "cuda": 2**27}
LEAST_ROWS = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class TokenLosses:
    """total: the sum, with gradient. each: `[N]` in nats, fp32, without."""

    total: Tensor
    each: Tensor


def token_losses(x: Tensor, head: nn.Module, targets: Tensor) -> TokenLosses:
    """Cross-entropies of the next token. x: inputs of the output layer `[N, H]`. targets: `[N]` int64.

    An output layer that is no plain product with one matrix or several (`weights_of`) is called as it is.
    """
    weights = weights_of(head)
    if weights is None:
        losses = F.cross_entropy(at_least_fp32(head(x)), targets, reduction="none")
        return TokenLosses(losses.sum(), losses.detach())
    total, each = _Fused.apply(x, targets, *weights)  # type: ignore[no-untyped-call]
    return TokenLosses(total, each)


def weights_of(head: nn.Module) -> tuple[nn.Parameter, ...] | None:
    """The matrices `[V_i, H]` of an output layer whose logits are products with each, side by side; None for others."""
    if type(head) is nn.Linear and head.bias is None:
        return (head.weight,)
    blocks: Callable[[], tuple[nn.Parameter, ...]] | None = getattr(head, "blocks", None)
    return blocks() if blocks else None


@contextmanager
def losses_in_place_of_logits(model: nn.Module, rows: Tensor, targets: Tensor) -> Iterator[list[TokenLosses]]:
    """Within the block the model's output layer computes losses instead of logits, and notes them in the list.

    rows: positions in `[B * L]` of its input that have a target. targets: of these, `[N]`. The logits that the model
    returns are `[1, N, 0]`. The layer is used where the model uses it, so that FSDP2 and DDP know of its gradients.
    """
    head: nn.Module = cast(Any, model).get_output_embeddings()
    found: list[TokenLosses] = []
    plain = head.forward

    def forward(x: Tensor) -> Tensor:
        chosen = x.flatten(0, 1).index_select(0, rows)
        head.forward = plain
        found.append(token_losses(chosen, head, targets))
        return x.new_empty(1, len(rows), 0)

    head.forward = forward
    try:
        yield found
    finally:
        # The class's own again.
        head.__dict__.pop("forward", None)


class _Fused(torch.autograd.Function):
    """(sum of losses, losses) of x `[N, H]`, targets `[N]` and weights `[V_i, H]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        wants_x, _, *wants = ctx.needs_input_grad
        kind = x.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        dx = torch.empty_like(x) if wants_x else None
        # Sums over chunks, in fp32 at least.
        dws = [torch.zeros_like(each) if want else None for each, want in zip(weights, wants, strict=True)]
        losses = x.new_empty(len(x), dtype=at_least_fp32(x).dtype)
        with torch.autocast(kind, enabled=False):
            inputs, matrices = x.to(half), [each.to(half) for each in weights]
            size = _rows(kind, sum(map(len, matrices)))
            for begin in range(0, len(x), size):
                part = slice(begin, begin + size)
                gradient = _gradient_of_logits(inputs[part], matrices, targets[part], losses[part])
                if any(ctx.needs_input_grad):
                    _add_gradients(gradient.to(half), inputs[part], matrices, None if dx is None else dx[part], dws)
        ctx.gradients = dx, dws
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dws = ctx.gradients
        ctx.gradients = None
        return _times(dx, factor), None, *(_times(each, factor) for each in dws)


def _rows(kind: str, vocabulary: int) -> int:
    return max(LEAST_ROWS.get(kind, LEAST_ROWS["cuda"]), CHUNK.get(kind, CHUNK["cuda"]) // vocabulary)


def _gradient_of_logits(x: Tensor, matrices: Sequence[Tensor], targets: Tensor, losses: Tensor) -> Tensor:
    """softmax - onehot `[n, V]`; writes the losses `[n]`."""
    logits = x @ matrices[0].t() if len(matrices) == 1 else torch.cat([x @ each.t() for each in matrices], -1)
    log_p = at_least_fp32(logits).log_softmax(-1)
    del logits
    at = targets.unsqueeze(-1)
    losses.copy_(log_p.gather(-1, at).squeeze(-1).neg_())
    return log_p.exp_().scatter_add_(-1, at, log_p.new_full((), -1.0).expand(at.shape))


def _add_gradients(
    gradient: Tensor, x: Tensor, matrices: Sequence[Tensor], dx: Tensor | None, dws: Sequence[Tensor | None]
) -> None:
    """Writes dx `[n, H]` and adds to dW, where they are wanted."""
    parts = gradient.split([len(each) for each in matrices], -1)
    if dx is not None:
        products = [part @ each for part, each in zip(parts, matrices, strict=True)]
        dx.copy_(torch.stack(products).sum(0) if len(products) > 1 else products[0])
    for part, dw in zip(parts, dws, strict=True):
        if dw is None:
            continue
        if dw.dtype == x.dtype:
            torch.addmm(dw, part.t(), x, out=dw)
        else:
            dw.add_(part.t() @ x)


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.mul_(factor)
