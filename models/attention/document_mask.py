"""Passes in which a token sees its own document only (`pack_document_mask`; docs/methods.md 1.9).

    stock models   transformers' own masks of the model's attention (causal, sliding window, or both by layer), each
                   joined with "in the same document", once per pass: dense for sdpa and eager, blocks for flex
    Lory           the model is given the documents: attention as above, and segments that restart with each document
    flash          refused: its kernels take no mask

Positions do not restart: rotary attention depends on their differences alone, so a document gives the same logits
wherever it stands. Cost: 1 byte per pair of tokens in an instance for a dense mask; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function

from eclectus.models.lory.documents import count_segments, document_begins
from eclectus.models.lory.model import LoryModel


@contextmanager
def positions_not_searched() -> Iterator[None]:
    """Within the block transformers does not search the positions of a pass for packed documents: training counts them
    through. On a GPU every pass would wait for the answer, and of fake tensors it would make masks that real ones need
    not."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextmanager
def within_documents(model: nn.Module, documents: Tensor | None, device: torch.device) -> Iterator[None]:
    """Within the block `model`, called with input_ids `[B, L]`, computes each document as if it stood alone.

    documents: `[B, L]`, equal numbers within a document; on the CPU, so that no device is waited for. None: nothing
    changes. Raises ValueError for a model whose attention takes no mask.
    """
    if documents is None:
        yield
        return
    decoder: nn.Module = cast(Any, model).get_decoder()
    config: Any = decoder.config
    attention = config._attn_implementation or "sdpa"
    if "flash" in attention:
        raise ValueError(f"pack_document_mask needs attention that takes a mask, not {attention}; choose sdpa or flex")
    given: dict[str, Any]
    if isinstance(decoder, LoryModel):
        segments = count_segments(documents, config.segment_length)
        given = {"documents": documents.to(device, non_blocking=True), "document_segments": segments}
    else:
        runs = document_begins(documents).cumsum(1).to(device, non_blocking=True)
        dtype = next(decoder.parameters()).dtype
        shape_only = torch.empty((), dtype=dtype, device=device).expand(*runs.shape, 1)
        apart = packed_sequence_mask_function(runs)
        given = {"attention_mask": create_masks_for_generate(config, shape_only, None, None, and_mask_function=apart)}

    def joined(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return positional, {**named, **given}

    hook = decoder.register_forward_pre_hook(joined, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
