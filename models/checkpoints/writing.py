"""The one writer of checkpoints: config.json with the keys of both transformers generations, and tensors as a stream.

Transformers 5 reads `rope_parameters` and `num_local_experts`, 4.57 and older servers `rope_theta`, `rope_scaling` and
`num_experts`. Without the old keys 4.57 silently loads a model with another rotary base.

The header of each file is computed from names, dtypes and shapes, and the bytes are streamed after it. Files are split
at `max_shard_bytes` and indexed as transformers does.
"""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from eclectus.models.checkpoints.tensor_files import DTYPES, INDEX, CheckpointError, TensorSpec, tensor_bytes

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def with_both_generations(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys of transformers 5 and those that 4.57 and older servers read."""
    config = dict(config)
    experts = config.get("num_local_experts", config.get("num_experts"))
    if experts is not None:
        config |= {"num_local_experts": experts, "num_experts": experts}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    if dtype := config.get("dtype"):
        config["torch_dtype"] = dtype
    # 4.57 reads a null head_dim as the head size itself.
    if config.get("head_dim", 0) is None:
        del config["head_dim"]
    return config


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """config.json as transformers 5 writes it: every field of the class, no private ones, no paths."""
    return {key: value for key, value in json.loads(config.to_json_string()).items() if not key.startswith("_")}


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Writes config.json, keys sorted."""
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_checkpoint(
    directory: Path,
    specs: Iterable[TensorSpec],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Streams tensors into `directory` in the given order, one in memory at a time; returns the file names.

    read: returns the tensor of a name, with exactly the dtype and shape of its spec, else CheckpointError.
    """
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file_name, shard in zip(files, shards, strict=True):
        _write_file(directory / file_name, shard, read)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for shard in shards for spec in shard)},
            "weight_map": {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def _write_file(path: Path, specs: list[TensorSpec], read: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for spec in specs:
            tensor = read(spec.name)
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise CheckpointError(f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}")
            file.write(tensor_bytes(tensor))
