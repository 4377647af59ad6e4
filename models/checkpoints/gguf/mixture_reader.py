"""A GGUF file, dense or a mixture, as a float64 reference of what llama.cpp computes with it."""

from pathlib import Path

import torch
from torch import Tensor

from eclectus.models.checkpoints.gguf.header import StoredTensor, read_header
from eclectus.models.checkpoints.gguf.rope import reference_rope
from eclectus.models.checkpoints.reference import ReferenceModel
from eclectus.models.checkpoints.tensor_files import CheckpointError


def gguf_reference(path: Path) -> ReferenceModel:
    """The model in one GGUF file. Raises CheckpointError for a file that cannot be read."""
    values, stored = read_header(path)
    arch = values["general.architecture"]
    heads = values[f"{arch}.attention.head_count"]
    width = values[f"{arch}.attention.key_length"]
    freqs = stored["rope_freqs.weight"].values().flatten().tolist() if "rope_freqs.weight" in stored else []

    def weight(name: str) -> Tensor | None:
        return torch.from_numpy(stored[name].values()) if name in stored else None

    def expert(layer: int, number: int, matrix: str) -> Tensor:
        return torch.from_numpy(_slice(path, stored, f"blk.{layer}.{matrix}_exps.weight", number).values())

    return ReferenceModel(
        values[f"{arch}.block_count"],
        heads,
        values.get(f"{arch}.attention.head_count_kv", heads),
        width,
        float(values[f"{arch}.attention.layer_norm_rms_epsilon"]),
        reference_rope(values, arch, freqs),
        "neighbours" if arch == "llama" else "halves",
        (None,) * values[f"{arch}.block_count"],
        "silu",
        weight,
        values.get(f"{arch}.expert_used_count", 0),
        expert,
    )


def _slice(path: Path, stored: dict[str, StoredTensor], name: str, number: int) -> StoredTensor:
    """One expert's matrix within a stack."""
    if name not in stored:
        raise CheckpointError(f"{path} has no tensor {name}")
    stack = stored[name]
    rows, columns = stack.shape[1:]
    offset = stack.offset + number * rows * stack.row_bytes
    return StoredTensor(path, f"{name}[{number}]", stack.kind, (rows, columns), offset, stack.row_bytes)
