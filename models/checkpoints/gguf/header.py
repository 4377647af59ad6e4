"""The header of a GGUF file (version 2 or 3, little-endian): metadata and a list of tensors, with every length checked.

    magic, version, tensors n, entries m | m x (key, type, value) | n x (name, dimensions, type, offset) | data

The reader of the gguf package believes what a header says of lengths: a damaged one takes all memory.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.tensor_files import CheckpointError

VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# No published tensor has more dimensions.
_DIMENSIONS = 4


# Metadata that changes no logit, by the beginning of its key.
HARMLESS = ("GGUF.", "general.", "tokenizer.", "split.", "quantize.", "mradermacher.")
# The same, of the architecture, by the only values that are known to change none.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth",),
    "rope.scaling.finetuned": (True, False),
}


class Metadata:
    """The metadata of one architecture's model; remembers which keys were asked for."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        self.architecture = str(values.get("general.architecture"))
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `ARCHITECTURE.key`."""
        name = f"{self.architecture}.{key}"
        self._asked.add(name)
        return self.values.get(name, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. Raises CheckpointError for anything else, such as a list of one for each layer."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
            found = "lacks it" if value is None else f"has {str(value)[:60]}"
            raise CheckpointError(f"{self.path}: expected one positive number as {self.architecture}.{key}, {found}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises CheckpointError for anything else."""
        value = self.number(key, default)
        if value != int(value):
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {value}, expected a whole number")
        return int(value)

    def check_rest(self) -> None:
        """Raises UnsupportedModelError naming the first key that nobody asked for and that may change logits."""
        prefix = f"{self.architecture}."
        for name, value in self.values.items():
            neutral = NEUTRAL.get(name.removeprefix(prefix), ()) if name.startswith(prefix) else ()
            if name in self._asked or name.startswith(HARMLESS) or value in neutral:
                continue
            raise UnsupportedModelError(
                f"{self.path} has {name} = {str(value)[:60]}, which is not read here, so that the result would be "
                "another model: give the safetensors checkpoint"
            )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not yet read."""

    path: Path
    name: str
    kind: Any
    """Its gguf.GGMLQuantizationType."""
    shape: tuple[int, ...]
    """As in PyTorch, rows first."""
    offset: int
    row_bytes: int

    def values(self) -> np.ndarray:
        """The values in fp32, dequantised."""
        from gguf.quants import dequantize

        rows = self._rows(slice(None))
        return np.array(dequantize(rows, self.kind), dtype=np.float32).reshape(self.shape)

    def check_kind(self) -> None:
        """Raises UnsupportedModelError for a type that the gguf package cannot dequantise."""
        from gguf.quants import dequantize

        try:
            dequantize(self._rows(slice(1)), self.kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.path}: {self.name} is of type {self.kind.name}, which the gguf package cannot dequantise: give "
                "the safetensors checkpoint, or a GGUF file in F16 or Q8_0"
            ) from error

    def _rows(self, which: slice) -> np.ndarray:
        size = (math.prod(self.shape[:-1]), self.row_bytes)
        return np.memmap(self.path, mode="r", offset=self.offset, shape=size)[which]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata by key, and tensors by name. Of lists of the tokenizer, only the length is kept.

    Raises CheckpointError for a damaged file, UnsupportedModelError for another byte order or version.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise CheckpointError(f"{path} cannot be read as GGUF (it has {path.stat().st_size} bytes); fetch it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()


class _Header:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if self.data[:4] != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        self.at = 4
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(f"{self.path} is a big-endian GGUF file: give the little-endian one")
        if version not in VERSIONS:
            raise UnsupportedModelError(f"{self.path} is of GGUF version {version}; versions 2 and 3 can be read")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        values: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            if key in values:
                raise self._damaged(f"{key} stands twice")
            values[key] = self._value(self._scalar("I"), counted=key.startswith("tokenizer."))
        stored = [self._tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment}")
        start = -(-self.at // alignment) * alignment
        return values, self._placed(stored, start)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read as GGUF ({what}); fetch it again, or give the safetensors checkpoint"
        )

    def _take(self, size: int) -> int:
        """Moves on by `size` bytes; returns where they begin."""
        begin = self.at
        if size > len(self.data) - begin:
            raise self._damaged(f"its header ends at byte {len(self.data)}")
        self.at += size
        return begin

    def _scalar(self, code: str) -> Any:
        begin = self._take(struct.calcsize(code))
        return struct.unpack_from("<" + code, self.data, begin)[0]

    def _string(self) -> str:
        size = self._scalar("Q")
        begin = self._take(size)
        try:
            return self.data[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"a text at byte {begin} is not UTF-8") from error

    def _value(self, kind: int, counted: bool, depth: int = 0) -> Any:
        """A value of that type. counted: of a list, return the length alone."""
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 2:
            raise self._damaged(f"a value at byte {self.at} is of type {kind}")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            code = f"{count}{_SCALARS[inner]}"
            begin = self._take(count * struct.calcsize(_SCALARS[inner]))
            return count if counted else list(struct.unpack_from("<" + code, self.data, begin))
        items = (self._value(inner, False, depth + 1) for _ in range(count))
        return sum(1 for _ in items) if counted else list(items)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset)."""
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _placed(self, stored: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, StoredTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors: dict[str, StoredTensor] = {}
        for name, shape, number, offset in stored:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError as error:
                raise self._damaged(f"{name} is of the unknown type {number}") from error
            block, size = GGML_QUANT_SIZES[kind]
            row_bytes = shape[-1] // block * size
            if name in tensors or shape[-1] % block or not min(shape):
                raise self._damaged(f"{name} stands twice" if name in tensors else f"{name} has shape {shape}")
            end = start + offset + math.prod(shape[:-1]) * row_bytes
            if end > len(self.data):
                raise self._damaged(f"{name} ends at byte {end}, the file at {len(self.data)}")
            tensors[name] = StoredTensor(self.path, name, kind, shape, start + offset, row_bytes)
        return tensors
