"""Texts of documents by row number, reading only the row groups that hold them.

`pyarrow.dataset.take` scans the whole data set for any ten rows (1.0 s of 25,000 documents); the row groups' sizes stand in
the footers, so that the ones needed can be read alone (0.03 s each). Price: one row group, ROWS_PER_GROUP texts, in memory.
"""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.table import parts


class TextReader:
    """Reads texts of one documents artifact; keep it for many reads, the footers are read once."""

    def __init__(self, documents: Artifact) -> None:
        self._paths = parts(documents)
        self._groups: list[tuple[int, int]] = []
        ends = [0]
        for number, path in enumerate(self._paths):
            footer = pq.read_metadata(path)
            for group in range(footer.num_row_groups):
                self._groups.append((number, group))
                ends.append(ends[-1] + footer.row_group(group).num_rows)
        self._begins = np.array(ends)

    def read(self, rows: np.ndarray) -> list[str]:
        """The texts of these row numbers (int array, any order, repeats allowed); a missing text is empty."""
        rows = np.asarray(rows)
        groups = np.searchsorted(self._begins, rows, side="right") - 1
        texts: list[str] = [""] * len(rows)
        for group in np.unique(groups):
            number, inside = self._groups[group]
            with pq.ParquetFile(self._paths[number]) as file:
                column = file.read_row_group(inside, columns=["text"])["text"]
            here = np.flatnonzero(groups == group)
            for place, text in zip(here, column.take(rows[here] - self._begins[group]).to_pylist(), strict=True):
                texts[place] = text or ""
        return texts
