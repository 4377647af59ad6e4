"""Reading safetensors checkpoints one tensor at a time, so that one larger than memory can be rewritten.

A tensor's bytes are read on demand (mapped files would count as resident memory). The format of a file: 8 bytes of
header length, a JSON header, the tensors one after the other; several files have an index, as transformers writes it.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import torch
from torch import Tensor, nn

from eclectus.models.checkpoints.side_files import INDEX

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: {name} has type {entry['dtype']}; expected one of {', '.join(DTYPES)}")
            self.specs[name] = TensorSpec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as little-endian bytes, without a copy if it is contiguous and on the CPU."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)  # type: ignore[arg-type]  # arrays are buffers, which their type says from Python 3.12 on
