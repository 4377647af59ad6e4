"""Writes the files of an evaluation (tasks/evaluation/evaluate.py) from the sums of models/evaluation/scoring.py.

Shares, bits and bytes are rounded, so that any number of workers writes the same bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.storage.artifact import Draft
from eclectus.tasks.evaluation.held_out import HeldOut
from eclectus.tasks.evaluation.routing_statistics import describe_layers
from eclectus.tasks.run import metric

if TYPE_CHECKING:
    from eclectus.models.evaluation.scoring import Sums

# float64 sums differ in their last digits with the order of addition; rounded, any number of workers gives the same.
DIGITS = 6


def write_documents(held: HeldOut, sums: Sums, by_prompt: np.ndarray | None, out: Draft) -> pa.Table:
    """documents.parquet. by_prompt: bits per document under prompt-only routing; None for models without it."""
    scored_bytes = sums.tokens * np.array(held.bytes) / np.array([len(ids) for ids in held.tokens])
    table = pa.table(
        {
            "document": held.documents,
            "work": held.works,
            "language": held.languages,
            "domain": held.domains,
            "group": held.groups,
            "bits": sums.bits.round(DIGITS),
            "bytes": scored_bytes.round(DIGITS),
            "tokens": sums.tokens.astype(np.int64),
            "bits_by_prompt": pa.nulls(len(sums.bits), pa.float64()) if by_prompt is None else by_prompt.round(DIGITS),
        }
    ).filter(pa.array(sums.tokens > 0))
    pq.write_table(table, out.file("documents.parquet"), compression="zstd")
    return table


def write_scores(table: pa.Table, out: Draft) -> pa.Table:
    levels = {"all": [], "language": ["language"], "domain": ["domain"], "language+domain": ["language", "domain"]}
    scores = pa.concat_tables([scores_by(table, level, by) for level, by in levels.items()])
    pq.write_table(scores, out.file("scores.parquet"), compression="zstd")
    for row in scores.to_pylist():
        tags = {name: row[name] for name in ("language", "domain") if row[name] is not None}
        metric("bits_per_byte", row["bits_per_byte"], **tags)
        metric("perplexity", row["perplexity"], **tags)
        if row["bits_per_byte_by_prompt"] is not None:
            metric("bits_per_byte_by_prompt", row["bits_per_byte_by_prompt"], **tags)
    return scores


def scores_by(table: pa.Table, level: str, by: list[str]) -> pa.Table:
    """One row for each combination of the columns `by`; perplexity is per token."""
    sums = table.group_by(by, use_threads=False).aggregate(
        [("bits", "sum"), ("bits_by_prompt", "sum"), ("bytes", "sum"), ("tokens", "sum"), ("document", "count")]
    )
    sums = sums.sort_by([(name, "ascending") for name in by]) if by else sums
    nothing = pa.nulls(len(sums), pa.string())
    return pa.table(
        {
            "level": pa.array([level] * len(sums)),
            "language": sums["language"] if "language" in by else nothing,
            "domain": sums["domain"] if "domain" in by else nothing,
            "bits_per_byte": pc.divide(sums["bits_sum"], sums["bytes_sum"]),
            "bits_per_byte_by_prompt": pc.divide(sums["bits_by_prompt_sum"], sums["bytes_sum"]),
            "perplexity": pc.power(2.0, pc.divide(sums["bits_sum"], pc.cast(sums["tokens_sum"], pa.float64()))),
            "tokens": sums["tokens_sum"],
            "bytes": sums["bytes_sum"],
            "documents": sums["document_count"],
        }
    )


def write_positions(held: HeldOut, sums: Sums, bucket: int, context: int, out: Draft) -> None:
    """positions.parquet: bits per byte by position. Context has rows of its own: its tokens are scored elsewhere."""
    stream, position = np.nonzero(sums.positions[:, :, 2])
    bits, size, tokens = sums.positions[stream, position].round(DIGITS).T
    first = np.where(position == 0, 1, context + (position - 1) * bucket)
    table = {
        "language": [held.streams[each][0] for each in stream],
        "domain": [held.streams[each][1] for each in stream],
        "first": first,
        "last": np.where(position == 0, context - 1, first + bucket - 1),
        "scored": position > 0,
        "bits": bits,
        "bytes": size,
        "tokens": tokens.astype(np.int64),
        "bits_per_byte": bits / size,
    }
    pq.write_table(pa.table(table), out.file("positions.parquet"), compression="zstd")


def write_routing(held: HeldOut, sums: Sums, out: Draft) -> None:
    """routing.parquet. share: mean mixture weight (Lory, over segments) or router probability (over tokens).

    top_k_share: the expert's share of all top-k choices; None for Lory.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("layer", "expert", "language", "domain", "share", "top_k_share", "routed")
    }
    for layer, shares in enumerate(sums.shares):
        for stream in np.flatnonzero(sums.routed):
            routed = sums.routed[stream]
            choices = sums.chosen[layer][stream] if sums.chosen else None
            for expert in range(shares.shape[1]):
                columns["layer"].append(layer)
                columns["expert"].append(expert)
                columns["language"].append(held.streams[stream][0])
                columns["domain"].append(held.streams[stream][1])
                columns["share"].append(round(float(shares[stream, expert] / routed), DIGITS))
                columns["top_k_share"].append(
                    None if choices is None else float(choices[expert] / max(1.0, choices.sum()))
                )
                columns["routed"].append(int(routed))
    kinds = [pa.int32(), pa.int32(), pa.string(), pa.string(), pa.float64(), pa.float64(), pa.int64()]
    table = pa.table(
        {name: pa.array(values, kind) for (name, values), kind in zip(columns.items(), kinds, strict=True)}
    )
    pq.write_table(table, out.file("routing.parquet"), compression="zstd")
    for each in describe_layers(table.to_pylist()):
        for name, value in each.row().items():
            if name not in ("layer", "experts"):
                metric(f"routing_{name}", float(value), layer=str(each.layer))


def write_samples(
    held: HeldOut,
    tokenizer: Any,
    prompts: list[int],
    written: list[tuple[list[int], list[list[float]]]],
    begin: int,
    end: int,
    out: Draft,
) -> None:
    """samples.json: prompts (`begin` tokens of a document), the models' texts, and the document up to token `end`."""
    samples = [
        {
            "language": held.languages[number],
            "domain": held.domains[number],
            "document": held.documents[number],
            "prompt": tokenizer.decode(held.tokens[number][:begin]),
            "original": tokenizer.decode(held.tokens[number][begin:end]),
            "written": tokenizer.decode(ids, skip_special_tokens=True),
            "routing": weights,
        }
        for number, (ids, weights) in zip(prompts, written, strict=True)
    ]
    out.file("samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False), "utf-8")
