"""Checkpoints on disk: a transformers model directory with its tokenizer, and AdamW's moments where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_model(
    model: Any, tokenizer: Any, out: Path, moments: dict[str, torch.Tensor] | None, moments_name: str
) -> None:
    """Writes model (safetensors), config, tokenizer and, if given, AdamW's moments into `out`."""
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    if moments is not None:
        save_file({name: value.contiguous().cpu() for name, value in moments.items()}, out / moments_name)


def load_moments_file(path: str | None) -> dict[str, torch.Tensor]:
    """AdamW's moments as `models.train.read_moments` gives them; empty without a file."""
    return load_file(path) if path else {}
