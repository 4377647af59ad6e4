"""The one writer of checkpoints: config.json with the keys of both transformers generations, tensors, side files.

    write_checkpoint    tensors from anywhere, one at a time: upcycled, extended and exported models, extracted bases
    save_model          a live model: dense twins, Lory and the other baselines, results of full, lora and llama_pro

Transformers 5 reads `rope_parameters` and `num_local_experts`, 4.57 and older servers `rope_theta`, `rope_scaling` and
`num_experts`. Without the old keys 4.57 silently loads a model with another rotary base.

transformers' own save_pretrained is not used: at the end of a training it refuses a sampling setting in config.json and
a generation config with a temperature but without sampling, both of which it loads.

The header of each file is computed from names, dtypes and shapes, and the bytes are streamed after it. Files are split
at `max_shard_bytes` and indexed as transformers does. The processes of a sharded model write one checkpoint together.
"""

import json
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from eclectus.models.checkpoints.side_files import GENERATION_CONFIG, copy_side_files
from eclectus.models.checkpoints.tensor_files import (
    DTYPES,
    MODEL,
    CheckpointError,
    TensorSource,
    TensorSpec,
    index_of,
    tensor_bytes,
)
from eclectus.models.sharding.live import LiveTensors, as_transformers_writes, stock_shell
from eclectus.models.training.process import Process

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
    process: Process | None = None,
) -> None:
    """Writes config.json for both generations, the tensors in the given order, and the side files of a folder.

    read, process: as in write_tensors. side_files: a checkpoint or tokenizer folder.
    """
    if process is None or process.is_main:
        write_config(directory, with_both_generations(config))
        if side_files is not None:
            copy_side_files(side_files, directory)
    write_tensors(directory, specs, read, max_shard_bytes, process)


def save_model(
    model: PreTrainedModel,
    directory: Path,
    side_files: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    process: Process | None = None,
) -> None:
    """Writes a live model, with the code of a class that carries its own; `directory` is created.

    side_files: a checkpoint or tokenizer folder; its generation config replaces the model's. process: of a sharded
    model, in whatever form it was trained; all processes must call this, and each writes a part (`write_tensors`).
    """
    source: TensorSource
    if process is not None:
        shell = stock_shell(model)
        source = as_transformers_writes(shell, LiveTensors(model))
        shell.config.dtype = next(iter(source.specs.values())).dtype
    else:
        shell, model.config.dtype = model, model.dtype
        tensors = revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))
        source = InMemoryTensors(tensors)
    shell.config.architectures = [type(shell).__name__]
    if process is None or process.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        for part in (shell, shell.config):
            if part._auto_class is not None:
                custom_object_save(part, directory, config=shell.config)  # type: ignore[arg-type]  # as transformers does
        if shell.generation_config is not None:
            (directory / GENERATION_CONFIG).write_text(shell.generation_config.to_json_string(), encoding="utf-8")
    if process is not None:
        # Before any of them writes into the folder; a process of another replica gathers without rank 0.
        process.barrier()
    config = plain_config(shell.config)
    write_checkpoint(directory, config, source.specs.values(), source.tensor, side_files, max_shard_bytes, process)


class InMemoryTensors:
    """Tensors by name (a TensorSource)."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def write_tensors(
    directory: Path,
    specs: Iterable[TensorSpec],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    process: Process | None = None,
    stem: str = MODEL,
) -> None:
    """Streams tensors into `directory` in the given order, one in memory at a time.

    read: returns the tensor of a name, with exactly the dtype and shape of its spec, else CheckpointError. stem: of the
    files' names. process: of several that write one checkpoint. All must call this, and all read all tensors, in the
    same order; each writes those that it owns, about as many bytes as the others, into files of its own. The index is
    written last. What one of them cannot write is raised by all, as CheckpointError.
    """
    process, specs = process or Process(), list(specs)
    files = _divided(specs, process.world, max_shard_bytes)
    names = [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [f"{stem}.safetensors"]
    own = [(directory / name, held) for name, (rank, held) in zip(names, files, strict=True) if rank == process.rank]
    fault: str | None = None
    with ExitStack() as stack:
        writer = stack.enter_context(_FileSequence(own))
        for spec in specs:
            tensor = read(spec.name)
            if fault is not None or spec.name not in writer.names:
                continue
            try:
                writer.write(spec, tensor)
            except OSError as error:
                if process.world == 1:
                    raise
                fault = f"{writer.path} cannot be written by process {process.rank}: {error.strerror or error}"
            del tensor
    if faults := [each for each in process.gather(fault) if each]:
        raise CheckpointError(f"{faults[0]}; nothing was kept")
    if len(files) > 1 and process.is_main:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": {spec.name: file for file, (_, held) in zip(names, files, strict=True) for spec in held},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / index_of(stem)).write_text(text, encoding="utf-8")
    process.barrier()


def _divided(specs: list[TensorSpec], world: int, max_bytes: int) -> list[tuple[int, list[TensorSpec]]]:
    """(process, tensors) of each file. A tensor goes to the process with the fewest bytes so far."""
    files: list[list[list[TensorSpec]]] = [[] for _ in range(world)]
    loads = [0] * world
    for spec in specs:
        rank = loads.index(min(loads))
        loads[rank] += spec.nbytes
        if not files[rank] or sum(each.nbytes for each in files[rank][-1]) + spec.nbytes > max_bytes:
            files[rank].append([])
        files[rank][-1].append(spec)
    divided = [(rank, held) for rank, own in enumerate(files) for held in own]
    return divided or [(0, [])]


class _FileSequence:
    """Safetensors files, written one after the other, each tensor in its turn."""

    def __init__(self, files: list[tuple[Path, list[TensorSpec]]]) -> None:
        self._files, self._open = iter(files), ExitStack()
        self._left: list[str] = []
        self._file: Any = None
        self.path = files[0][0] if files else Path()
        self.names = {spec.name for _, held in files for spec in held}
        if files and not self.names:
            self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def write(self, spec: TensorSpec, tensor: Tensor) -> None:
        if not self._left:
            self._start()
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}")
        self._left.remove(spec.name)
        self._file.write(tensor_bytes(tensor))
        if not self._left:
            self._open.close()

    def _start(self) -> None:
        self.path, specs = next(self._files)
        self._left = [spec.name for spec in specs]
        self._file = self._open.enter_context(self.path.open("wb"))
        self._file.write(_header(specs))


def _header(specs: list[TensorSpec]) -> bytes:
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
    return struct.pack("<Q", len(encoded)) + encoded
