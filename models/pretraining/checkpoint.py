"""Checkpoints on disk: a model directory with its tokenizer and, optionally, AdamW's moments."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSpec, weight_files
from eclectus.models.checkpoints.writing import save_model, write_tensors
from eclectus.models.sharding.slices import Slices, Stored
from eclectus.models.training.parallel import is_sharded, whole
from eclectus.models.training.process import Process

# Files of AdamW's moments begin so, as those of the weights with "model".
MOMENTS = "moments"


def save_trained(
    model: Any, side_files: Path, out: Path, moments: dict[str, torch.Tensor] | None, process: Process
) -> None:
    """Writes the model with the side files of a folder and, if given, AdamW's moments to `out`. All processes must call
    it.

    Of a sharded model each process writes a part, in files of its own.
    """
    model.eval()
    if is_sharded(model):
        save_model(model, out, side_files, process=process)
        if moments is not None:
            shapes = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in moments.items()]
            write_tensors(out, shapes, lambda name: whole(moments[name]).cpu(), process=process, stem=MOMENTS)
    elif process.is_main:
        save_model(model, out, side_files)
        if moments is not None:
            full = {name: value.detach().cpu().contiguous() for name, value in moments.items()}
            save_file(full, out / f"{MOMENTS}.safetensors")
    process.barrier()


def stored_moments(checkpoint: str | None, files: ExitStack) -> dict[str, Slices]:
    """AdamW's moments in a checkpoint folder, named as by `eclectus.models.training.optimizer.read_moments`.

    checkpoint: None for none. files: closes the files.
    """
    if checkpoint is None:
        return {}
    folder = Path(checkpoint)
    reader = files.enter_context(CheckpointReader(folder, weight_files(folder, MOMENTS)))
    return {name: Stored(reader, name) for name in reader.specs}
