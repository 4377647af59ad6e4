"""Which implementation computes attention (`training_attention`): the same formula, other kernels.

auto    on CPUs causal attention in blocks (causal_blocks.py), and elsewhere what transformers takes itself: sdpa
sdpa    torch's scaled_dot_product_attention, with a dense mask where there is one
eager   matrix products and a softmax, as the formula is written
flex    torch's flex attention: masks as blocks, empty ones are skipped; CUDA only, see docs/methods.md 1.9
flash   FlashAttention 2, if that package is installed; CUDA only, no document mask
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import nn

from eclectus.models.attention import causal_blocks

Attention = Literal["auto", "sdpa", "eager", "flex", "flash"]
IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
ON_CUDA = ("flex", "flash")


def choose_attention(model: nn.Module, name: Attention, device: torch.device) -> None:
    """Sets the implementation of a model of transformers, in place; "auto" leaves what it has where that is not sdpa.

    Raises ValueError for one that cannot compute on the device or is not installed.
    """
    if name == "auto":
        if device.type == "cpu" and cast(Any, model).config._attn_implementation == "sdpa":
            cast(Any, model).set_attn_implementation(causal_blocks.NAME)
        return
    if name in ON_CUDA and device.type != "cuda":
        raise ValueError(f"training_attention {name} computes on CUDA only, and this is {device.type}; choose sdpa")
    try:
        cast(Any, model).set_attn_implementation(IMPLEMENTATIONS[name])
    except (ImportError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"training_attention {name} cannot be used here: {first}; choose sdpa") from error
