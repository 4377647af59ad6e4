"""Checkpoints on disk: a transformers model directory with its tokenizer, and AdamW's moments where they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eclectus.models.lory.model import expand_dense_tensors
from eclectus.models.training.parallel import gather
from eclectus.models.training.process import Process
from eclectus.models.training.resume import whole_tensors


def save_model(
    model: Any, tokenizer: Any, out: Path, moments: dict[str, torch.Tensor] | None, moments_name: str, process: Process
) -> None:
    """Writes model (safetensors), config, tokenizer and, if given, AdamW's moments into `out`. All processes must call it.

    A sharded model is made whole on the leading process, which writes; it can train no more.
    """
    full = whole_tensors(moments or {}, process)
    gather(model, process)
    if process.is_main:
        model.eval().save_pretrained(out)
        tokenizer.save_pretrained(out)
        if moments is not None:
            save_file(full, out / moments_name)
    process.barrier()


def duplicated_moments(
    moments: dict[str, torch.Tensor], experts: int, share: float | None = None
) -> dict[str, torch.Tensor]:
    """AdamW's moments of a dense model for the Lory model that `LoryForCausalLM.from_dense` makes of it.

    share: of the dense gradient that a copy sees, 1/E where all are weighted alike (the default). Its first moment is
    multiplied by it and its second by its square, so that its next step has the size of the dense model's. Routers start from
    zero moments. The copies are views of one tensor, to be read only: `eclectus.models.training.loop` makes its own of them.
    """
    share = 1 / experts if share is None else share
    duplicated: dict[str, torch.Tensor] = {}
    for what, scale in (("exp_avg", share), ("exp_avg_sq", share**2)):
        ending = f".{what}"
        dense = {name.removesuffix(ending): value for name, value in moments.items() if name.endswith(ending)}
        expanded = expand_dense_tensors(dense, experts, scale, shared_memory=True)
        duplicated |= {name + ending: value for name, value in expanded.items()}
    steps = [value for name, value in moments.items() if name.endswith(".step")]
    names = {name.removesuffix(".exp_avg") for name in duplicated if name.endswith(".exp_avg")}
    return duplicated | {f"{name}.step": steps[0] for name in names if steps}


def load_moments_file(path: str | None) -> dict[str, torch.Tensor]:
    """AdamW's moments as `eclectus.models.training.loop.read_moments` gives them; empty without a file."""
    return load_file(path) if path else {}
