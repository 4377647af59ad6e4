"""What each training stage minimises, as `objective(model, batch) -> (loss, what else to log)`.

next-token:       mean cross-entropy of the next token                                   (dense, Lory: papers.md 1.1)
post-pretrain:    next-token + alpha * balance over all tokens                           (MoE-LPR stage 1: papers.md 2.2)
review:           next-token + gamma * LPR over tokens of the original languages         (MoE-LPR stage 2: papers.md 2.3)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from models.instances import IGNORED, Batch
from models.losses import balance_loss, language_prior_loss
from models.train import Objective


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, in fp32. logits [B, L, V]; labels [B, L], IGNORED where there is nothing to learn."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def next_token() -> Objective:
    """The objective of a dense model."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return next_token_loss(model(input_ids=batch.tokens, use_cache=False).logits, batch.labels), {}

    return objective


def lory() -> Objective:
    """The objective of a Lory model: next-token alone; logs the entropy of routing and the share of experts in use."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_weights=True)
        weights = torch.stack([layer.detach() for layer in output.router_weights]).float()
        entropy = -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean()
        used = (weights > 2 / weights.shape[-1]).float().mean()
        return next_token_loss(output.logits, batch.labels), {"router_entropy": entropy, "expert_utilisation": used}

    return objective


def post_pretrain(alpha: float, top_k: int, scaling: Literal["paper", "released"]) -> Objective:
    """The objective of MoE-LPR's first stage."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss = next_token_loss(output.logits, batch.labels)
        balance = balance_loss(output.router_logits, top_k, scaling)
        return loss + alpha * balance, {"next_token_loss": loss, "balance_loss": balance}

    return objective


def review(gamma: float, form: Literal["paper", "released"], original_languages: Sequence[int]) -> Objective:
    """The objective of MoE-LPR's second stage. original_languages: numbers of these languages in the batch's labels."""

    def objective(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss = next_token_loss(output.logits, batch.labels)
        original = torch.isin(
            batch.languages, torch.tensor(original_languages, device=batch.languages.device)
        ).flatten()
        prior = language_prior_loss(output.router_logits, original, form)
        return loss + gamma * prior, {"next_token_loss": loss, "lpr_loss": prior}

    return objective
