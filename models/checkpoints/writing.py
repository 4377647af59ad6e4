"""The one writer of checkpoints: config.json with the keys of both transformers generations, tensors, side files.

    write_checkpoint    tensors from anywhere, one at a time: upcycled, extended and exported models, extracted bases
    save_model          a live model: dense twins, Lory and the other baselines, results of full, lora and llama_pro

Transformers 5 reads `rope_parameters` and `num_local_experts`, 4.57 and older servers `rope_theta`, `rope_scaling` and
`num_experts`. Without the old keys 4.57 silently loads a model with another rotary base.

transformers' own save_pretrained is not used: at the end of a training it refuses a sampling setting in config.json and
a generation config with a temperature but without sampling, both of which it loads.

The header of each file is computed from names, dtypes and shapes, and the bytes are streamed after it. Files are split
at `max_shard_bytes` and indexed as transformers does.
"""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from eclectus.models.checkpoints.side_files import GENERATION_CONFIG, copy_side_files
from eclectus.models.checkpoints.tensor_files import (
    DTYPES,
    INDEX,
    CheckpointError,
    TensorSource,
    TensorSpec,
    tensor_bytes,
)

MAX_SHARD_BYTES = 5_000_000_000
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def with_both_generations(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys of transformers 5 and those that 4.57 and older servers read."""
    config = dict(config)
    experts = config.get("num_local_experts", config.get("num_experts"))
    # Lory has a num_experts too, which no other class reads.
    if experts is not None and "num_experts_per_tok" in config:
        config |= {"num_local_experts": experts, "num_experts": experts}
    rope = dict(config.get("rope_parameters") or {})
    if not rope and "rope_theta" in config:
        rope = dict(config.get("rope_scaling") or {}) | {"rope_theta": config["rope_theta"]}
        rope["rope_type"] = rope.pop("rope_type", None) or rope.pop("type", "default")
        config["rope_parameters"] = rope
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
        if rope.get("rope_type") == "longrope" and "original_max_position_embeddings" in rope:
            # 4.57 looks for the length at which the factors change among the config's own keys.
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        config |= {"dtype": dtype, "torch_dtype": dtype}
    if config.get("sliding_window") == 0:
        # How Qwen2Moe's class writes that there is none.
        config["sliding_window"] = None
    # 4.57 reads a null head_dim as the head size itself.
    if config.get("head_dim", 0) is None:
        del config["head_dim"]
    return config


class Converted:
    """The tensors of another source with floats in another dtype (a TensorSource).

    dtype: None leaves all as they are. Reading raises ValueError for a tensor with values beyond the dtype's range.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype | None) -> None:
        self._source = source
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in source.specs.items():
            converted = dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
            self.specs[name] = TensorSpec(name, converted, spec.shape)

    def tensor(self, name: str) -> Tensor:
        value = self._source.tensor(name)
        wanted = self.specs[name].dtype
        if value.dtype == wanted:
            return value
        converted = value.to(wanted)
        if converted.isinf().sum() > value.isinf().sum():
            raise ValueError(
                f"{name} holds {value.abs().max().item():.3g}, more than {str(wanted).removeprefix('torch.')} can "
                f"represent ({torch.finfo(wanted).max:.3g}): choose bfloat16 or float32"
            )
        return converted


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """config.json as transformers 5 writes it: every field of the class, no private ones, no paths."""
    return {key: value for key, value in json.loads(config.to_json_string()).items() if not key.startswith("_")}


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Writes config.json, keys sorted."""
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    specs: Iterable[TensorSpec],
    read: Callable[[str], Tensor],
    side_files: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json for both generations, the tensors in the given order, and the side files of a folder.

    read: as in write_tensors. side_files: a checkpoint or tokenizer folder.
    """
    write_config(directory, with_both_generations(config))
    write_tensors(directory, specs, read, max_shard_bytes)
    if side_files is not None:
        copy_side_files(side_files, directory)


def save_model(
    model: PreTrainedModel, directory: Path, side_files: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a live model, with the code of a class that carries its own; `directory` is created.

    side_files: a checkpoint or tokenizer folder; its generation config replaces the model's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    for part in (model, model.config):
        if part._auto_class is not None:
            custom_object_save(part, directory, config=model.config)  # type: ignore[arg-type]  # as transformers does
    tensors = revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    if model.generation_config is not None:
        (directory / GENERATION_CONFIG).write_text(model.generation_config.to_json_string(), encoding="utf-8")
    write_checkpoint(
        directory, plain_config(model.config), specs, tensors.__getitem__, side_files, max_shard_bytes=max_shard_bytes
    )


def write_tensors(
    directory: Path,
    specs: Iterable[TensorSpec],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
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
