"""Packing: documents along their chains become instances of L tokens, shuffled as instances.

    tokens of the documents, each followed by the end-of-document token, concatenated in the grouping's order,
    cut every L tokens (a document may go on in the next instance), then the instances are permuted under a seed.

The shuffle matters: documents shall be similar within an instance, not across adjacent ones (papers.md 1.6). Remainder
policy: the last, incomplete stretch is dropped, or padded. Texts are tokenised once, in the order in which they are stored,
into a scratch file; chains then gather from it, so memory stays bounded and disk reads stay sequential. Price: about
0.5M tokens/s on 2 cores.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from storage.artifact import Artifact, Draft
from storage.errors import EclectusError
from tasks.documents import read_batches
from tasks.run import progress
from tasks.settings import Settings
from tasks.step import step
from tasks.tokenizer import load_tokenizer

TEXTS_AT_ONCE = 512


class PackSettings(Settings):
    instance_tokens: int = Field(512, ge=16, description="Length L of a training instance, in tokens.")
    pack_remainder: Literal["drop", "pad"] = Field(
        "drop",
        description="What becomes of the last stretch shorter than an instance: dropped, or padded and not trained on.",
    )
    pack_group: Literal["original", "expanded", "all"] = Field(
        "all",
        description="Which documents to pack: those of the original languages, of the expanded languages, or all.",
    )
    seed: int = Field(0, description="Seed of everything random.")


@step(makes="instances", version=1)
def pack(
    documents: Artifact,
    tokenizer: Artifact,
    settings: PackSettings,
    out: Draft,
    grouping: Artifact | None = None,
) -> None:
    """Packs the training documents into instances, along a grouping or, without one, in random order."""
    place = load_tokenizer(tokenizer.path)
    rows = _rows_to_pack(documents, settings)
    if len(rows) == 0:
        raise EclectusError(
            f"no training document belongs to the group '{settings.pack_group}'; see the languages settings"
        )
    with tempfile.TemporaryDirectory(dir=out.path.parent, prefix="tokens-") as scratch:
        flat, starts = _tokenize(documents, place, rows, Path(scratch) / "flat.npy")
        order = _order(rows, grouping, settings.seed)
        _write_instances(documents, place, settings, out, rows, flat, starts, order)


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


def _tokenize(documents: Artifact, tokenizer: Any, rows: np.ndarray, scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """(flat tokens of the chosen rows in row order, starts [len(rows) + 1]); the tokens live in a scratch file."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    lengths, tell, seen = [], progress(len(rows), "tokenising", "documents"), 0
    wanted = np.zeros(rows[-1] + 1, bool)
    wanted[rows] = True
    with open(scratch, "wb") as handle:
        for batch in read_batches(documents, ["text"], rows=TEXTS_AT_ONCE):
            texts = [text for i, text in enumerate(batch["text"].to_pylist(), seen) if i < len(wanted) and wanted[i]]
            seen += len(batch)
            if not texts:
                continue
            for ids in tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]:
                ids.append(tokenizer.eos_token_id)
                handle.write(np.asarray(ids, kind).tobytes())
                lengths.append(len(ids))
            tell(len(lengths))
    return np.memmap(scratch, kind, mode="r"), np.concatenate([[0], np.cumsum(lengths)])


def _order(rows: np.ndarray, grouping: Artifact | None, seed: int) -> np.ndarray:
    """The order in which to concatenate, as positions in `rows`."""
    if grouping is None:
        return np.random.default_rng([seed, 1]).permutation(len(rows))
    chained = pq.read_table(grouping.file("order.parquet"), columns=["row"])["row"].to_numpy()
    chained = chained[np.isin(chained, rows)]
    return np.searchsorted(rows, chained)


def _write_instances(
    documents: Artifact,
    tokenizer: Any,
    settings: PackSettings,
    out: Draft,
    rows: np.ndarray,
    flat: np.ndarray,
    starts: np.ndarray,
    order: np.ndarray,
) -> None:
    length = settings.instance_tokens
    lengths = (starts[1:] - starts[:-1])[order]
    begins = np.concatenate([[0], np.cumsum(lengths)])
    total = int(begins[-1])
    count = total // length if settings.pack_remainder == "drop" else -(-total // length)
    if count == 0:
        raise EclectusError(
            f"{len(order)} documents of group '{settings.pack_group}' give {total} tokens, too few for one instance of {length}; "
            "add text, lower instance_tokens, or set pack_remainder to pad"
        )
    place = np.random.default_rng([settings.seed, 2]).permutation(count)
    tokens = np.lib.format.open_memmap(out.file("tokens.npy"), "w+", flat.dtype, (count, length))
    tokens[:] = tokenizer.eos_token_id
    target = tokens.reshape(-1)
    spans = _spans(begins, length, count, place)
    tell = progress(len(spans), "packing", "spans")
    for i, (to, size, position, offset) in enumerate(spans):
        begin = starts[order[position]] + offset
        target[to : to + size] = flat[begin : begin + size]
        if i % 4096 == 0:
            tell(i)
    tokens.flush()
    _describe(documents, tokenizer, settings, out, rows[order], spans, length, count, total)


def _spans(begins: np.ndarray, length: int, count: int, place: np.ndarray) -> np.ndarray:
    """[S, 4] int64, sorted by the first column: (start in the shuffled flat stream, size, position in the order, offset in the document)."""
    end = min(int(begins[-1]), count * length)
    cuts = np.unique(np.concatenate([begins[begins < end], np.arange(0, end, length)]))
    sizes = np.diff(np.concatenate([cuts, [end]]))
    position = np.searchsorted(begins, cuts, side="right") - 1
    to = place[cuts // length] * length + cuts % length
    spans = np.stack([to, sizes, position, cuts - begins[position]], axis=1)
    return spans[np.argsort(spans[:, 0])]


def _describe(
    documents: Artifact,
    tokenizer: Any,
    settings: PackSettings,
    out: Draft,
    ordered_rows: np.ndarray,
    spans: np.ndarray,
    length: int,
    count: int,
    total: int,
) -> None:
    """Writes spans, the `documents` table and `instances.json`, and the statistics."""
    names = ["document", "name", "language", "domain", "source"]
    about = pa.Table.from_batches(read_batches(documents, names)).take(pa.array(ordered_rows)).combine_chunks()
    labels = {
        name: pc.fill_null(about[name], "").combine_chunks().dictionary_encode() for name in ("language", "domain")
    }
    codes = {name: column.indices.to_numpy(zero_copy_only=False).astype(np.int64) for name, column in labels.items()}
    to, sizes, position, offset = spans.T
    table = np.stack(
        [to, sizes, ordered_rows[position], codes["language"][position], codes["domain"][position]], axis=1
    )
    np.save(out.file("spans.npy"), table)
    spread = about.take(pa.array(position))
    pq.write_table(
        pa.table(
            {
                **{name: spread[name] for name in names},
                "instance": pa.array(to // length),
                "instance_offset": pa.array(to % length, pa.int32()),
                "tokens": pa.array(sizes, pa.int32()),
                "document_offset": pa.array(offset, pa.int32()),
            }
        ),
        out.file("documents.parquet"),
        compression="zstd",
    )
    dictionaries = {name: column.dictionary.to_pylist() for name, column in labels.items()}
    meta = {
        "length": length,
        "vocabulary": len(tokenizer),
        "end_of_document": tokenizer.eos_token_id,
        "languages": dictionaries["language"],
        "domains": dictionaries["domain"],
        "remainder": settings.pack_remainder,
    }
    out.file("instances.json").write_text(json.dumps(meta, indent=1))
    out.rows = count
    out.statistics = {
        "instances": count,
        "tokens": count * length,
        "documents": len(ordered_rows),
        "tokens_dropped": max(0, total - count * length),
        "tokens_padded": max(0, count * length - total),
        "tokens_by_language": _sums(dictionaries["language"], codes["language"][position], sizes),
        "tokens_by_domain": _sums(dictionaries["domain"], codes["domain"][position], sizes),
        "documents_an_instance": round(len(spans) / count, 2),
    }


def _sums(names: list[str], codes: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    return {name: int(size) for name, size in zip(names, np.bincount(codes, sizes, len(names)), strict=True)}
