"""Reading and writing safetensors checkpoints one tensor at a time.

So a checkpoint larger than memory can be rewritten: the reader reads a tensor's bytes on demand (mapped files would
count as resident memory), the writer computes each file's header from names, dtypes and shapes and then streams the
bytes. The
format: 8 bytes of header length, a JSON header, the tensors one after the other. Files are split at `max_shard_bytes`
and indexed as transformers does.
"""

import json
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or damaged; the message names the file or tensor."""


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

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._offsets: dict[str, tuple[BufferedReader, int]] = {}
        self.specs: dict[str, TensorSpec] = {}
        with ExitStack() as on_error:
            on_error.callback(self._stack.close)
            for file_name, expected in _shards(directory).items():
                self._open(directory / file_name, expected)
            on_error.pop_all()

    def _open(self, path: Path, expected: set[str] | None) -> None:
        if not path.is_file():
            raise CheckpointError(f"{self.directory}: shard {path.name} is missing; fetch it again and retry")
        file = self._stack.enter_context(path.open("rb"))
        header, start = _read_header(file, path)
        if expected is not None and expected - header.keys():
            raise CheckpointError(f"{path} lacks {sorted(expected - header.keys())[0]}, which {INDEX} says is in it")
        for name in header if expected is None else expected:
            entry = header[name]
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{path}: {name} has type {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
            self.specs[name] = TensorSpec(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._offsets[name] = file, start + entry["data_offsets"][0]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU. Raises CheckpointError if there is none."""
        if name not in self._offsets:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        file, offset = self._offsets[name]
        tensor = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        file.seek(offset)
        if file.readinto(tensor_bytes(tensor)) != self.specs[name].nbytes:
            raise CheckpointError(f"{self.directory}: the file of {name} ends within it; fetch it again and retry")
        return tensor

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
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < needed:
            raise ValueError(f"{size} of {needed} bytes")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); fetch it again and retry") from error
    return header, 8 + length


def _shards(directory: Path) -> dict[str, set[str] | None]:
    """By file name, the tensors that it must hold (None: any)."""
    if (directory / INDEX).is_file():
        files: dict[str, set[str]] = {}
        for name, file_name in json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file_name, set()).add(name)
        return dict(files)
    if (directory / "model.safetensors").is_file():
        return {"model.safetensors": None}
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} holds pickled weights (pytorch_model.bin), which are not read here: load it with "
            "transformers and save_pretrained it again, which writes safetensors"
        )
    raise CheckpointError(f"{directory} holds neither model.safetensors nor {INDEX}")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory. Raises CheckpointError if it is missing or not JSON."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json; expected a Hugging Face checkpoint directory")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as little-endian bytes, without a copy if it is contiguous and on the CPU."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)  # type: ignore[arg-type]  # arrays are buffers, which their type says from Python 3.12 on
