"""Packing: documents along their chains become instances of L tokens; the instances are shuffled.

    tokens of the documents, each after the tokens that the tokenizer puts before a text (BeginSettings) and followed by
    the end-of-document token, concatenated in the grouping's order, cut every L tokens (a document may continue in the
    next instance, which then begins within it), then the instances are permuted under a seed.

The shuffle matters: documents should be similar within an instance, not across adjacent instances (docs/methods.md
1.6); if embeddings are given, both similarities are measured. The last, incomplete instance is dropped, or padded.
Texts are tokenised once, on all cores, in storage order, into a scratch file; instances are then gathered from it, a
million tokens at a time, so memory is bounded by 100 bytes per document. Price: tokenising, 0.5 to 1M tokens/s on 2
cores; the rest takes a tenth of it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import open_embeddings, open_ids
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.table import read_batches, read_table
from eclectus.tasks.grouping.instance_layout import Spans, plan
from eclectus.tasks.grouping.quality import instance_quality
from eclectus.tasks.packing.instance_file import POSITIONS, TOKENS, Matrix, as_json, describe, lay_out, open_matrix
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer
from eclectus.tasks.run import metric, progress
from eclectus.tasks.settings import BASIC, SEED
from eclectus.tasks.step import step

TEXTS_AT_ONCE = 512
TOKENS_AT_ONCE = 2**20
ABOUT = ["document", "name", "language", "domain", "source"]
CODED = ("language", "domain", "source")
MOST_LABELS = 1000
ROWS_PER_GROUP, BYTES_PER_GROUP = 2**20, 2**30


class PackSettings(BeginSettings):
    instance_tokens: int = Field(
        512, ge=16, description="Length L of a training instance, in tokens.", json_schema_extra=BASIC
    )
    pack_remainder: Literal["drop", "pad"] = Field(
        "drop",
        description="What to do with the last, incomplete instance: drop it, or pad it (padding is not trained on).",
    )
    pack_group: Literal["original", "expanded", "all"] = Field(
        "all",
        description="Which documents to pack: those of the original languages, of the expanded languages, or all.",
    )
    pack_position_ids: bool = Field(
        False,
        description="Also store position_ids, which restart at 0 with every document, for trainers whose attention "
        "must not cross documents.",
    )
    seed: int = SEED


@step(makes="instances", version=3)
def pack(
    documents: Artifact,
    tokenizer: Artifact,
    settings: PackSettings,
    out: Draft,
    grouping: Artifact | None = None,
    embeddings: Artifact | None = None,
) -> None:
    """Packs the training documents into instances, along a grouping or, without one, in random order.

    embeddings: of these documents, in any order; if given, the statistics include the similarity of documents within
    and across instances.
    """
    from eclectus.models.checkpoints.tokenizer_files import vocabulary_size

    tokens = load_tokenizer(tokenizer.path)
    encode, vocabulary, begin = TextTokens(tokens), vocabulary_size(tokens), settings.begin(tokens)
    rows = _rows_to_pack(documents, settings)
    if len(rows) == 0:
        raise EclectusError(
            f"no training document belongs to the group '{settings.pack_group}'; see the languages settings"
        )
    with tempfile.TemporaryDirectory(dir=out.path.parent, prefix="tokens-") as scratch:
        kind = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
        flat, starts = _tokenize(documents, encode, begin, tokens.eos_token_id, kind, rows, Path(scratch) / "flat")
        order = _order(rows, grouping, settings.seed)
        spans = plan(np.diff(starts)[order], settings.instance_tokens, settings.pack_remainder == "pad", settings.seed)
        if spans.count == 0:
            raise EclectusError(
                f"{len(order)} documents of group '{settings.pack_group}' give {spans.total} tokens, too few for one "
                f"instance of {spans.length}; add text, lower instance_tokens, or set pack_remainder to pad"
            )
        matrices = _write_instances(flat, starts[order], spans, tokens.eos_token_id, settings.pack_position_ids, out)
        del flat
    about = _with_codes(read_table(documents, ABOUT)).take(pa.array(rows[order]))
    meta = {
        "length": spans.length,
        "vocabulary": vocabulary,
        **({"begin_of_document": begin} if begin else {}),
        "end_of_document": tokens.eos_token_id,
        "remainder": settings.pack_remainder,
        "matrices": as_json(matrices),
    }
    _describe(about, rows[order], spans, meta, out)
    out.statistics |= {"control_tokens_in_texts": encode.respelled, "control_tokens_not_spelled": encode.lost}
    if embeddings is not None:
        quality = _quality(about, spans, embeddings, settings.seed)
        out.statistics |= quality
        out.file("quality.json").write_text(json.dumps(quality, indent=1))
        for name, value in quality.items():
            if value is not None:
                metric(name, value)


def _rows_to_pack(documents: Artifact, settings: PackSettings) -> np.ndarray:
    """Row numbers, ascending, of the documents to pack."""
    rows, first = [], 0
    for batch in read_batches(documents, ["split", "group"]):
        wanted = pc.equal(batch["split"], "train").to_numpy(zero_copy_only=False)
        group = batch["group"].to_numpy(zero_copy_only=False)
        wanted &= (group != "other") if settings.pack_group == "all" else (group == settings.pack_group)
        rows.append(first + np.flatnonzero(wanted))
        first += len(batch)
    return np.concatenate(rows) if rows else np.empty(0, np.int64)


def _tokenize(
    documents: Artifact,
    encode: TextTokens,
    begin: list[int],
    end: int,
    kind: np.dtype,
    rows: np.ndarray,
    scratch: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of these rows end to end in a scratch file, start of each row [len(rows) + 1])."""
    lengths, report_progress, seen, done = [np.zeros(1, np.int64)], progress(len(rows), "tokenising", "documents"), 0, 0
    wanted = np.zeros(documents.manifest()["rows"], bool)
    wanted[rows] = True
    with open(scratch, "wb") as handle:
        for batch in read_batches(documents, ["text"], rows=TEXTS_AT_ONCE):
            texts = batch["text"].filter(pa.array(wanted[seen : seen + len(batch)])).to_pylist()
            seen += len(batch)
            ids = [begin + each for each in encode(texts)] if begin else encode(texts)
            sizes = np.fromiter(map(len, ids), np.int64, len(ids))
            ends = np.cumsum(sizes + 1)
            tokens = np.full(ends[-1] if len(ends) else 0, end, kind)
            inside = np.ones(len(tokens), bool)
            inside[ends - 1] = False
            tokens[inside] = np.fromiter(chain.from_iterable(ids), kind, int(sizes.sum()))
            tokens.tofile(handle)
            lengths.append(sizes + 1)
            done += len(texts)
            report_progress(done)
    return np.memmap(scratch, kind, mode="r"), np.cumsum(np.concatenate(lengths))


def _order(rows: np.ndarray, grouping: Artifact | None, seed: int) -> np.ndarray:
    """The order in which to concatenate, as positions in `rows`."""
    if grouping is None:
        return np.random.default_rng([seed, 1]).permutation(len(rows))
    chained = pq.read_table(grouping.file("order.parquet"), columns=["row"])["row"].to_numpy()
    chained = chained[np.isin(chained, rows)]
    return np.searchsorted(rows, chained)


def _write_instances(
    flat: np.ndarray, starts: np.ndarray, spans: Spans, padding: int, with_positions: bool, out: Draft
) -> dict[str, Matrix]:
    """Gathers the tokens of every instance, block by block. starts: first token of each document in the order."""
    columns = {TOKENS: flat.dtype}
    if with_positions:
        columns[POSITIONS] = np.dtype(np.uint16 if spans.length <= 2**16 else np.uint32)
    matrices = lay_out(out, columns, spans.count, spans.length)
    tokens = open_matrix(out, matrices[TOKENS])
    positions = open_matrix(out, matrices[POSITIONS]) if with_positions else None
    at_once, digest = max(1, TOKENS_AT_ONCE // spans.length), hashlib.sha256()
    report_progress = progress(spans.count, "packing", "instances")
    for first in range(0, spans.count, at_once):
        last = min(first + at_once, spans.count)
        a, b = np.searchsorted(spans.to, (first * spans.length, last * spans.length))
        size = spans.size[a:b]
        inside = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        source = np.repeat(starts[spans.position[a:b]] + spans.offset[a:b], size) + inside
        target = np.repeat(spans.to[a:b] - first * spans.length, size) + inside
        block = np.full((last - first) * spans.length, padding, flat.dtype)
        block[target] = flat[source]
        digest.update(block.tobytes())
        tokens[first:last] = block.reshape(-1, spans.length)
        if positions is not None:
            block = np.zeros(len(block), positions.dtype)
            block[target] = inside
            positions[first:last] = block.reshape(-1, spans.length)
        report_progress(last)
    tokens.flush()
    if positions is not None:
        positions.flush()
    describe(out, matrices, f"{digest.hexdigest()} {matrices}")
    return matrices


def _describe(about: pa.Table, rows: np.ndarray, spans: Spans, meta: dict[str, Any], out: Draft) -> None:
    """Writes spans, the `documents` table and `instances.json`, and the statistics.

    about: columns ABOUT of the documents in the order. rows: int64, their rows in the documents artifact.
    """
    labels = {name: _codes(about[name], "") for name in ("language", "domain")}
    names = {name: column.dictionary.to_pylist() for name, column in labels.items()}
    codes = {
        name: column.indices.to_numpy(zero_copy_only=False).astype(np.int64)[spans.position]
        for name, column in labels.items()
    }
    table = [spans.to, spans.size, rows[spans.position], codes["language"], codes["domain"]]
    np.save(out.file("spans.npy"), np.stack(table, axis=1))
    spread = about.take(pa.array(spans.position))
    locations = {
        "instance": pa.array(spans.to // spans.length),
        "instance_offset": pa.array(spans.to % spans.length, pa.int32()),
        "tokens": pa.array(spans.size, pa.int32()),
        "document_offset": pa.array(spans.offset, pa.int32()),
    }
    _write_texts(pa.table({**{name: spread[name] for name in ABOUT}, **locations}), out.file("documents.parquet"))
    meta = meta | {"languages": names["language"], "domains": names["domain"]}
    out.file("instances.json").write_text(json.dumps(meta, indent=1))
    packed = int(np.count_nonzero(np.bincount(spans.position)))
    out.rows = spans.count
    out.statistics = {
        "instances": spans.count,
        "tokens": spans.count * spans.length,
        "documents": packed,
        "documents_dropped": len(rows) - packed,
        "tokens_dropped": max(0, spans.total - spans.count * spans.length),
        "tokens_padded": max(0, spans.count * spans.length - spans.total),
        "tokens_by_language": _sums(names["language"], codes["language"], spans.size),
        "tokens_by_domain": _sums(names["domain"], codes["domain"], spans.size),
        "documents_an_instance": round(len(spans.to) / spans.count, 2),
    }


def _quality(about: pa.Table, spans: Spans, embeddings: Artifact, seed: int) -> dict[str, float | None]:
    """Similarity of the documents within an instance and across its border (`eclectus.tasks.grouping.quality`)."""
    ids = open_ids(embeddings)[:]
    wanted = np.array(about["document"].to_pylist(), ids.dtype)
    rows = positions_of(wanted, ids)
    if (rows < 0).any():
        raise EclectusError(f"{embeddings.name} lacks documents that are to be packed; embed these documents first")
    domains = np.zeros(len(ids), np.int64)
    domains[rows] = _codes(about["domain"], "unknown").indices.to_numpy()
    return instance_quality(
        open_embeddings(embeddings),
        rows[spans.position],
        spans.firsts,
        spans.size,
        domains,
        seed,
    )


def _sums(names: list[str], codes: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    """Tokens by label; of very many labels the largest, and the others together."""
    tokens = np.bincount(codes, sizes, len(names)).astype(np.int64)
    shown = np.sort(np.argsort(-tokens, kind="stable")[:MOST_LABELS])
    sums = {names[number]: int(tokens[number]) for number in shown.tolist()}
    rest = int(tokens.sum() - tokens[shown].sum())
    return sums | {"(others)": rest} if rest else sums


def _with_codes(about: pa.Table) -> pa.Table:
    """With labels as dictionaries: a label may be long, and is repeated for every document and every span."""
    for name in CODED:
        about = about.set_column(ABOUT.index(name), name, about[name].dictionary_encode())
    return about


def _codes(labels: pa.ChunkedArray, missing: str) -> pa.DictionaryArray:
    """The labels of a column, in order of appearance, as one array of codes; `missing` stands for null."""
    column = labels.combine_chunks()
    names = column.dictionary.to_pylist()
    null = names.index(missing) if missing in names else len(names)
    codes, every = column.indices.fill_null(null).dictionary_encode(), [*names, missing]
    ordered = [every[code] for code in codes.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(codes.indices, pa.array(ordered, pa.string()))


def _write_texts(table: pa.Table, path: Path) -> None:
    """Writes codes as the texts they stand for, in row groups small enough for long labels."""
    schema = pa.schema([pa.field(each.name, pa.string() if each.name in CODED else each.type) for each in table.schema])
    longest = sum(
        max((len(name) for name in _codes(table[each], "").dictionary.to_pylist()), default=0) for each in CODED
    )
    rows = max(1, min(ROWS_PER_GROUP, BYTES_PER_GROUP // max(1, 4 * longest)))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, max(1, len(table)), rows):
            writer.write_table(table.slice(begin, rows).cast(schema))
