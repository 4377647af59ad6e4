"""The objective of each training stage, as a weighted sum of losses (models/losses/step.py).

next-token       mean cross-entropy of the next token                            dense, Lory: docs/methods.md 1.1
balanced         next-token + transformers' own load-balancing loss              top-k: models/pretraining/baselines.py
post-pretrain    next-token + alpha * balance over all tokens                    MoE-LPR stage 1: docs/methods.md 2.2
review           next-token + gamma * LPR over tokens of original languages      MoE-LPR stage 2: docs/methods.md 2.3
one-stage        next-token + alpha * balance + gamma * LPR                      MoE-LPR's ablation: docs/methods.md 2.5
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eclectus.models.losses.router_losses import (
    BalanceScaling,
    PriorForm,
    at_least_fp32,
    balance_loss,
    count_choices,
    language_prior_loss,
)
from eclectus.models.losses.step import Load, Loss, Objective, Pass, Term, next_tokens
from eclectus.models.training.instances import IGNORED, Batch

ROUTERS = {"output_router_logits": True}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in fp32; 0 without targets. logits [B, L, V]; labels [B, L], IGNORED at padding."""
    targets = next_tokens(labels)
    total = F.cross_entropy(at_least_fp32(logits).flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def loss_by_domain(done: Pass, domains: Sequence[str]) -> tuple[Tensor, dict[str, Term]]:
    """Mean loss of the targets in nats, 0 if there are none; and for each domain `loss/NAME`: the sum of its losses and
    its targets.

    domains: names by their numbers in batch.domains; if empty, only the loss is computed.
    """
    assert done.losses is not None and done.rows is not None, "the pass was made without losses"
    losses = done.losses.each
    mean = done.losses.total / max(1, len(losses))
    if not domains:
        return mean, {}
    owners = done.batch.domains.roll(-1, dims=1).flatten()[done.rows]
    sums = losses.new_zeros(2, len(domains)).index_add_(1, owners, torch.stack([losses, torch.ones_like(losses)]))
    return mean, {f"loss/{name}": Term(sums[0, i], sums[1, i]) for i, name in enumerate(domains)}


class NextToken(Loss):
    """Cross-entropy of the next token, over all targets. domains: whose losses to log separately."""

    name = "next_token_loss"

    def __init__(self, domains: Sequence[str] = ()) -> None:
        self.domains = domains

    def count(self, batch: Batch) -> Tensor:
        return (batch.labels[:, 1:] != IGNORED).sum()

    def measure(self, done: Pass, statistic: Tensor | None) -> tuple[Tensor, dict[str, Term]]:
        return loss_by_domain(done, self.domains)


class Balance(Loss):
    """Load balance (`balance_loss`) over all tokens; its statistic is how many tokens of the step chose each expert."""

    name = "balance_loss"

    def __init__(self, weight: float, top_k: int, scaling: BalanceScaling) -> None:
        self.weight, self.top_k, self.scaling = weight, top_k, scaling

    def count(self, batch: Batch) -> Tensor:
        return (batch.documents >= 0).sum()

    def statistic(self, done: Pass) -> Tensor:
        """The choices of all layers, one after the other."""
        return torch.cat(done.choices(self.top_k))

    def measure(self, done: Pass, statistic: Tensor | None) -> tuple[Tensor, dict[str, Term]]:
        logits, mask = self._routed(done)
        choices = None if statistic is None else statistic.split([layer.shape[1] for layer in logits])
        return balance_loss(logits, self._top_k(done), self.scaling, mask, choices), {}

    def _top_k(self, done: Pass) -> int:
        return self.top_k

    def _routed(self, done: Pass) -> tuple[Sequence[Tensor], Tensor]:
        """Router logits by layer, and which of the tokens count."""
        return done.output.router_logits, done.batch.documents >= 0


class TransformersBalance(Balance):
    """The load-balancing loss of transformers: tokens of all layers together; weight and K are those of the config."""

    def __init__(self) -> None:
        self.scaling = "released"

    def weight_in(self, config: Any) -> float:
        return config.router_aux_loss_coef

    def statistic(self, done: Pass) -> Tensor:
        """The choices of all layers together."""
        logits, mask = self._routed(done)
        return torch.cat(count_choices(logits, self._top_k(done), mask))

    def _top_k(self, done: Pass) -> int:
        return done.config.num_experts_per_tok

    def _routed(self, done: Pass) -> tuple[Sequence[Tensor], Tensor]:
        by_layer, mask = super()._routed(done)
        return [torch.cat(list(by_layer))], mask.flatten().repeat(len(by_layer))


class LanguagePrior(Loss):
    """Language priors routing (`language_prior_loss`), over the tokens of original languages.

    original_languages: numbers of these languages in the batch's labels. original_experts: as in `language_prior_loss`.
    """

    name = "lpr_loss"

    def __init__(
        self,
        weight: float,
        form: PriorForm,
        original_languages: Sequence[int],
        original_experts: int | Sequence[int] = 1,
    ) -> None:
        self.weight, self.form = weight, form
        self.languages, self.experts = original_languages, original_experts

    def count(self, batch: Batch) -> Tensor:
        return in_languages(batch, self.languages).sum()

    def measure(self, done: Pass, statistic: Tensor | None) -> tuple[Tensor, dict[str, Term]]:
        original = in_languages(done.batch, self.languages)
        return language_prior_loss(done.output.router_logits, original, self.form, self.experts), {}


def in_languages(batch: Batch, languages: Sequence[int]) -> Tensor:
    """`[B, L]`, true on tokens of these languages."""
    found = torch.zeros_like(batch.languages, dtype=torch.bool)
    # One by one: a list that is sent to a GPU is waited for.
    for language in languages:
        found |= batch.languages == language
    return found


def next_token(domains: Sequence[str] = ()) -> Objective:
    """The objective of a dense model. domains: whose losses to log separately, as in `loss_by_domain`."""
    return Objective([NextToken(domains)])


def balanced(domains: Sequence[str] = ()) -> Objective:
    """The objective of a top-k mixture from transformers: next-token and the weighted auxiliary loss of its config."""
    return Objective([NextToken(domains), TransformersBalance()], ROUTERS, mixture_metrics)


def lory(domains: Sequence[str] = ()) -> Objective:
    """The objective of a Lory model: next-token alone; logs routing entropy and the share of experts in use."""
    return Objective(
        [NextToken(domains)],
        {"output_router_weights": True},
        lambda done: routing_metrics(done.output.router_weights or ()),
    )


def routing_metrics(router_weights: Sequence[Tensor]) -> dict[str, Term]:
    """Entropy of routing in nats, and the share of experts with a weight over 2/E (docs/methods.md 1.7).

    Both are means over all layers and segments. router_weights: by layer [B, N, E]; empty with one expert or dense
    routing, which gives no metrics.
    """
    if not router_weights:
        return {}
    weights = torch.stack([layer.detach() for layer in router_weights]).float()
    entropy = -(weights * weights.clamp_min(1e-9).log()).sum(-1)
    used = (weights > 2 / weights.shape[-1]).float().mean(-1)
    segments = entropy.new_full((), entropy.numel())
    return {"router_entropy": Term(entropy.sum(), segments), "expert_utilisation": Term(used.sum(), segments)}


@torch.no_grad()
def mixture_metrics(done: Pass) -> dict[str, Term]:
    """Entropy of a mixture's routing in nats, the mean over tokens and layers, and `expert_load@LAYER` of each."""
    by_layer, counted = done.output.router_logits, done.batch.documents >= 0
    loads = done.choices(done.config.num_experts_per_tok)
    entropies = []
    for logits in by_layer:
        log_probabilities = torch.log_softmax(at_least_fp32(logits), dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        entropies.append(torch.where(counted.flatten(), entropy, 0.0).sum())
    terms: dict[str, Term] = {f"expert_load@{layer}": Load(each, each.sum()) for layer, each in enumerate(loads)}
    return {"router_entropy": Term(torch.stack(entropies).sum(), counted.sum() * len(entropies)), **terms}


def post_pretrain(alpha: float, top_k: int, scaling: BalanceScaling) -> Objective:
    """The objective of MoE-LPR's first stage."""
    return Objective([NextToken(), Balance(alpha, top_k, scaling)], ROUTERS, mixture_metrics)


def review(
    gamma: float, form: PriorForm, original_languages: Sequence[int], original_experts: int | Sequence[int] = 1
) -> Objective:
    """The objective of MoE-LPR's second stage. Languages and experts: as in `LanguagePrior`."""
    prior = LanguagePrior(gamma, form, original_languages, original_experts)
    return Objective([NextToken(), prior], ROUTERS, mixture_metrics)


def one_stage(
    alpha: float,
    top_k: int,
    scaling: BalanceScaling,
    gamma: float,
    form: PriorForm,
    original_languages: Sequence[int],
    original_experts: int | Sequence[int] = 1,
) -> Objective:
    """The objective of the one-stage ablation, on mixed data. Languages and experts: as in `LanguagePrior`."""
    prior = LanguagePrior(gamma, form, original_languages, original_experts)
    return Objective([NextToken(), Balance(alpha, top_k, scaling), prior], ROUTERS, mixture_metrics)
