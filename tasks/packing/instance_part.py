"""One part of the instances: its tokens, spans and documents, gathered along the plan (instance_plan.py).

A part has the instances at some positions of the shuffled stream, so its documents come from everywhere: the tokens
from the token files (document_tokens.py), ids and names from copies of these columns that are read in place. Both are
read in the order in which they lie there. Memory: about 10 times the part's tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.table import parts, read_part
from eclectus.tasks.grouping.instance_layout import Spans, spans_of
from eclectus.tasks.over_parts import Done, Part, key_of, over_parts
from eclectus.tasks.packing.conversation_tokens import MASK
from eclectus.tasks.packing.instance_file import LEARNED, POSITIONS, TOKENS, part_file, token_file, write_arrow
from eclectus.tasks.packing.instance_plan import CODED, merged

TOKENS_AT_ONCE = 2**20
ROWS_PER_GROUP, BYTES_PER_GROUP = 2**20, 2**30
NAMES = ["document", "name"]
SECONDS_PER_DOCUMENT = 3e-6


def names_by_part(documents: Artifact, workers: int) -> list[Done]:
    """Of each part of documents the columns NAMES, in a file that is read in place."""
    digests = documents.digests()
    wanted = [
        Part(key_of("names 1", digests[f"documents/{path.name}"]), {"path": path}, pq.read_metadata(path).num_rows)
        for path in parts(documents)
    ]
    return over_parts(names_of_part, wanted, "reading names", "documents", SECONDS_PER_DOCUMENT, workers)


def names_of_part(out: Path, path: Path) -> dict[str, Any]:
    schema = pa.schema([(name, pa.string()) for name in NAMES])
    table = pa.Table.from_batches(read_part(path, NAMES, rows=2**20), schema).combine_chunks()
    with pa.OSFile(str(out / "names.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    return {"documents": len(table)}


def write_part(
    out: Path,
    plan: Path,
    tokens: list[Path],
    names: list[Path],
    number: int,
    count: int,
    instances: tuple[int, int],
    length: int,
    kind: str,
    padding: int,
    with_positions: bool,
    left_out: Sequence[str] = (),
    with_mask: bool = False,
) -> dict[str, Any]:
    """Writes part `number` of `count`: instances first to last of the shuffled stream.

    plan, tokens, names: folders. kind: of the tokens. padding: the token after the end of the stream. left_out: ids of
    documents whose tokens are padding, and which no span names. with_mask: whether the tokens come with a loss mask.
    """
    first, last = instances
    source, begins, starts, rows, labels = (
        mapped(plan / f"{name}.npy") for name in ("source", "begins", "starts", "rows", "labels")
    )
    spans = spans_of(begins, np.asarray(source[first:last]), first, length)
    token_starts = starts[spans.position] + spans.offset
    if (plan / "offsets.npy").exists():
        spans, token_starts = _without_gaps(spans, token_starts, starts, mapped(plan / "offsets.npy"))
    holes = 0
    if left_out:
        ids = _located(names, rows[spans.position])["document"]
        kept = ~pc.is_in(ids, pa.array(left_out)).to_numpy(zero_copy_only=False)
        holes = int((~kept).sum())
        spans, token_starts = _where(spans, kept), token_starts[kept]
    to = spans.to - first * length
    wanted = [TOKENS, *([POSITIONS] if with_positions else []), *([LEARNED] if with_mask else [])]
    columns = _gathered(tokens, wanted, (last - first, length), np.dtype(kind), padding, token_starts, to, spans.size)
    learned = {"learned": int(columns[LEARNED].sum(dtype=np.int64))} if with_mask else {}
    matrices = write_arrow(out / token_file(number, count), columns)
    digest = hashlib.sha256(columns[TOKENS].data).hexdigest()
    del columns
    codes, row = labels[spans.position], rows[spans.position]
    label_names = _read_names(plan)
    language, domain = (merged(label_names[name])[codes[:, column]] for column, name in enumerate(CODED[:2]))
    table = [spans.to, spans.size, row, language, domain]
    np.save(out / part_file("spans", "npy", number, count), np.stack(table, axis=1))
    del table, language, domain
    located = _located(names, row) | {
        name: _labelled(codes[:, column], label_names[name]) for column, name in enumerate(CODED)
    }
    write_texts(pa.table(located | _places(spans)), out / part_file("documents", "parquet", number, count))
    return {
        "matrices": {name: asdict(matrix) for name, matrix in matrices.items()},
        "digest": digest,
        "spans": len(spans.to),
        "left_out": holes,
        **learned,
    }


def write_texts(table: pa.Table, path: Path) -> None:
    """Writes codes as the texts they stand for, in row groups small enough for long labels."""
    schema = pa.schema([pa.field(each.name, pa.string() if each.name in CODED else each.type) for each in table.schema])
    longest = sum(_longest(table[name].combine_chunks()) for name in CODED)
    rows = max(1, min(ROWS_PER_GROUP, BYTES_PER_GROUP // max(1, 4 * longest)))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, max(1, len(table)), rows):
            writer.write_table(table.slice(begin, rows).cast(schema))


def _gathered(
    files: list[Path],
    wanted: list[str],
    shape: tuple[int, int],
    kind: np.dtype,
    padding: int,
    source: np.ndarray,
    target: np.ndarray,
    size: np.ndarray,
) -> dict[str, np.ndarray]:
    """The columns `wanted` of TOKENS, POSITIONS and LEARNED, [M, L] each, from spans as in `_pieces`."""
    columns = {TOKENS: np.full(shape, padding, kind)}
    if POSITIONS in wanted:
        columns[POSITIONS] = np.zeros(shape, np.uint16 if shape[1] <= 2**16 else np.uint32)
    for at, where, inside in _pieces(files, kind, source, target, size):
        columns[TOKENS].reshape(-1)[where] = at
        if POSITIONS in wanted:
            columns[POSITIONS].reshape(-1)[where] = inside
    if LEARNED in wanted:
        columns[LEARNED] = np.zeros(shape, np.uint8)
        for at, where, _ in _pieces(files, np.dtype(np.uint8), source, target, size, MASK):
            columns[LEARNED].reshape(-1)[where] = at
    return columns


def _pieces(
    files: list[Path],
    kind: np.dtype,
    source: np.ndarray,
    target: np.ndarray,
    size: np.ndarray,
    name: str = "tokens",
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, their places in the part, their places in their span) of spans, about TOKENS_AT_ONCE at a time.

    source: int64 [S], start of each span in the files end to end. target: in the part. name: of the file in a folder.
    """
    counts = [(folder / name).stat().st_size // kind.itemsize for folder in files]
    bases = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(source)
    borders = np.searchsorted(source[order], bases)
    for file, folder in enumerate(files):
        here = order[borders[file] : borders[file + 1]]
        if not len(here):
            continue
        flat = np.memmap(folder / name, kind, mode="r")
        ends = np.cumsum(size[here])
        cuts = np.unique(np.searchsorted(ends, np.arange(0, ends[-1], TOKENS_AT_ONCE), side="left"))
        for first, last in zip(cuts, [*cuts[1:], len(here)], strict=True):
            chosen = here[first:last]
            sizes = size[chosen]
            inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            at = flat[np.repeat(source[chosen] - bases[file], sizes) + inside]
            yield at, np.repeat(target[chosen], sizes) + inside, inside
        # Closed, the pages are no longer counted as this process's memory.
        del flat


def _without_gaps(
    spans: Spans, token_starts: np.ndarray, starts: np.ndarray, offsets: np.ndarray
) -> tuple[Spans, np.ndarray]:
    """The spans that are no gaps, with their start in the document, where the plan is over pieces of documents."""
    there = starts[spans.position] >= 0
    kept = _where(spans, there)
    return replace(kept, offset=kept.offset + offsets[kept.position]), token_starts[there]


def _where(spans: Spans, kept: np.ndarray) -> Spans:
    """Some of the spans. kept: bool [S]."""
    columns = (spans.to, spans.size, spans.position, spans.offset)
    to, size, position, offset = (each[kept] for each in columns)
    return replace(spans, to=to, size=size, position=position, offset=offset)


def _located(files: list[Path], rows: np.ndarray) -> dict[str, pa.Array]:
    """The columns NAMES of these rows of the documents, int64 [S], in any order."""
    tables = [pa.ipc.open_file(pa.memory_map(str(folder / "names.arrow"))).read_all() for folder in files]
    firsts = np.concatenate([[0], np.cumsum([len(table) for table in tables])])
    order = np.argsort(rows, kind="stable")
    borders = np.searchsorted(rows[order], firsts)
    found = [
        table.take(pa.array(rows[order[borders[part] : borders[part + 1]]] - firsts[part]))
        for part, table in enumerate(tables)
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    together = pa.concat_tables(found).combine_chunks().take(pa.array(back))
    return {name: together[name] for name in NAMES}


def _places(spans: Spans) -> dict[str, pa.Array]:
    return {
        "instance": pa.array(spans.to // spans.length),
        "instance_offset": pa.array(spans.to % spans.length, pa.int32()),
        "tokens": pa.array(spans.size, pa.int32()),
        "document_offset": pa.array(spans.offset, pa.int32()),
    }


def _read_names(plan: Path) -> dict[str, list[str | None]]:
    names: dict[str, list[str | None]] = json.loads((plan / "names.json").read_text())
    return names


def _labelled(codes: np.ndarray, names: list[str | None]) -> pa.DictionaryArray:
    missing = np.array([name is None for name in names])[codes]
    texts = pa.array([name or "" for name in names], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32(), mask=missing), texts)


def _longest(labels: pa.DictionaryArray) -> int:
    """Characters of the longest label that is used."""
    used = labels.indices.unique().drop_null()
    return pc.max(pc.utf8_length(labels.dictionary.take(used))).as_py() or 0
