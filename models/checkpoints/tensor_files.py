"""Reading safetensors checkpoints one tensor at a time, so that one larger than memory can be rewritten.

A tensor's bytes are read on demand (mapped files would count as resident memory). The format of a file: 8 bytes of
header length, a JSON header, the tensors one after the other; several files have an index, as transformers writes it.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor, nn

from eclectus.models.checkpoints.config_file import CheckpointError as CheckpointError
from eclectus.models.checkpoints.config_file import read_config as read_config
from eclectus.models.checkpoints.config_file import read_json_object
from eclectus.models.checkpoints.side_files import INDEX, is_file_name

# A block of a tensor: (begin, end) of each dimension.
Bounds = Sequence[tuple[int, int]]
# As in the safetensors library.
LARGEST_HEADER = 100_000_000
# Files of a model's weights are MODEL.safetensors, or MODEL-00001-of-00002.safetensors and so on.
MODEL = "model"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Anything that lists named tensors and returns them one at a time, on the CPU."""

    specs: dict[str, TensorSpec]

    def tensor(self, name: str) -> Tensor: ...


class ModuleTensors:
    """The tensors of a live dense model as a TensorSource; tied duplicates appear once."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self.specs = {n: TensorSpec(n, p.dtype, tuple(p.shape)) for n, p in self._parameters.items()}

    def tensor(self, name: str) -> Tensor:
        return self._parameters[name].detach().cpu()


class CheckpointReader:
    """The tensors of a checkpoint directory, `model.safetensors` or indexed shards, read on demand.

    Raises CheckpointError naming the shard that is missing or damaged, or the directory without safetensors.
    """

    def __init__(self, directory: Path, files: dict[Path, set[str] | None] | None = None) -> None:
        """files: as of `weight_files`, which says those of the model."""
        self.directory = directory
        self._stack = ExitStack()
        self._offsets: dict[str, tuple[BufferedReader, int]] = {}
        self._paths: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        with ExitStack() as on_error:
            on_error.callback(self._stack.close)
            for path, expected in (files or weight_files(directory)).items():
                self._open(path, expected)
            on_error.pop_all()

    def _open(self, path: Path, expected: set[str] | None) -> None:
        try:
            file = self._stack.enter_context(path.open("rb"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        header, start = _read_header(file, path)
        if expected is not None and expected - header.keys():
            raise CheckpointError(
                f"{path} lacks {sorted(expected - header.keys())[0]}, which {INDEX} says is in it; fetch both again"
            )
        for name, entry in header.items():
            if name in self._paths:
                raise CheckpointError(
                    f"{name} is both in {self._paths[name]} and in {path.name}; fetch the checkpoint again, since they "
                    "may differ"
                )
            self._paths[name] = path
            # Older checkpoints store the rotary frequencies, which follow from the config.
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if expected is None or name in expected:
                self.specs[name] = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._offsets[name] = file, start + entry["data_offsets"][0]

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor of that name."""
        return self._paths[name]

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor. Raises CheckpointError if there is none."""
        if name not in self.specs:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        return self.specs[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU. Raises CheckpointError if there is none."""
        return self.block(name, [(0, size) for size in self.spec(name).shape])

    def block(self, name: str, bounds: Bounds) -> Tensor:
        """The block of a tensor between `bounds`, on the CPU; no other rows are read. Raises as `tensor`."""
        spec = self.spec(name)
        first, last = bounds[0] if bounds else (0, 1)
        rows = torch.empty((max(last - first, 0), *spec.shape[1:]) if bounds else (), dtype=spec.dtype)
        file, offset = self._offsets[name]
        file.seek(offset + first * (spec.nbytes // spec.shape[0] if bounds and spec.shape[0] else 0))
        if rows.numel() and file.readinto(tensor_bytes(rows)) != rows.nbytes:
            raise CheckpointError(f"{self.directory}: the file of {name} ends within it; fetch it again and retry")
        return rows[(slice(None), *(slice(*each) for each in bounds[1:]))] if bounds else rows

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """Header entries by tensor name, and the offset of the data. Raises CheckpointError for an incomplete file."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        if size < 8 + length:
            raise ValueError(f"{size} bytes, of which its header claims {length}")
        if length > LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(each, str) for each in notes.values()):
            raise ValueError("its __metadata__ is no object of texts")
        _check_entries(header, size - 8 - length)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); fetch it again and retry") from error
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has type {entry['dtype']}, which is not read here (expected one of "
                f"{', '.join(DTYPES)}); if the checkpoint is quantised, give the float one"
            )
    return header, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in it twice")
    return found


def _check_entries(header: dict[str, Any], size: int) -> None:
    """Raises ValueError unless the tensors cover the `size` bytes of data one after the other, as the format asks."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda each: each[1]["data_offsets"]):
        (begin, stop), shape = entry["data_offsets"], entry["shape"]
        if not all(isinstance(each, int) and each >= 0 for each in (begin, stop, *shape)):
            raise ValueError(f"{name} has shape {shape} at {begin} to {stop}")
        if begin != end:
            raise ValueError(f"{name} begins at byte {begin} of the data, where the tensor before it ends at {end}")
        dtype = DTYPES.get(entry["dtype"])
        if stop < begin or (dtype is not None and stop - begin != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"{name} has {stop - begin} bytes, which do not fit {entry['dtype']} {shape}")
        end = stop
    if end != size:
        raise ValueError(f"{size} of {end} bytes")


def index_of(stem: str) -> str:
    """Name of the index of several files of that stem."""
    return f"{stem}.safetensors.index.json"


def weight_files(directory: Path, stem: str = MODEL) -> dict[Path, set[str] | None]:
    """By safetensors file of a checkpoint directory, the tensors that it must hold (None: any). stem: of their names.

    Raises CheckpointError for a directory without safetensors, and for an index that is damaged or names a file that is
    missing or outside the directory.
    """
    alone, index = directory / f"{stem}.safetensors", directory / index_of(stem)
    if not index.exists():
        if alone.is_file():
            return {alone: None}
        raise CheckpointError(_no_weights(directory))
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensors and files; fetch it again")
    files: dict[Path, set[str] | None] = {}
    named: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        if not is_file_name(file_name):
            raise CheckpointError(
                f"{index}: weight_map names {file_name!r} for {name}; expected the name of a file in the same directory"
            )
        if not file_name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {file_name} for {name}, which is not safetensors")
        named.setdefault(file_name, set()).add(name)
    for file_name, names in named.items():
        if not (directory / file_name).is_file():
            raise CheckpointError(
                f"{directory}: shard {file_name} is missing, which {index.name} names; fetch it again and retry"
            )
        files[directory / file_name] = names
    if alone.is_file() and alone not in files:
        raise CheckpointError(
            f"{directory} holds two sets of weights, {alone.name} and the shards that {index.name} names, and programs "
            "differ in which they read; move the one away that is not meant"
        )
    return files


def _no_weights(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")) or any(directory.glob("*.pt*")):
        return (
            f"{directory} holds pickled weights (pytorch_model.bin), which are not read here: load it with "
            "transformers and save_pretrained it again, which writes safetensors"
        )
    if (directory / "adapter_model.safetensors").is_file():
        return (
            f"{directory} holds an adapter (adapter_model.safetensors) without its base: merge it into the base with "
            "peft's merge_and_unload, and save that"
        )
    return f"{directory} holds neither model.safetensors nor {INDEX}; fetch the checkpoint again, weights included"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as little-endian bytes, without a copy if it is contiguous and on the CPU."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)  # type: ignore[arg-type]  # arrays are buffers, which their type says from Python 3.12 on
