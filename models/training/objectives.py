"""What each training stage minimises, as `objective(model, batch) -> (loss, what else to log)`.

next-token:       mean cross-entropy of the next token                                   (dense, Lory: docs/methods.md 1.1)
balanced:         next-token + transformers' own load-balancing loss                     (top-k baseline: models/pretraining/baselines.py)
post-pretrain:    next-token + alpha * balance over all tokens                           (MoE-LPR stage 1: docs/methods.md 2.2)
review:           next-token + gamma * LPR over tokens of the original languages         (MoE-LPR stage 2: docs/methods.md 2.3)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from eclectus.models.training.instances import IGNORED, Batch
from eclectus.models.training.loop import Objective
from eclectus.models.training.router_losses import balance_loss, language_prior_loss


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, in fp32, 0 where there is nothing to learn. logits [B, L, V]; labels [B, L], IGNORED there."""
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def loss_by_domain(
    logits: torch.Tensor, batch: Batch, domains: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`next_token_loss`, and for each domain `loss/NAME`: [2], its summed loss and its tokens, detached.

    domains: names by their numbers in batch.domains; with none nothing but the loss is computed.
    """
    if not domains:
        return next_token_loss(logits, batch.labels), {}
    labels = batch.labels[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="none")
    real = (labels != IGNORED).to(losses.dtype)
    # The last place takes what belongs to no domain: padding.
    place = torch.where(labels != IGNORED, batch.domains[:, 1:].flatten(), -1) % (len(domains) + 1)
    sums = losses.new_zeros(2, len(domains) + 1).index_add_(1, place, torch.stack([losses.detach(), real]))
    return losses.sum() / real.sum().clamp(min=1), {f"loss/{name}": sums[:, i] for i, name in enumerate(domains)}


def next_token(domains: Sequence[str] = ()) -> Objective:
    """The objective of a dense model. domains: whose losses to log apart, as in `loss_by_domain`."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss_by_domain(model(input_ids=batch.tokens, use_cache=False).logits, batch, domains)

    return objective


def balanced(domains: Sequence[str] = ()) -> Objective:
    """The objective of a top-k mixture from transformers: next-token and its auxiliary loss, with its configuration's weight."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss, by_domain = loss_by_domain(output.logits, batch, domains)
        weight = getattr(model, "module", model).config.router_aux_loss_coef
        return loss + weight * output.aux_loss, {"next_token_loss": loss, "balance_loss": output.aux_loss, **by_domain}

    return objective


def lory(domains: Sequence[str] = ()) -> Objective:
    """The objective of a Lory model: next-token alone; logs the entropy of routing and the share of experts in use."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_weights=True)
        loss, by_domain = loss_by_domain(output.logits, batch, domains)
        return loss, {**routing_metrics(output.router_weights or ()), **by_domain}

    return objective


def routing_metrics(router_weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entropy of routing in nats, and the share of experts whose weight is over 2/E (docs/methods.md 1.7), means over all segments.

    router_weights: by layer [B, N, E]; without any (one expert, or dense routing) there is nothing to say.
    """
    if not router_weights:
        return {}
    weights = torch.stack([layer.detach() for layer in router_weights]).float()
    entropy = -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean()
    used = (weights > 2 / weights.shape[-1]).float().mean()
    return {"router_entropy": entropy, "expert_utilisation": used}


def post_pretrain(alpha: float, top_k: int, scaling: Literal["paper", "released"]) -> Objective:
    """The objective of MoE-LPR's first stage."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss = next_token_loss(output.logits, batch.labels)
        balance = balance_loss(output.router_logits, top_k, scaling, mask=batch.labels != IGNORED)
        return loss + alpha * balance, {"next_token_loss": loss, "balance_loss": balance}

    return objective


def review(
    gamma: float,
    form: Literal["paper", "released"],
    original_languages: Sequence[int],
    original_experts: int | Sequence[int] = 1,
) -> Objective:
    """The objective of MoE-LPR's second stage.

    original_languages: numbers of these languages in the batch's labels. original_experts: as in `language_prior_loss`.
    """

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss = next_token_loss(output.logits, batch.labels)
        original = torch.isin(
            batch.languages, torch.tensor(original_languages, device=batch.languages.device)
        ).flatten()
        prior = language_prior_loss(output.router_logits, original, form, original_experts)
        return loss + gamma * prior, {"next_token_loss": loss, "lpr_loss": prior}

    return objective
