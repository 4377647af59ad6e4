"""Writing a GGUF file (version 3, little-endian), tensors streamed: memory is one piece of a tensor.

    magic, version, tensors n, entries m | m x (key, type, value) | n x (name, dimensions, type, offset) | data

Metadata types follow the Python ones: bool, int (unsigned 32 bits), float (32 bits), str; lists of str, int (signed 32
bits) and float. Needs no gguf package, so that exports work in every installation.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from eclectus.models.checkpoints.tensor_files import CheckpointError, tensor_bytes

Value = bool | int | float | str | list[str] | list[int] | list[float]
FloatType = Literal["float32", "float16", "bfloat16"]
# Of ggml's types.
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write.

    name: llama.cpp's. shape: as in PyTorch, rows first. pieces: its contents in order, concatenated along the first
    dimension; each is read when its turn comes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Callable[[], Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_gguf_file(path: Path, metadata: dict[str, Value], tensors: list[PlannedTensor]) -> None:
    """Writes the file. Raises CheckpointError for a tensor whose pieces have another size than planned."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            dimensions = tensor.shape[::-1]
            file.write(_string(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
            file.write(struct.pack("<IQ", CODES[tensor.dtype], offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        _pad(file)
        for tensor in tensors:
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: PlannedTensor) -> None:
    start = file.tell()
    for piece in tensor.pieces:
        file.write(tensor_bytes(piece().to(tensor.dtype).contiguous()))
    if file.tell() - start != tensor.nbytes:
        raise CheckpointError(f"{tensor.name} has {file.tell() - start} bytes, planned were {tensor.nbytes}")
    _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, list):
        kind, items = _array(value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    kind, item = _scalar(value)
    return struct.pack("<I", kind) + item


def _scalar(value: bool | int | float | str) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    return _STRING, _string(value)


def _array(values: Iterable[str] | Iterable[int] | Iterable[float]) -> tuple[int, bytes]:
    items = list(values)
    if all(isinstance(each, str) for each in items):
        return _STRING, b"".join(_string(str(each)) for each in items)
    if all(isinstance(each, int) for each in items):
        return _INT32, struct.pack(f"<{len(items)}i", *items)
    return _FLOAT32, struct.pack(f"<{len(items)}f", *items)
