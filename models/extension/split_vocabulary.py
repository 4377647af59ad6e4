"""The training form of embeddings and output layer with new rows: old rows are frozen, new ones train.

A slice of a parameter cannot be frozen, and with a masked gradient AdamW's weight decay still moves it (as in
models/mixture/experts.py). So the old and the new rows are two parameters during training, and one again in files:

    embeddings   frozen_weight [V, H], new_weight [N, H]      row v of the first for v < V, else row v - V of the second
    output       the same two parameters if the base ties them, else two more; logits of both, side by side

No gradient of an old row is computed. Cost: the logits are copied once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

BEFORE = "vocabulary_before"
"""In config.json: rows of the vocabulary before each extension of it, first that of the base."""


class _Split(nn.Module):
    frozen_weight: nn.Parameter
    new_weight: nn.Parameter

    def __init__(self, frozen: nn.Parameter, new: nn.Parameter) -> None:
        super().__init__()
        self.frozen_weight, self.new_weight = frozen, new


class SplitEmbedding(_Split):
    """`nn.Embedding` of V frozen and N new rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[...]` int64; returns `[..., H]`."""
        old = len(self.frozen_weight)
        is_new = (tokens >= old).unsqueeze(-1)
        frozen = F.embedding(tokens.clamp(max=old - 1), self.frozen_weight)
        return torch.where(is_new, F.embedding((tokens - old).clamp(min=0), self.new_weight), frozen)


class SplitHead(_Split):
    """`nn.Linear` without bias of V frozen and N new rows."""

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., H]`; returns logits `[..., V + N]`."""
        return torch.cat([F.linear(x, each) for each in self.blocks()], -1)

    def blocks(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The matrices of the logits, for the training loss (models/losses/token_losses.py)."""
        return self.frozen_weight, self.new_weight


def new_rows_of(config: Any) -> int:
    """Rows that the last extension of the vocabulary added; 0 if there was none. config: of a model."""
    before = getattr(config, BEFORE, None)
    return int(config.vocab_size) - int(before[-1]) if before else 0


def original_rows(config: Any) -> int | None:
    """Rows of the base's own vocabulary, None if it was never extended. config: of a model, or config.json."""
    before = config.get(BEFORE) if isinstance(config, dict) else getattr(config, BEFORE, None)
    return int(before[0]) if before else None


def split_vocabulary(model: PreTrainedModel) -> PreTrainedModel:
    """Splits embeddings and output layer of a model whose vocabulary was extended, in place; others stay as they are.

    The new rows train, the old ones are frozen. Raises ValueError if they are split already.
    """
    count = new_rows_of(model.config)
    if not count:
        return model
    embedding, head = cast(Any, model.get_input_embeddings()), cast(Any, model.get_output_embeddings())
    if isinstance(embedding, _Split):
        raise ValueError("the model's vocabulary is split already; join_vocabulary(model) first")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(model).__name__} has an output layer with a bias, which new words are not made for")
    rows = len(embedding.weight) - count
    parts = _parts(embedding.weight, rows)
    model.set_input_embeddings(SplitEmbedding(*parts))
    tied = bool(model.config.tie_word_embeddings)
    model.set_output_embeddings(SplitHead(*(parts if tied else _parts(head.weight, rows))))
    return model


def _parts(weight: Tensor, rows: int) -> tuple[nn.Parameter, nn.Parameter]:
    frozen, new = weight.detach()[:rows].clone(), weight.detach()[rows:].clone()
    return nn.Parameter(frozen, requires_grad=False), nn.Parameter(new)


def join_vocabulary(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the stock embeddings and output layer, in place, with bit-identical rows; the inverse of the split."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, SplitEmbedding) or not isinstance(head, SplitHead):
        return model
    table = nn.Parameter(_joined(embedding))
    with torch.device("meta"):
        stock, output = nn.Embedding(*table.shape), nn.Linear(table.shape[1], table.shape[0], bias=False)
    stock.weight = table
    output.weight = table if model.config.tie_word_embeddings else nn.Parameter(_joined(head))
    model.set_input_embeddings(stock)
    model.set_output_embeddings(output)
    return model


def _joined(split: _Split) -> Tensor:
    return torch.cat([split.frozen_weight.detach(), split.new_weight.detach().to(split.frozen_weight.dtype)])


def stored_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The model's parameters by their names in a stock model; a split matrix as its two parts."""
    splits = {name: module for name, module in model.named_modules() if isinstance(module, _Split)}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in splits:
            yield name, (parameter,)
        elif leaf == "frozen_weight":
            yield f"{owner}.weight", (parameter, splits[owner].new_weight)
