"""The two router losses of MoE-LPR, on raw router logits (docs/methods.md 2.2, 2.3; arXiv 2408.11396).

    balance  = sum_i f_i * P_i         f_i: share of the top-K choices that fell on expert i,  P_i: mean probability
    LPR      = mean of -log G_0        over the tokens of original languages

Both read `router_logits` as transformers 5 returns it: a tuple over layers of `[tokens, experts]`, before any softmax.
Both cost one softmax over `[tokens, experts]` per layer, never wait for the device, and compute in at least fp32. f and
P are over all tokens of a training step (`models/losses/step.py`): given the step's f (`choices`), the balance is
linear in P, so that of the step is the mean of its micro-batches', weighted by their tokens.

The paper's *released* code differs from the paper in both losses, and its coefficients were tuned with that code: the
balance is not divided by K (uniform routing gives K, not 1), and the LPR applies cross-entropy to probabilities, a
second softmax. Both forms are implemented; the paper's is the default.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

BalanceScaling = Literal["paper", "released"]
PriorForm = Literal["paper", "released"]


def balance_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    scaling: BalanceScaling = "paper",
    mask: Tensor | None = None,
    choices: Sequence[Tensor] | None = None,
) -> Tensor:
    """Load balance over experts, computed for each layer and averaged over layers (docs/methods.md 2.2).

    router_logits: by layer, `[tokens, experts]` raw logits.  top_k: experts per token.
    scaling: `paper` gives 1 under uniform routing, `released` gives top_k.
    mask: `[tokens]` (any shape with that many elements), true where a token counts, which padding does not.
    choices: the result of `count_choices`, added up over all tokens of a training step, of which these may be a part;
        the losses of the parts, weighted by their tokens, then average to the step's. None: these are all tokens.
    Returns a scalar; the gradient flows through the probabilities only, as in the paper.
    Raises ValueError for an empty list, an unknown scaling, or a top_k outside 1..experts.
    """
    if scaling not in ("paper", "released"):
        raise ValueError(f"unknown balance scaling {scaling!r}: choose 'paper' or 'released'")
    if choices is None:
        choices = count_choices(router_logits, top_k, mask)
    divisor = top_k if scaling == "paper" else 1
    losses = []
    for logits, choices_N in zip(router_logits, choices, strict=True):
        logits_TN = at_least_fp32(logits)
        probabilities_TN = torch.log_softmax(logits_TN, dim=-1).exp()
        tokens = (choices_N.sum() // top_k).clamp(min=1)
        share_N = choices_N.to(logits_TN.dtype) / tokens * (logits.shape[1] / divisor)
        losses.append((share_N * _masked_mean(probabilities_TN, mask)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def count_choices(router_logits: Sequence[Tensor], top_k: int, mask: Tensor | None = None) -> list[Tensor]:
    """By layer, how many tokens have each expert among their top K: `[experts]` int64. Arguments as in `balance_loss`.

    Raises ValueError for an empty list or a top_k outside 1..experts.
    """
    least = min(_check_logits(router_logits))
    if not 1 <= top_k <= least:
        raise ValueError(f"top_k is {top_k}, but the router logits hold {least} experts: choose 1 to {least}")
    counted = []
    for logits in router_logits:
        chosen_TK = torch.topk(at_least_fp32(logits), top_k, dim=-1).indices
        counts_TK = torch.ones_like(chosen_TK)
        if mask is not None:
            counts_TK *= mask.reshape(-1, 1).to(device=counts_TK.device, dtype=counts_TK.dtype)
        none_N = counts_TK.new_zeros(logits.shape[1])
        counted.append(none_N.scatter_add_(0, chosen_TK.flatten(), counts_TK.flatten()))
    return counted


def language_prior_loss(
    router_logits: Sequence[Tensor],
    original_mask: Tensor,
    form: PriorForm = "paper",
    original_experts: int | Sequence[int] = 1,
) -> Tensor:
    """Language priors routing: pulls tokens of original languages to the original expert (docs/methods.md 2.3).

    router_logits: by layer, `[tokens, experts]` raw logits.
    original_mask: `[tokens]` (any shape with that many elements), true on tokens of an original language.
    form: `paper` is -log softmax(logits)[0]; `released` is -log softmax(softmax(logits))[0].
    original_experts: number of leading experts that count as original (their probabilities are added), one number or
        one per layer; more than one for a model that is extended again.
    Returns a scalar, the mean over layers and original tokens; 0, with zero gradient, if there are no such tokens.
    Raises ValueError for an empty list, an unknown form, or a mask of another length.
    """
    experts = _check_logits(router_logits)
    if form not in ("paper", "released"):
        raise ValueError(f"unknown form of the language prior loss {form!r}: choose 'paper' or 'released'")
    originals = [original_experts] * len(experts) if isinstance(original_experts, int) else list(original_experts)
    for original, number in zip(originals, experts, strict=True):
        if not 1 <= original < number:
            raise ValueError(f"original_experts is {original}: with {number} experts choose 1 to {number - 1}")
    tokens = router_logits[0].shape[0]
    if original_mask.numel() != tokens:
        raise ValueError(f"original_mask has {original_mask.numel()} elements, the router saw {tokens} tokens")
    mask_T = original_mask.reshape(-1).to(torch.bool)
    losses = []
    for logits, original in zip(router_logits, originals, strict=True):
        scores_TN = at_least_fp32(logits)
        if form == "released":
            scores_TN = torch.softmax(scores_TN, dim=-1)
        log_prior_T = torch.log_softmax(scores_TN, dim=-1)[:, :original].logsumexp(dim=-1)
        on_layer_T = mask_T.to(log_prior_T.device)
        # A division by at least 1 instead of a branch: the count stays on the device.
        count = on_layer_T.sum().clamp(min=1)
        losses.append(-torch.where(on_layer_T, log_prior_T, 0.0).sum() / count)
    return torch.stack(losses).mean()


def _check_logits(router_logits: Sequence[Tensor]) -> list[int]:
    """Returns the number of experts of each layer. Raises ValueError if these are not router logits by layer."""
    if isinstance(router_logits, Tensor) or not router_logits:
        raise ValueError("router_logits must be a non-empty list or tuple over layers (output_router_logits=True)")
    for layer, logits in enumerate(router_logits):
        if logits.dim() != 2 or len(logits) != len(router_logits[0]):
            raise ValueError(f"router_logits[{layer}] has shape {tuple(logits.shape)}, expected [tokens, experts]")
    return [logits.shape[1] for logits in router_logits]


def at_least_fp32(logits: Tensor) -> Tensor:
    """The logits in fp32 if they are of half precision."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _masked_mean(values_TN: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens where `mask` is true; 0 if there are none."""
    if mask is None:
        return values_TN.mean(dim=0)
    weights_T = mask.reshape(-1).to(device=values_TN.device, dtype=values_TN.dtype)
    return (values_TN * weights_T.unsqueeze(-1)).sum(dim=0) / weights_T.sum().clamp(min=1)
