"""Packing: documents along their chains become instances of L tokens; the instances are shuffled.

    tokens of the documents, each after the tokens that the tokenizer puts before a text (BeginSettings) and followed by
    the end-of-document token, concatenated in the grouping's order, cut every L tokens (a document may continue in the
    next instance, which then begins within it), then the instances are permuted under a seed.

The shuffle matters: documents should be similar within an instance, not across adjacent instances (docs/methods.md
1.6); if embeddings are given, both similarities are measured. The last, incomplete instance is dropped, or padded.

Three stages, of which each finds what an earlier run has left: the documents are tokenised part by part
(document_tokens.py), the whole is planned (instance_plan.py), and the instances are gathered part by part
(instance_part.py), over as many workers as there are; the bits are the same. Price: tokenising, about 150 CPU s per
million documents of 450 characters; the rest takes a tenth of it.
"""

from __future__ import annotations

import json
from typing import Any, Literal, cast

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import PartMatrix, open_embeddings, open_ids
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.table import labels_of
from eclectus.tasks.documents.table import parts as parts_of
from eclectus.tasks.grouping.nearest import Rows
from eclectus.tasks.grouping.quality import instance_quality
from eclectus.tasks.over_parts import DESCRIPTION, Done, Part, forget, key_of, link_or_copy, over_parts
from eclectus.tasks.packing.conversation_tokens import (
    WINDOW,
    ConversationPackSettings,
    conversation_statistics,
    tokens_of_conversations,
)
from eclectus.tasks.packing.document_tokens import Form, framed, tokenize
from eclectus.tasks.packing.instance_file import Matrix, as_json, describe, part_file
from eclectus.tasks.packing.instance_part import names_by_part, write_part
from eclectus.tasks.packing.instance_plan import plan_instances
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer
from eclectus.tasks.run import metric, notify
from eclectus.tasks.settings import BASIC, SEED, CurationWorkerSettings, LaterSetting
from eclectus.tasks.step import step

SECONDS_PER_TOKEN = 8e-8


class PackSettings(ConversationPackSettings, BeginSettings, CurationWorkerSettings):
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
    pack_fit: int = Field(
        0,
        ge=0,
        le=1000,
        description="Cut no document that fits in an instance: where the next one does not fit in the room that is "
        "left, the first that does among so many next documents takes it, else the room is padded. 0 cuts documents "
        "where an instance is full.",
    )
    pack_position_ids: bool = Field(
        False,
        description="Also store position_ids, which restart at 0 with every document, for trainers whose attention "
        "must not cross documents.",
    )
    pack_left_out: list[str] = LaterSetting(
        [],
        description="Ids of documents that are not trained on: padding takes the place of their tokens, and every "
        "other token stays where it is. Those that the home forgot (eclectus forget) are added.",
    )
    seed: int = SEED


@step(makes="instances", version=4)
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

    words = load_tokenizer(tokenizer.path)
    vocabulary, begin, end = vocabulary_size(words), settings.begin(words), int(words.eos_token_id)
    kind, workers = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32), settings.curation_workers
    form = _conversations(settings) if settings.conversations else framed(begin, end)
    tokens = tokenize(documents, tokenizer, settings.pack_group, form, kind, workers)
    if not tokens:
        raise EclectusError(
            f"no training document belongs to the group '{settings.pack_group}'; see the languages settings"
        )
    became = conversation_statistics(documents, tokens, settings.pack_group) if settings.conversations else {}
    plan = _plan(documents, tokens, grouping, settings, kind)
    parts = _write(documents, tokens, plan, settings, kind, end)
    for part in parts:
        for path in part.folder.iterdir():
            if path.name != DESCRIPTION:
                link_or_copy(path, out.file(path.name))
    matrices = [{name: Matrix(**where) for name, where in part.about["matrices"].items()} for part in parts]
    describe(out, matrices, [part.about["digest"] for part in parts])
    meta = {
        "length": settings.instance_tokens,
        "vocabulary": vocabulary,
        **({"begin_of_document": begin} if begin and not settings.conversations else {}),
        "end_of_document": end,
        "remainder": _remainder(settings),
        "matrices": as_json(matrices),
        "languages": plan.about["languages"],
        "domains": plan.about["domains"],
    }
    if len(parts) > 1:
        meta["spans"] = [part_file("spans", "npy", number, len(parts)) for number in range(len(parts))]
    out.file("instances.json").write_text(json.dumps(meta, indent=1))
    _describe(plan, parts, out)
    if settings.conversations:
        _describe_conversations(became, parts, out)
    if embeddings is not None:
        quality = _quality(parts[0], len(parts), settings, embeddings)
        out.statistics |= quality
        out.file("quality.json").write_text(json.dumps(quality, indent=1))
        for name, value in quality.items():
            if value is not None:
                metric(name, value)
    forget([plan, *parts])


def _conversations(settings: PackSettings) -> Form:
    arguments = {"length": settings.instance_tokens, "too_long": settings.conversation_too_long}
    return Form(tokens_of_conversations, "conversations 1", arguments)


def _remainder(settings: PackSettings) -> str:
    """No conversation is dropped for standing in the last instance."""
    return "pad" if settings.conversations else settings.pack_remainder


def _plan(
    documents: Artifact,
    tokens: list[tuple[int, Done]],
    grouping: Artifact | None,
    settings: PackSettings,
    kind: np.dtype,
) -> Done:
    """Order, layout and statistics, as one part: a run that is killed later finds it."""
    arguments = {
        "paths": parts_of(documents),
        "labels": [labels_of(path) for path in parts_of(documents)],
        "tokens": [(number, done.folder) for number, done in tokens],
        "order": [grouping.file("order.parquet")] if grouping else [],
        "group": settings.pack_group,
        "length": settings.instance_tokens,
        "token_bytes": kind.itemsize,
        "keep_remainder": _remainder(settings) == "pad",
        "fit": settings.pack_fit or (WINDOW if settings.conversations else 0),
        "seed": settings.seed,
    }
    content = [documents.digest, grouping.digest if grouping else None, [done.folder.name for _, done in tokens]]
    chosen = [arguments[name] for name in ("group", "length", "token_bytes", "keep_remainder", "fit", "seed")]
    part = Part(key_of("plan of instances 1", *content, *chosen), arguments, 1, "the plan of the instances")
    return over_parts(plan_instances, [part], "planning instances", "plans", workers=1)[0]


def _write(
    documents: Artifact, tokens: list[tuple[int, Done]], plan: Done, settings: PackSettings, kind: np.dtype, end: int
) -> list[Done]:
    names = names_by_part(documents, settings.curation_workers)
    count, each, length = plan.about["instances"], plan.about["instances_per_part"], settings.instance_tokens
    parts = -(-count // each)
    wanted = []
    for number in range(parts):
        arguments = {
            "plan": plan.folder,
            "tokens": [done.folder for _, done in tokens],
            "names": [done.folder for done in names],
            "number": number,
            "count": parts,
            "instances": (number * each, min(count, (number + 1) * each)),
            "length": length,
            "kind": kind.name,
            "padding": end,
            "with_positions": settings.pack_position_ids,
            "left_out": settings.pack_left_out,
            "with_mask": settings.conversations,
        }
        holes = [settings.pack_left_out] if settings.pack_left_out else []
        key = key_of("instances 1", plan.folder.name, number, parts, kind.name, end, settings.pack_position_ids, *holes)
        size = min(each, count - number * each)
        wanted.append(Part(key, arguments, size, f"part {number} of the instances"))
    seconds = SECONDS_PER_TOKEN * length
    return over_parts(write_part, wanted, "packing", "instances", seconds, settings.curation_workers)


def _describe(plan: Done, parts: list[Done], out: Draft) -> None:
    count = plan.about["instances"]
    out.rows = count
    out.statistics = plan.about["statistics"] | {
        "documents_an_instance": round(sum(part.about["spans"] for part in parts) / count, 2),
        **({"left_out": left_out} if (left_out := sum(part.about.get("left_out", 0) for part in parts)) else {}),
        "control_tokens_in_texts": plan.about["control"][0],
        "control_tokens_not_spelled": plan.about["control"][1],
    }


def _describe_conversations(became: dict[str, Any], parts: list[Done], out: Draft) -> None:
    out.statistics |= became | {"tokens_learned": sum(part.about["learned"] for part in parts)}
    if whys := became["conversations_why"]:
        each = [f"{became['conversations'][state]:,} {state} (first: {why})" for state, why in whys.items()]
        notify("conversations", f"Conversations that are left out: {'; '.join(each)}.")


def _quality(part: Done, count: int, settings: PackSettings, embeddings: Artifact) -> dict[str, float | None]:
    """Similarity of the documents within an instance and across its border (`eclectus.tasks.grouping.quality`).

    part: the first of `count`. Instances are shuffled, so it is a random sample of them.
    """
    columns = ["document", "domain", "instance", "tokens"]
    table = pq.read_table(part.file(part_file("documents", "parquet", 0, count)), columns=columns)
    names = table["document"].combine_chunks().dictionary_encode()
    rows = _rows_of(np.array(names.dictionary.to_pylist(), "S32"), open_ids(embeddings))
    if (rows < 0).any():
        raise EclectusError(f"{embeddings.name} lacks documents that are to be packed; embed these documents first")
    position = names.indices.to_numpy()
    domain = table["domain"].combine_chunks().fill_null("unknown").dictionary_encode().indices.to_numpy()
    domains = np.zeros(len(rows), np.int64)
    domains[position] = domain
    instance = table["instance"].to_numpy()
    chosen = Rows(open_embeddings(embeddings), rows)
    return instance_quality(
        cast(np.ndarray, chosen),
        position,
        np.searchsorted(instance, np.arange(instance[-1] + 2)),
        table["tokens"].to_numpy().astype(np.int64),
        domains,
        settings.seed,
    )


def _rows_of(wanted: np.ndarray, ids: PartMatrix) -> np.ndarray:
    """Row in `ids` [N] of each of `wanted` [n], int64 [n]; -1 if it is not there. Reads the ids in blocks."""
    order = np.argsort(wanted)
    rows = np.full(len(wanted), -1)
    for begin in range(0, len(ids), 2**20):
        position = positions_of(ids[begin : begin + 2**20], wanted[order], ascending=True)
        found = np.flatnonzero(position >= 0)
        rows[order[position[found]]] = begin + found
    return rows
