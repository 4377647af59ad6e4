"""Which tokens form a segment, and the state of routing during generation (docs/methods.md 1.2 and 1.4).

A `RoutingPlan` is made once per forward pass and shared by all layers: it cuts rows into segments that start at the
row's first real token, so left padding moves no border, and averages over real tokens only.
A `LoryCache` is a key-value cache whose layers also hold the merged experts in use. It holds all state of a generation:
the model itself is stateless and calls may run concurrently.

Shapes: B rows, L tokens, N segments of T tokens, D width, F FFN width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .config import GENERATION_ROUTINGS, LoryConfig, check_choice


@dataclass
class RoutingPlan:
    """The routing of one forward pass."""

    routing: str
    first_segment: str
    segment_length: int
    length: int
    mask: Tensor | None = None
    """True at real tokens of this pass, bool `[B, L]`; None if there is no padding."""
    order: Tensor | None = None
    """The column `[B, L]` that comes j-th when each row is rolled to start at its first real token; None without left
    padding."""
    inverse: Tensor | None = None
    real: Tensor | None = None
    """True at real tokens after rolling and cutting, bool `[B or 1, N, T]`; None if every segment is full."""
    numbers: Tensor | None = None
    """The segment of each token, `[B, L]`, where documents stand apart (models/lory/documents.py); else None."""
    starts: list[int] = field(default_factory=list)
    """By row, the position of this pass's first column counted from the row's first real token; negative if the row is
    padded on the left."""

    @classmethod
    def make(
        cls, config: LoryConfig, first_segment: str | None, hidden: Tensor, mask: Tensor | None, past_length: int
    ) -> "RoutingPlan":
        """The plan for `hidden` `[B, L, D]`. mask: `[B, past_length + L]`, or None without padding."""
        length = hidden.shape[1]
        segment_length = config.segment_length if past_length else min(config.segment_length, length)
        plan = cls(config.routing, first_segment or config.first_segment, segment_length, length)
        plan.starts = [past_length] * hidden.shape[0]
        if mask is None or mask.dim() != 2:
            short = -length % segment_length
            if short and not past_length:
                plan.real = torch.arange(length + short, device=hidden.device).lt(length).view(1, -1, segment_length)
        elif past_length:
            plan.mask = mask[:, -length:].bool()
            plan.starts = (past_length - mask.int().argmax(dim=1)).tolist()
        else:
            plan._read_mask(mask.bool())
        return plan

    def _read_mask(self, mask: Tensor) -> None:
        # Both values in one transfer: on a GPU each read waits for the device.
        full, unpadded_left = torch.stack([mask.all(), mask[:, 0].all()]).tolist()
        if not full:
            self.mask = mask
        if not unpadded_left:
            first_real = mask.int().argmax(dim=1, keepdim=True)
            self.starts = (-first_real[:, 0]).tolist()
            columns = torch.arange(self.length, device=mask.device)
            self.order = (columns + first_real) % self.length
            self.inverse = (columns - first_real) % self.length
        rolled = mask if self.order is None else mask.gather(1, self.order)
        short = -self.length % self.segment_length
        if short or not full:
            self.real = F.pad(rolled, (0, short)).view(mask.shape[0], -1, self.segment_length)

    def to_segments(self, x: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, N, T, D]`, the last segment padded with zeros."""
        if self.order is not None:
            x = x.gather(1, self.order.unsqueeze(-1).expand_as(x))
        short = -self.length % self.segment_length
        if short:
            x = F.pad(x, (0, 0, 0, short))
        return x.view(x.shape[0], -1, self.segment_length, x.shape[-1])

    def from_segments(self, x: Tensor) -> Tensor:
        """The inverse of `to_segments`."""
        x = x.flatten(1, 2)[:, : self.length]
        return x if self.inverse is None else x.gather(1, self.inverse.unsqueeze(-1).expand_as(x))

    def segment_sums(self, x: Tensor) -> Tensor:
        """Sums `[B, N, D]` of x `[B, N, T, D]` over the real tokens of each segment."""
        return x.sum(dim=2) if self.real is None else (x * self.real.unsqueeze(-1)).sum(dim=2)

    def segment_sizes(self, x: Tensor) -> Tensor:
        """Number of real tokens per segment, `[B, N, 1]`, in the shape and dtype of x `[B, N, ...]`."""
        if self.real is None:
            return x.new_full((*x.shape[:2], 1), self.segment_length)
        return self.real.sum(dim=2).to(x.dtype).expand(x.shape[:2]).unsqueeze(-1)

    def prompt_mean(self, x: Tensor, prompt_length: int | None) -> Tensor:
        """Mean `[B, D]` of x `[B, L, D]` over the real tokens in the first `prompt_length` columns (None: all)."""
        x = x[:, :prompt_length]
        if self.mask is None:
            return x.mean(dim=1)
        mask = self.mask[:, :prompt_length]
        return (x * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def shift(self, weights: Tensor) -> Tensor:
        """The weights `[B, N, E]` that each segment uses, given those of its own tokens (docs/methods.md 1.2)."""
        if self.first_segment == "uniform":
            first = torch.full_like(weights[:, :1], 1 / weights.shape[-1])
        else:
            first = weights[:, :1].detach()
        if self.routing == "prefix":
            return torch.cat([first, weights[:, :1].expand(-1, weights.shape[1] - 1, -1)], dim=1)
        return torch.cat([first, weights[:, :-1]], dim=1)


class LoryCacheLayer(DynamicLayer):
    """Keys and values of one layer, and the merged experts of each row of the batch.

    `merged` `[B or 1, 3F, D]`: the parameters in use. Under segment routing `weights` `[B, E]` is the mixture in use,
    and `segment_sum` `[B, D]`, `segment_count` `[B, 1]` describe the current segment, which routes the next one.
    """

    _rows = ("merged", "weights", "segment_sum", "segment_count")

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.merged: Tensor | None = None
        self.weights: Tensor | None = None
        self.segment_sum: Tensor | None = None
        self.segment_count: Tensor | None = None

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self._rows:
            rows = getattr(self, name)
            # With fixed or prompt routing one merged FFN serves every copy of its row; segments may route differently.
            shared = rows is not None and rows.shape[0] == 1 and self.weights is None
            if rows is not None and not shared:
                setattr(self, name, change(rows))

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_row(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_row(lambda rows: rows[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.segment_sum is not None:
            raise ValueError(
                "A cache under segment routing cannot drop tokens: they are already in the sums of its segments. "
                "Use generation_routing='prompt' with assisted decoding."
            )
        super().crop(tokens_to_remove)


class LoryCache(Cache):
    """The cache of a LoryForCausalLM: keys, values and merged experts of one generation.

    Args:
        config: the model's.
        generation_routing: "prompt" (the first forward pass decides for all later ones) or "segment"; by default the
            configuration's.
        expert_weights: `[layers, E]` or `[layers, B, E]`: use these weights throughout instead of the router's.
        prompt_length: columns of the first pass that are the prompt; None for all. Assisted decoding appends its first
            candidate tokens to the prompt.
    """

    def __init__(
        self,
        config: LoryConfig,
        generation_routing: str | None = None,
        expert_weights: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> None:
        super().__init__(layers=[LoryCacheLayer() for _ in range(config.num_hidden_layers)])
        self.generation_routing = generation_routing or config.generation_routing
        check_choice("generation_routing", self.generation_routing, GENERATION_ROUTINGS)
        self.expert_weights = check_expert_weights(config, expert_weights)
        self.prompt_length = prompt_length

    def layer(self, index: int) -> LoryCacheLayer:
        """The layer's part of the cache."""
        # Cache.layers is typed for all of transformers' layers; ours are made in __init__.
        return cast(LoryCacheLayer, self.layers[index])


def check_expert_weights(config: LoryConfig, weights: Tensor | None) -> Tensor | None:
    """Expert weights as `[layers, B or 1, E]`. Raises ValueError for any other shape."""
    if weights is None:
        return None
    shape = tuple(weights.shape)
    if weights.dim() not in (2, 3) or shape[0] != config.num_hidden_layers or shape[-1] != config.num_experts:
        raise ValueError(
            f"expert_weights has shape {shape}, expected [layers, E] or [layers, batch, E] with "
            f"{config.num_hidden_layers} layers and {config.num_experts} experts."
        )
    return weights.unsqueeze(1) if weights.dim() == 2 else weights
