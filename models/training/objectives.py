"""The objective of each training stage, as `objective(model, batch) -> (loss, other metrics)`.

next-token       mean cross-entropy of the next token                            dense, Lory: docs/methods.md 1.1
balanced         next-token + transformers' own load-balancing loss              top-k: models/pretraining/baselines.py
post-pretrain    next-token + alpha * balance over all tokens                    MoE-LPR stage 1: docs/methods.md 2.2
review           next-token + gamma * LPR over tokens of original languages      MoE-LPR stage 2: docs/methods.md 2.3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from eclectus.models.training.instances import IGNORED, Batch
from eclectus.models.training.loop import Objective
from eclectus.models.training.parallel import config_of
from eclectus.models.training.router_losses import balance_loss, language_prior_loss


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, in fp32; 0 without targets. logits [B, L, V]; labels [B, L], IGNORED at padding."""
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def loss_by_domain(
    logits: torch.Tensor, batch: Batch, domains: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`next_token_loss`, and for each domain `loss/NAME`: [2], the sum of its losses and its tokens, detached.

    domains: names by their numbers in batch.domains; if empty, only the loss is computed.
    """
    if not domains:
        return next_token_loss(logits, batch.labels), {}
    labels = batch.labels[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="none")
    real = (labels != IGNORED).to(losses.dtype)
    # The last column collects tokens of no domain, which are padding.
    column = torch.where(labels != IGNORED, batch.domains[:, 1:].flatten(), -1) % (len(domains) + 1)
    sums = losses.new_zeros(2, len(domains) + 1).index_add_(1, column, torch.stack([losses.detach(), real]))
    return losses.sum() / real.sum().clamp(min=1), {f"loss/{name}": sums[:, i] for i, name in enumerate(domains)}


def next_token(domains: Sequence[str] = ()) -> Objective:
    """The objective of a dense model. domains: whose losses to log separately, as in `loss_by_domain`."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss_by_domain(model(input_ids=batch.tokens, use_cache=False).logits, batch, domains)

    return objective


def balanced(domains: Sequence[str] = ()) -> Objective:
    """The objective of a top-k mixture from transformers: next-token and the weighted auxiliary loss of its config."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss, by_domain = loss_by_domain(output.logits, batch, domains)
        weight = config_of(model).router_aux_loss_coef
        return loss + weight * output.aux_loss, {"next_token_loss": loss, "balance_loss": output.aux_loss, **by_domain}

    return objective


def lory(domains: Sequence[str] = ()) -> Objective:
    """The objective of a Lory model: next-token alone; logs routing entropy and the share of experts in use."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_weights=True)
        loss, by_domain = loss_by_domain(output.logits, batch, domains)
        return loss, {**routing_metrics(output.router_weights or ()), **by_domain}

    return objective


def routing_metrics(router_weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entropy of routing in nats, and the share of experts with a weight over 2/E (docs/methods.md 1.7).

    Both are means over all segments. router_weights: by layer [B, N, E]; empty with one expert or dense routing, which
    gives no metrics.
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
