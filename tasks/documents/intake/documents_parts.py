"""Documents parts from pieces of candidates, without those that are exact duplicates.

Pieces that follow each other are one part until it holds `part_bytes` of text. A part that is half full may end after
a piece whose last id says so, so that documents that come in between, or go, change the parts around them and no
others; documents that fit one part together are one. A part whose pieces and duplicates are those of an earlier run is
found again. Price: 8 CPU seconds per million documents of 450 characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.intake.read_slices import FLUSH_BYTES
from eclectus.tasks.documents.table import ROWS_PER_GROUP, ROWS_PER_PART, SCHEMA
from eclectus.tasks.over_parts import link_or_copy

# One in so many pieces may end a part that is half full.
ENDS_PART = 4
MOST_COUNTED = 10_000
"""Domains of a part that are counted; of more, the most frequent ones."""


def assembled(last: Sequence[str], sizes: Sequence[int], part_bytes: int) -> list[range]:
    """Which pieces are a part together. last: id of the last candidate of each. sizes: bytes of their documents."""
    if sum(sizes) <= part_bytes:
        return [range(len(sizes))] if any(sizes) else []
    parts, begin, held = list[range](), 0, 0
    for number, (key, size) in enumerate(zip(last, sizes, strict=True)):
        if held and held + size > part_bytes:
            parts.append(range(begin, number))
            begin, held = number, 0
        held += size
        if held >= part_bytes // 2 and int(key[-8:], 16) % ENDS_PART == 0:
            parts.append(range(begin, number + 1))
            begin, held = number + 1, 0
    if held:
        parts.append(range(begin, len(sizes)))
    return parts


def write_part(out: Path, pieces: list[Path], places: list[Path], dropped: list[bytes]) -> dict[str, Any]:
    """Writes `part-*.parquet` of the documents of these pieces, [n] each. dropped: `packed` rows of each piece.

    A part of more than 200,000 documents is several files. Returns their rows, and counts of what is in them.
    """
    kept = [_kept(path, rows) for path, rows in zip(places, dropped, strict=True)]
    rows = [int(each.sum()) for each in kept]
    if len(pieces) == 1 and rows[0] == len(kept[0]) and rows[0] <= ROWS_PER_PART:
        link_or_copy(pieces[0], out / "part-00000.parquet")
        tables = (pq.read_table(pieces[0], columns=["bytes", "domain"]) for _ in range(1))
        return {"rows": rows, **_counted(tables)}
    files = list[int]()
    return {"rows": files, **_counted(_written(out, pieces, places, kept, files))}


def packed(rows: np.ndarray) -> bytes:
    """Row numbers of a piece, ascending, as bytes; empty for none."""
    return np.asarray(rows, np.uint32).tobytes()


def _kept(places: Path, dropped: bytes) -> np.ndarray:
    """Which rows of a piece are documents: bool [n]."""
    kept = np.ones(len(mapped(places)), bool)
    kept[np.frombuffer(dropped, np.uint32)] = False
    return kept


def _written(
    out: Path, pieces: list[Path], places: list[Path], kept: list[np.ndarray], files: list[int]
) -> Iterator[pa.Table]:
    """Writes the parts, and yields what is in each row group. files: gets the rows of each file."""
    writer: pq.ParquetWriter | None = None
    try:
        for group in _groups(pieces, places, kept):
            if writer is None or files[-1] >= ROWS_PER_PART:
                if writer is not None:
                    writer.close()
                writer = pq.ParquetWriter(out / f"part-{len(files):05d}.parquet", SCHEMA, compression="zstd")
                files.append(0)
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
            files[-1] += len(group)
            yield group.select(["bytes", "domain"])
    finally:
        if writer is not None:
            writer.close()


def _groups(pieces: list[Path], places: list[Path], kept: list[np.ndarray]) -> Iterator[pa.Table]:
    """The documents of all pieces in row groups that end where they would if the candidates came one by one."""
    waiting, mask, weights = SCHEMA.empty_table(), np.empty(0, bool), np.empty(0, np.int64)
    for path, of_piece, keep in zip(pieces, places, kept, strict=True):
        weight = np.load(of_piece, allow_pickle=False)[:, 2]
        row = 0
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                here = slice(row, row + len(group))
                waiting = pa.concat_tables([waiting, group])
                mask, weights = np.concatenate([mask, keep[here]]), np.concatenate([weights, weight[here]])
                row += len(group)
                while end := _full(weights):
                    if mask[:end].any():
                        yield waiting.slice(0, end).filter(pa.array(mask[:end])).combine_chunks()
                    waiting, mask, weights = waiting.slice(end), mask[end:], weights[end:]
    if mask.any():
        yield waiting.filter(pa.array(mask)).combine_chunks()


def _full(weights: np.ndarray) -> int:
    """How many of the waiting candidates fill a row group; 0 if they do not."""
    heavy = int(np.searchsorted(np.cumsum(weights[:ROWS_PER_GROUP]), FLUSH_BYTES)) + 1
    end = min(heavy, ROWS_PER_GROUP)
    return end if end <= len(weights) else 0


def _counted(tables: Iterator[pa.Table]) -> dict[str, Any]:
    size, domains, lengths = 0, Counter[str](), Counter[int]()
    for table in tables:
        sizes = table["bytes"].to_numpy()
        size += int(sizes.sum())
        # The bit length of n: 2^(bits - 1) <= n < 2^bits; frexp is exact up to 2^53.
        bits, counts = np.unique(np.frexp(sizes.astype(np.float64))[1], return_counts=True)
        lengths.update(dict(zip(bits.tolist(), counts.tolist(), strict=True)))
        for each in pc.value_counts(table["domain"]).to_pylist():
            domains[each["values"]] += each["counts"]
    return {"bytes": size, "domains": domains.most_common(MOST_COUNTED), "lengths": list(lengths.items())}
