"""The token file of an `instances` artifact: one file that NumPy, Arrow and `datasets.load_from_disk` all read.

The artifact's folder is a `datasets` folder: an Arrow stream of one record batch with a column `input_ids` [M, L]. A
batch's numbers are contiguous, so NumPy maps them in place, at the offset given in `instances.json`, without pyarrow.
The file is first written empty (from a sparse file), then filled through that map: any size in bounded memory.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from eclectus.storage.artifact import Draft

FILE = "data-00000-of-00001.arrow"
TOKENS, POSITIONS = "input_ids", "position_ids"


@dataclass(frozen=True)
class Matrix:
    """Location of a matrix [rows, columns]: `np.memmap(file, dtype, "r", offset, (rows, columns))`."""

    file: str
    dtype: str
    offset: int
    rows: int
    columns: int


def lay_out(out: Draft, columns: dict[str, np.dtype], rows: int, length: int) -> dict[str, Matrix]:
    """Writes the token file, all zeros, and returns where each column's matrix is."""
    with tempfile.TemporaryDirectory(dir=out.path.parent, prefix="empty-") as scratch:
        arrays = []
        for name, kind in columns.items():
            empty = np.memmap(f"{scratch}/{name}", kind, "w+", shape=(rows * length,))
            values = pa.Array.from_buffers(pa.from_numpy_dtype(kind), rows * length, [None, pa.py_buffer(empty)])
            arrays.append(pa.FixedSizeListArray.from_arrays(values, length))
        batch = pa.record_batch(arrays, names=list(columns))
        with pa.OSFile(str(out.file(FILE)), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    with pa.memory_map(str(out.file(FILE))) as source:
        start = source.read_buffer(1).address
        source.seek(0)
        batch = pa.ipc.open_stream(source).read_next_batch()
        return {
            name: Matrix(FILE, np.dtype(kind).name, batch[name].buffers()[-1].address - start, rows, length)
            for name, kind in columns.items()
        }


def open_matrix(out: Draft, matrix: Matrix) -> np.memmap:
    """The matrix, mapped for writing."""
    return np.memmap(out.file(matrix.file), matrix.dtype, "r+", matrix.offset, (matrix.rows, matrix.columns))


def describe(out: Draft, matrices: dict[str, Matrix], digest: str) -> None:
    """Writes the metadata for `datasets.load_from_disk`. digest: of the contents; it names what `datasets` caches."""
    features = {
        name: {"feature": {"dtype": each.dtype, "_type": "Value"}, "length": each.columns, "_type": "Sequence"}
        for name, each in matrices.items()
    }
    state: dict[str, object] = {
        "_data_files": [{"filename": FILE}],
        "_fingerprint": hashlib.sha256(digest.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    out.file("dataset_info.json").write_text(json.dumps({"features": features}, indent=1))
    out.file("state.json").write_text(json.dumps(state, indent=1, sort_keys=True))


def as_json(matrices: dict[str, Matrix]) -> dict[str, dict[str, object]]:
    return {name: asdict(each) for name, each in matrices.items()}
