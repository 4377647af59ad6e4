"""Routing in packed rows whose documents stand apart: each document is cut into segments as if it stood alone.

A document's segments are counted from its first token in the row. Its last one may be shorter than T, and the next
document begins a new one, so no segment holds tokens of two documents. A segment is routed by the one before it in the
same document; the first of a document as the first of an instance is (docs/methods.md 1.2).

    row         a a a a a a a b b b c c c c c c      T = 4
    segments    0 0 0 0 1 1 1 2 2 2 3 3 3 3 4 4
    routed by   -       0     -     -       3

Cost: the segments of all rows, P, are padded to T tokens each: P T / (B L) times the FFN's products, and a merge for
each. Documents of one segment never train a router.

Shapes: B rows, L tokens, P segments of at most T tokens, D width, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function

from .config import LoryConfig
from .routing import RoutingPlan


def document_begins(documents: Tensor) -> Tensor:
    """True where a document begins in its row, bool `[B, L]`. documents `[B, L]`: equal numbers within a document."""
    begins = documents.ne(documents.roll(1, dims=1))
    begins[:, 0] = True
    return begins


def segments_of_documents(documents: Tensor, segment_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(number of each token's segment, its place in that segment, where documents begin), each `[B, L]`.

    Segments are numbered over all rows.
    """
    begins = document_begins(documents)
    columns = torch.arange(documents.shape[1], device=documents.device)
    place = (columns - torch.where(begins, columns, 0).cummax(dim=1).values) % segment_length
    numbers = (place == 0).flatten().cumsum(0).view_as(place) - 1
    return numbers, place, begins


def count_segments(documents: Tensor, segment_length: int) -> int:
    """P, the segments of all rows. Computed where the documents are; on a GPU it waits for the device."""
    numbers, _, _ = segments_of_documents(documents, min(segment_length, documents.shape[1]))
    return int(numbers[-1, -1]) + 1


def document_mask(config: LoryConfig, hidden: Tensor, documents: Tensor) -> Any:
    """The mask by which a token attends to its document alone, in the form that config's attention takes."""
    apart = packed_sequence_mask_function(document_begins(documents).cumsum(1))
    return create_causal_mask(config, hidden, None, None, and_mask_function=apart)


@dataclass
class DocumentPlan(RoutingPlan):
    """The routing of one pass over packed documents: all segments as one row `[1, P, T]` of segments."""

    slots: Tensor | None = None
    """The place of each token among all segments' places, `[B * L]`, less than P * T."""
    first: Tensor | None = None
    """True at segments that begin a document, bool `[P]`."""

    @classmethod
    def of_documents(
        cls, config: LoryConfig, first_segment: str | None, documents: Tensor, segments: int | None
    ) -> "DocumentPlan":
        """The plan for rows of documents `[B, L]`. segments: P, if it is known (`count_segments`)."""
        length = documents.shape[1]
        size = min(config.segment_length, length)
        numbers, place, begins = segments_of_documents(documents, size)
        count = int(numbers[-1, -1]) + 1 if segments is None else segments
        slots = (numbers * size + place).flatten()
        empty = torch.zeros(count * size, dtype=torch.bool, device=documents.device)
        real = empty.scatter(0, slots, torch.ones_like(begins).flatten())
        first = empty.scatter(0, slots, begins.flatten()).view(count, size)[:, 0]
        plan = cls(config.routing, first_segment or config.first_segment, size, length)
        plan.numbers, plan.slots, plan.first, plan.real = numbers, slots, first, real.view(1, count, size)
        return plan

    def to_segments(self, x: Tensor) -> Tensor:
        """`[B, L, D]` to `[1, P, T, D]`, zeros after the last token of each segment."""
        assert self.slots is not None and self.real is not None
        empty = x.new_zeros(self.real.numel(), x.shape[-1])
        return empty.index_copy(0, self.slots, x.flatten(0, 1)).view(*self.real.shape, x.shape[-1])

    def from_segments(self, x: Tensor) -> Tensor:
        assert self.slots is not None
        return x.flatten(0, 2).index_select(0, self.slots).view(-1, self.length, x.shape[-1])

    def shift(self, weights: Tensor) -> Tensor:
        """As RoutingPlan.shift, within each document: `[1, P, E]` to `[1, P, E]`."""
        assert self.first is not None
        alone = torch.full_like(weights, 1 / weights.shape[-1]) if self.first_segment == "uniform" else weights.detach()
        by = torch.arange(weights.shape[1], device=weights.device)
        # A document's first segment is not routed by another, so what stands here for it does not matter.
        by = torch.where(self.first, by, 0).cummax(0).values if self.routing == "prefix" else (by - 1).clamp(min=0)
        return torch.where(self.first.view(1, -1, 1), alone, weights.index_select(1, by))


def sums_by_segment(values: Tensor, segment_length: int, numbers: Tensor | None, segments: int) -> Tensor:
    """Sums over each segment's tokens of values `[B, L, C]`, in the rows of the router weights.

    numbers: the segments of packed documents `[B, L]`, which give `[1, P, C]`; None gives `[B, N, C]`, cut every T
    tokens. segments: P or N.
    """
    if numbers is not None:
        sums = values.new_zeros(segments, values.shape[-1])
        return sums.index_add(0, numbers.flatten().to(values.device), values.flatten(0, 1)).unsqueeze(0)
    short = segments * segment_length - values.shape[1]
    return F.pad(values, (0, 0, 0, short)).unflatten(1, (segments, segment_length)).sum(2)
