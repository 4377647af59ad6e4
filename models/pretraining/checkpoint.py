"""Checkpoints on disk: a model directory with its tokenizer and, optionally, AdamW's moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eclectus.models.checkpoints.writing import save_model
from eclectus.models.lory.dense import expand_dense_tensors
from eclectus.models.training.parallel import gather_model
from eclectus.models.training.process import Process
from eclectus.models.training.resume import whole_tensors


def save_trained(
    model: Any,
    side_files: Path,
    out: Path,
    moments: dict[str, torch.Tensor] | None,
    moments_name: str,
    process: Process,
) -> None:
    """Writes the model with the side files of a folder and, if given, AdamW's moments to `out`. All processes must call
    it.

    A sharded model is collected on rank 0, which writes it; it cannot be trained further.
    """
    full = whole_tensors(moments or {}, process)
    gather_model(model, process)
    if process.is_main:
        save_model(model.eval(), out, side_files)
        if moments is not None:
            save_file(full, out / moments_name)
    process.barrier()


def duplicated_moments(
    moments: dict[str, torch.Tensor], experts: int, share: float | None = None
) -> dict[str, torch.Tensor]:
    """AdamW's moments of a dense model, converted for the result of `LoryForCausalLM.from_dense`.

    share: the share of the dense gradient that a copy sees, by default 1/E, for equal weights. The first moment is
    multiplied by it and the second by its square, so that the next step has the size of the dense model's. Routers
    start from zero moments. The copies are read-only views of one tensor, which `eclectus.models.training.loop` copies.
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
    """AdamW's moments in the form of `eclectus.models.training.optimizer.read_moments`; empty without a file."""
    return load_file(path) if path else {}
