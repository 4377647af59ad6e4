"""A training objective: losses, each the mean over its own items of the whole step.

    objective = sum over losses of  weight * (sum over the step's items) / (number of the step's items)

The items of the next-token loss are targets, those of the language prior are tokens of original languages, and so on.
How a step is cut into micro-batches and processes must not change the result, so a mean of means will not do:

    count      every loss counts its items in every micro-batch, from the labels: no forward pass; one all-reduce of a
               vector [losses] per step
    weigh      the mean of a micro-batch is weighted by its share of the step's items

A loss that is no sum over items names a statistic that it needs of the whole step before any gradient: the balance loss
multiplies mean probabilities by the shares of all choices. It is summed over processes within the step (an all-reduce
of [layers * experts] integers); with k > 1 micro-batches per process, k - 1 of them first pass through the model
without gradients. Cost of that: (k - 1) / k of a forward pass, without the output layer; docs/methods.md 2.2.

Logged means are joined in the same way, by their counts, over micro-batches, processes and steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eclectus.models.attention.document_mask import positions_not_searched, within_documents
from eclectus.models.losses.router_losses import count_choices
from eclectus.models.losses.token_losses import TokenLosses, losses_in_place_of_logits
from eclectus.models.training.instances import IGNORED, Batch
from eclectus.models.training.parallel import config_of, unwrapped
from eclectus.models.training.process import Process


@dataclass(frozen=True)
class Term:
    """A sum over some items of a micro-batch and their number, both scalars without gradient."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """0 if there are no items."""
        return self.total / self.count.clamp(min=1)

    @staticmethod
    def joined(parts: Sequence[float]) -> float:
        """The mean over several terms, from their added totals and, last, their added counts, which are not 0."""
        return parts[0] / parts[-1]


class Load(Term):
    """How many choices of a micro-batch fell on each expert `[experts]`, and how many there are; its mean is the share
    of the fullest expert times the experts: 1 if all are chosen alike."""

    @property
    def mean(self) -> Tensor:
        return self.total.max() * (len(self.total) / self.count.clamp(min=1))

    @staticmethod
    def joined(parts: Sequence[float]) -> float:
        return max(parts[:-1]) * (len(parts) - 1) / parts[-1]


@dataclass(frozen=True)
class Pass:
    """A micro-batch that passed through the model, as the losses see it."""

    batch: Batch
    output: Any
    config: Any
    """The model's configuration."""
    at: Tensor | None = None
    """Positions in `[B * L]` with a target, `[N]`, on the CPU."""
    rows: Tensor | None = None
    """The same on the device."""
    losses: TokenLosses | None = None
    """Of these; `output.logits` then have no columns."""
    known: dict[int, list[Tensor]] = field(default_factory=dict)
    """The choices that were counted, by top K."""

    def choices(self, top_k: int) -> list[Tensor]:
        """Of a mixture, by layer: how many tokens, padding apart, have each expert among their top K, `[experts]`."""
        if top_k not in self.known:
            self.known[top_k] = count_choices(self.output.router_logits, top_k, self.batch.documents >= 0)
        return self.known[top_k]


class Loss(ABC):
    """One loss of an objective. name: in the metrics. weight: its factor in the objective."""

    name: str
    weight: float = 1.0

    def weight_in(self, config: Any) -> float:
        """The weight for a model with this configuration."""
        return self.weight

    @abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """The number of items of the batch that this loss is a mean of: its denominator."""

    def statistic(self, done: Pass) -> Tensor | None:
        """What the loss needs summed over the whole step before its gradient; None: nothing."""
        return None

    @abstractmethod
    def measure(self, done: Pass, statistic: Tensor | None) -> tuple[Tensor, dict[str, Term]]:
        """(mean over the items of the micro-batch, 0 if it has none; other metrics). statistic: that of the step."""


@dataclass(frozen=True)
class Objective:
    """What a stage minimises: a weighted sum of losses.

    asks: further arguments of the model's forward pass. metrics: what else is logged. reads: fields of the batch that
    the model takes besides its tokens, by the name of the argument. document_mask: documents of an instance do not see
    each other.
    """

    losses: Sequence[Loss]
    asks: Mapping[str, Any] = field(default_factory=dict)
    metrics: Callable[[Pass], dict[str, Term]] | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    document_mask: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(objective, means of its losses and metrics) of a batch that is a whole step of one process."""
        loss, terms = Step(self, [batch], Process(device=batch.tokens.device)).measure(model, 0)
        return loss, {name: term.mean.to(loss.dtype) for name, term in terms.items()}

    def run(self, model: nn.Module, batch: Batch, device: torch.device) -> Pass:
        """The pass of a batch, moved to the device, with the loss of every target."""
        at, expected = targets_of(batch.labels)
        rows, targets = (each.to(device, non_blocking=True) for each in (at, expected))
        with losses_in_place_of_logits(unwrapped(model), rows, targets) as losses:
            done = self.output(model, batch, device)
        return replace(done, at=at, rows=rows, losses=losses[0])

    def output(self, model: nn.Module, batch: Batch, device: torch.device, **more: Any) -> Pass:
        """The pass of a batch, moved to the device, without losses. more: arguments of the model's forward pass."""
        inside = within_documents(unwrapped(model), batch.documents if self.document_mask else None, device)
        batch = batch.to(device)
        read = {argument: getattr(batch, name) for argument, name in self.reads.items()}
        with inside, positions_not_searched():
            output = model(input_ids=batch.tokens, use_cache=False, **read, **self.asks, **more)
        return Pass(batch, output, config_of(model))

    def weights(self, model: nn.Module) -> dict[str, float]:
        """Name and weight of each loss."""
        return {loss.name: loss.weight_in(config_of(model)) for loss in self.losses}


def next_tokens(labels: Tensor) -> Tensor:
    """The next token of every position, `[B * L]`, IGNORED where it is no target. labels [B, L]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def targets_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(positions in `[B * L]` of tokens whose next one is a target, ascending `[N]`; these next tokens).

    labels [B, L], IGNORED where they are no target; on a GPU the number of rows would have to be waited for. Rows of
    logits without a target cost the largest product of the model and have no gradient.
    """
    targets = next_tokens(labels)
    rows = (targets != IGNORED).nonzero()[:, 0]
    return rows, targets[rows]


class Step:
    """A training step of all processes, seen from one of them: its micro-batches, and their shares of the step."""

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        process: Process,
        averaged: bool = True,
        stopping: bool = False,
    ) -> None:
        """batches: the micro-batches of this process, as many as every other process has.

        averaged: gradients are averaged over processes, not summed. stopping: this process was asked to stop.
        """
        self._objective, self._batches, self._process = objective, batches, process
        counts = [torch.stack([loss.count(batch) for loss in objective.losses]) for batch in batches]
        # One copy to the device and one exchange for both.
        rows = torch.stack([*counts, torch.full_like(counts[0], int(stopping))]).double()
        rows = rows.to(process.device, non_blocking=True)
        # [micro-batches, losses]
        self._counts = rows[:-1]
        step, self._stopping = process.sum(torch.stack([self._counts.sum(0), rows[-1]]))
        # A loss without items in the whole step is 0.
        self._shares = self._counts / (step.clamp(min=1) / (process.world if averaged else 1))
        self._statistics: list[Tensor | None] | None = None
        self.latest: tuple[Tensor, Tensor] | None = None
        """Of the micro-batch that was measured last: positions of its targets, on the CPU, and their losses."""

    def asks_to_stop(self) -> bool:
        """Whether any process was asked to stop: the same in all of them. Waits for the device."""
        return bool(self._stopping[0] > 0)

    @torch.no_grad()
    def survey(self, model: nn.Module) -> None:
        """Computes what losses need of all micro-batches but the first, whose own pass adds to it.

        Costs nothing for one micro-batch, nor for an objective without such losses.
        """
        if not any(type(loss).statistic is not Loss.statistic for loss in self._objective.losses):
            return
        for batch in self._batches[1:]:
            # Gradients are not exchanged here, so DDP need not know of this pass.
            done = self._objective.output(unwrapped(model), batch, self._process.device, logits_to_keep=1)
            self._statistics = self._added(done)

    def measure(self, model: nn.Module, number: int) -> tuple[Tensor, dict[str, Term]]:
        """(the part of a micro-batch in the objective, with gradient; its terms, by name).

        The sum of the parts over micro-batches, averaged over processes (if not `averaged`: summed), is the objective
        of the step. The first micro-batch comes first.
        """
        done = self._objective.run(model, self._batches[number], self._process.device)
        if done.at is not None and done.losses is not None:
            self.latest = done.at, done.losses.each
        if number == 0:
            added = self._added(done)
            self._statistics = [None if each is None else self._process.sum(each) for each in added]
        assert self._statistics is not None, "the first micro-batch comes first"
        parts: list[Tensor] = []
        terms: dict[str, Term] = {}
        for i, (loss, statistic) in enumerate(zip(self._objective.losses, self._statistics, strict=True)):
            mean, metrics = loss.measure(done, statistic)
            parts.append(loss.weight_in(done.config) * mean * self._shares[number, i].to(mean.dtype))
            count = self._counts[number, i]
            terms |= {loss.name: Term(mean.detach() * count, count), **metrics}
        if self._objective.metrics:
            terms |= self._objective.metrics(done)
        return torch.stack(parts).sum(), terms

    def _added(self, done: Pass) -> list[Tensor | None]:
        """The statistics of the micro-batches so far and this one."""
        found = [loss.statistic(done) for loss in self._objective.losses]
        if self._statistics is None:
            return found
        pairs = zip(self._statistics, found, strict=True)
        return [None if old is None or new is None else old + new for old, new in pairs]
