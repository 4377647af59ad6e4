"""Training instances in the files of other trainers: the same tokens, in the same order.

    jsonl      a line per instance: input_ids, labels (-100 where nothing is trained on), position_ids that restart with
               each document; for axolotl, LLaMA-Factory, TRL and everything else that takes tokenized lines
    megatron   .bin and .idx (MMIDIDX) for Megatron-LM and NeMo: a sequence for each instance
    mosaic     MDS shards for MosaicML Streaming and LLM Foundry: column `tokens`
    litgpt     LitData chunks for LitGPT (extra `litgpt`)
    grain      an ArrayRecord file for Grain and MaxText (extra `grain`): raw little-endian tokens
    llamafactory, axolotl, trl, nemo, messages: packs for fine-tuning (packs.py)

What a format cannot hold is told: megatron, mosaic, litgpt and grain hold tokens alone, and conversations are written
so only if the user says so.
Instances are also a `datasets` folder as they are (`load_from_disk`), which torchtitan reads. Cost: one read of the
tokens; memory for one shard.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.models.staged_folder import staged_folder
from eclectus.models.training.instances import Instances
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.export.packs import MESSAGES, PACKS, write_messages

AT_ONCE = 4096
SHARD_BYTES = 2**26
# numpy's names of types -> Megatron's codes.
MEGATRON_TYPES = {"uint16": 8, "int32": 4}
PADDING = (
    "padding is trained on like any other token: set the trainer's mask for {end}, or pack with pack_remainder drop"
)
BORDERS = "where documents begin: the trainer knows it from the token {end} alone"


@dataclass(frozen=True)
class Exported:
    """instances, tokens: written. files: their names. lost: what the format does not hold, each a sentence."""

    format: str
    instances: int
    tokens: int
    files: list[str]
    lost: list[str]


def export_instances(
    instances: Path, out: Path, kind: str, documents: Artifact | None = None, without_loss_mask: bool = False
) -> Exported:
    """Writes the instances of a folder into a new one. kind: of FORMATS. documents: that were packed, for `messages`.

    Raises EclectusError for an unknown format, a package that is missing, a folder that is not empty, a vocabulary that
    the format's numbers cannot hold, and conversations in a format that cannot hold their loss mask, unless
    `without_loss_mask` says so.
    """
    if kind not in FORMATS:
        raise EclectusError(f"format '{kind}' is unknown; the formats are {', '.join(FORMATS)}")
    try:
        data = Instances(instances)
    except (OSError, ValueError, LookupError) as error:
        raise EclectusError(f"{instances} holds no instances ({error}); give an artifact of kind instances") from error
    if kind in TOKENS_ONLY and data.loss_mask is not None and not without_loss_mask:
        raise EclectusError(
            f"format {kind} cannot hold the loss mask of conversations, so that the trainer would learn what users say "
            f"too; take one of jsonl, {', '.join(PACKS)} and {MESSAGES}, or give --without-loss-mask"
        )
    if kind == MESSAGES and (data.loss_mask is None or documents is None):
        raise EclectusError(f"{instances} holds no conversations; format {MESSAGES} is for those that curate packed")
    try:
        with staged_folder(out) as staged:
            if kind == MESSAGES and documents is not None:
                write_messages(Artifact("instances", "", str(instances)), documents, staged)
            else:
                WRITERS[kind](data, staged)
    except ValueError as error:
        raise EclectusError(str(error)) from error
    lost = _lost(data) if kind in TOKENS_ONLY else []
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return Exported(kind, len(data), len(data) * data.length, files, lost)


def _lost(data: Instances) -> list[str]:
    end = f"{data.end_of_document}, the end of a document"
    trained = int(np.asarray(data.spans[:, 1]).sum())
    padded = len(data) * data.length - trained
    lost = [f"{padded:,} tokens of padding: {PADDING.format(end=end)}"] if padded else []
    mask = ["the loss mask: what users say is learned like what the assistant says"]
    return [*(mask if data.loss_mask is not None else []), *lost, BORDERS.format(end=end)]


def _blocks(data: Instances) -> Iterator[np.ndarray]:
    """The tokens, `[n, L]` at a time."""
    for begin in range(0, len(data), AT_ONCE):
        yield np.ascontiguousarray(data.tokens[begin : begin + AT_ONCE])


def _jsonl(data: Instances, out: Path) -> None:
    with open(out / "instances.jsonl", "w", encoding="utf-8") as file:
        for begin in range(0, len(data), 64):
            batch = data.batch(np.arange(begin, min(begin + 64, len(data))))
            places = _positions(batch.documents.numpy())
            there = (batch.documents >= 0).int().tolist()
            rows = zip(batch.tokens.tolist(), batch.labels.tolist(), places, there, strict=True)
            for tokens, labels, positions, attended in rows:
                row = {"input_ids": tokens, "labels": labels, "position_ids": positions.tolist()}
                file.write(json.dumps(row | {"attention_mask": attended}) + "\n")


def _positions(documents: np.ndarray) -> np.ndarray:
    """Positions `[B, L]` that restart where another document begins."""
    at = np.arange(documents.shape[1])
    begins = np.ones_like(documents, dtype=bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)


def _megatron(data: Instances, out: Path) -> None:
    """megatron/core/datasets/indexed_dataset.py: header, version, type, counts, lengths, pointers, documents."""
    kind = np.dtype(np.uint16 if data.vocabulary <= 2**16 else np.int32)
    count, length = len(data), data.length
    with open(out / "instances.bin", "wb") as file:
        for block in _blocks(data):
            file.write(block.astype(kind).tobytes())
    with open(out / "instances.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, MEGATRON_TYPES[kind.name]))
        file.write(struct.pack("<QQ", count, count + 1))
        file.write(np.full(count, length, np.int32).tobytes())
        file.write((np.arange(count, dtype=np.int64) * length * kind.itemsize).tobytes())
        file.write(np.arange(count + 1, dtype=np.int64).tobytes())


def _mosaic(data: Instances, out: Path) -> None:
    """streaming/base/format/mds/writer.py: number of samples, their offsets, the configuration, the samples."""
    width = data.length * data.tokens.dtype.itemsize
    encoding = f"ndarray:{data.tokens.dtype.name}:{data.length}"
    config = {
        "column_encodings": [encoding], "column_names": ["tokens"], "column_sizes": [width], "compression": None,
        "format": "mds", "hashes": [], "size_limit": SHARD_BYTES, "version": 2,
    }  # fmt: skip
    text, shards = json.dumps(config, sort_keys=True).encode(), []
    each = max(1, (SHARD_BYTES - 8 - len(text)) // (width + 4))
    for number, begin in enumerate(range(0, len(data), each)):
        tokens = np.ascontiguousarray(data.tokens[begin : begin + each])
        offsets = 4 * (len(tokens) + 2) + len(text) + np.arange(len(tokens) + 1) * width
        name = f"shard.{number:05}.mds"
        content = [struct.pack("<I", len(tokens)), offsets.astype("<u4").tobytes(), text, tokens.tobytes()]
        (out / name).write_bytes(b"".join(content))
        raw = {"basename": name, "bytes": sum(map(len, content)), "hashes": {}}
        shards.append({**config, "samples": len(tokens), "raw_data": raw, "zip_data": None})
    (out / "index.json").write_text(json.dumps({"shards": shards, "version": 2}, sort_keys=True))


def _litgpt(data: Instances, out: Path) -> None:
    import torch

    cache = _package("litdata.streaming.cache", "litgpt").Cache
    loader = _package("litdata.streaming.item_loader", "litgpt").TokensLoader(block_size=data.length)
    kind = np.uint16 if data.vocabulary <= 2**16 else np.int32
    written = cache(str(out), chunk_bytes=SHARD_BYTES, item_loader=loader)
    for number, row in enumerate(row for block in _blocks(data) for row in block):
        written[number] = torch.from_numpy(row.astype(kind))
    written.done()
    written.merge()


def _grain(data: Instances, out: Path) -> None:
    records = _package("array_record.python.array_record_module", "grain")
    kind = data.tokens.dtype.newbyteorder("<")
    file = records.ArrayRecordWriter(str(out / "instances.array_record"), "group_size:1")
    for block in _blocks(data):
        for row in block:
            file.write(row.astype(kind).tobytes())
    file.close()
    about = {"dtype": kind.name, "byte_order": "little", "length": data.length, "instances": len(data)}
    (out / "about.json").write_text(json.dumps(about, indent=1))


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EclectusError(
            f"the package of '{name.split('.')[0]}' cannot be imported ({error}); pip install 'eclectus[{extra}]'"
        ) from error


TOKENS_ONLY: dict[str, Callable[[Instances, Path], None]] = {
    "megatron": _megatron,
    "mosaic": _mosaic,
    "litgpt": _litgpt,
    "grain": _grain,
}
WRITERS: dict[str, Callable[[Instances, Path], None]] = {"jsonl": _jsonl, **TOKENS_ONLY, **PACKS}
FORMATS = (*WRITERS, MESSAGES)
