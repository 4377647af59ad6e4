"""The token files of an `instances` artifact, which NumPy, Arrow and `datasets.load_from_disk` all read.

The artifact's folder is a `datasets` folder: in each part an Arrow stream of one record batch with a column `input_ids`
[M, L]. A batch's numbers are contiguous, so NumPy maps them in place, at the offset given in `instances.json`, without
pyarrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from eclectus.storage.artifact import Artifact, Draft

TOKENS, POSITIONS, LEARNED = "input_ids", "position_ids", "loss_mask"


@dataclass(frozen=True)
class Matrix:
    """Location of a matrix [rows, columns]: `np.memmap(file, dtype, "r", offset, (rows, columns))`."""

    file: str
    dtype: str
    offset: int
    rows: int
    columns: int


def token_file(number: int, count: int) -> str:
    """Name of the token file of a part, as `datasets` names them."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def part_file(stem: str, ending: str, number: int, count: int) -> str:
    """Name of another file of a part; without numbers if there is one part."""
    return f"{stem}.{ending}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{ending}"


def document_tables(instances: Artifact) -> list[Path]:
    """The tables that say which document is in which instance, one of each part."""
    return sorted(Path(instances.path).glob("documents*.parquet"))


def write_arrow(path: Path, columns: dict[str, np.ndarray]) -> dict[str, Matrix]:
    """Writes matrices [M, L] as the columns of one record batch, and returns where each is."""
    arrays = []
    for matrix in columns.values():
        buffer = pa.py_buffer(np.ascontiguousarray(matrix))
        values = pa.Array.from_buffers(pa.from_numpy_dtype(matrix.dtype), matrix.size, [None, buffer])
        arrays.append(pa.FixedSizeListArray.from_arrays(values, matrix.shape[1]))
    batch = pa.record_batch(arrays, names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pa.memory_map(str(path)) as source:
        start = source.read_buffer(1).address
        source.seek(0)
        batch = pa.ipc.open_stream(source).read_next_batch()
        return {
            name: Matrix(path.name, matrix.dtype.name, batch[name].buffers()[-1].address - start, *matrix.shape)
            for name, matrix in columns.items()
        }


def describe(out: Draft, parts: Sequence[dict[str, Matrix]], digests: Sequence[str]) -> None:
    """Writes the metadata for `datasets.load_from_disk`. digests: of the parts' tokens; they name what it caches."""
    features = {
        name: {"feature": {"dtype": each.dtype, "_type": "Value"}, "length": each.columns, "_type": "Sequence"}
        for name, each in parts[0].items()
    }
    content = " ".join([*digests, *map(str, parts)])
    state: dict[str, object] = {
        "_data_files": [{"filename": part[TOKENS].file} for part in parts],
        "_fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    out.file("dataset_info.json").write_text(json.dumps({"features": features}, indent=1))
    out.file("state.json").write_text(json.dumps(state, indent=1, sort_keys=True))


def as_json(parts: Sequence[dict[str, Matrix]]) -> dict[str, Any]:
    """Column -> where its matrix is, or for several parts the list of them."""
    located = {name: [asdict(part[name]) for part in parts] for name in parts[0]}
    return {name: each[0] if len(each) == 1 else each for name, each in located.items()}
