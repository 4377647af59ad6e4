"""Packs for fine-tuning by other trainers: which token belongs to which conversation, and which are learned.

    llamafactory   a `datasets` folder with a split `train`, for `tokenized_path`: input_ids, labels, position_ids, and
                   attention_mask, the number of the conversation within the pack from 1, 0 at padding; as many tokens
                   a row as the next multiple of 8 above L, so that the last is padding: attention is not given a mask
                   in which there is no zero, and its collator would pad other lengths unevenly
    axolotl        a `datasets` folder, rows without padding: input_ids, labels, attention_mask (1), and position_ids,
                   which restart with every conversation; for whatever tells documents apart by them
    trl            a `datasets` folder, rows without padding: input_ids, labels, seq_lengths of the conversations
    nemo           `packs.idx.parquet` for Megatron Bridge (NeMo): input_ids, seq_start_id, and loss_mask, which says of
                   a token whether the next one is learned
    messages       `messages.jsonl`, for trainers that tokenize themselves: messages, tools, pack and place in it, in
                   order

Labels are -100 wherever nothing is learned: where the assistant does not speak, at padding, and at the first token of a
document, which has nothing before it. Of documents that are no conversations all other tokens are learned. The
conventions are those of the trainers' own code: docs/usage.md. Cost: one read of the tokens; memory for a block of
rows, or of `messages` for the texts of one part of the instances.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.models.training.instances import IGNORED, Instances
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.conversations import decode
from eclectus.tasks.documents.table import parts, read_part
from eclectus.tasks.packing.instance_file import document_tables

if TYPE_CHECKING:
    from eclectus.storage.home import Home

ROWS = 64


@dataclass(frozen=True)
class Pack:
    """One instance: tokens [L], labels [L], and of each token the number of its document within it, 0 at padding."""

    tokens: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray

    def without_padding(self) -> Pack:
        there = self.numbers > 0
        return Pack(self.tokens[there], self.labels[there], self.numbers[there])

    @property
    def begins(self) -> np.ndarray:
        """Where documents begin, and padding."""
        return np.flatnonzero(np.diff(self.numbers, prepend=-1))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff([*self.begins, len(self.tokens)])

    @property
    def positions(self) -> np.ndarray:
        """Of each token in its document."""
        return np.arange(len(self.tokens)) - np.repeat(self.begins, self.lengths)


def packs_of(data: Instances) -> Iterator[list[Pack]]:
    """All packs in order, some at a time."""
    for first in range(0, len(data), ROWS):
        batch = data.batch(np.arange(first, min(first + ROWS, len(data))))
        documents = batch.documents.numpy()
        begins = np.diff(documents, axis=1, prepend=-2) != 0
        numbers = np.where(documents < 0, 0, np.cumsum(begins & (documents >= 0), axis=1))
        labels = np.where(begins, IGNORED, batch.labels.numpy())
        rows = zip(batch.tokens.numpy(), labels, numbers, strict=True)
        yield [Pack(*row) for row in rows]


def _llamafactory(data: Instances, out: Path) -> None:
    (out / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    # Its collator pads all but the positions to a multiple of 8.
    more = 8 - data.length % 8

    def columns(pack: Pack) -> dict[str, Any]:
        return {
            "input_ids": np.append(pack.tokens, [data.end_of_document] * more),
            "labels": np.append(pack.labels, [IGNORED] * more),
            "attention_mask": np.append(pack.numbers, [0] * more),
            "position_ids": np.append(np.where(pack.numbers > 0, pack.positions, 0), [0] * more),
        }

    _write_dataset(data, out / "train", columns)


def _axolotl(data: Instances, out: Path) -> None:
    def columns(pack: Pack) -> dict[str, Any]:
        whole = pack.without_padding()
        return {
            "input_ids": whole.tokens,
            "labels": whole.labels,
            "attention_mask": np.ones(len(whole.tokens), np.int32),
            "position_ids": whole.positions,
        }

    _write_dataset(data, out, columns)


def _trl(data: Instances, out: Path) -> None:
    def columns(pack: Pack) -> dict[str, Any]:
        whole = pack.without_padding()
        return {"input_ids": whole.tokens, "labels": whole.labels, "seq_lengths": whole.lengths}

    _write_dataset(data, out, columns)


def _nemo(data: Instances, out: Path) -> None:
    writer = None
    for packs in packs_of(data):
        whole = [pack.without_padding() for pack in packs]
        # Labels of a first token are IGNORED, so nothing is learned from the last one of the document before.
        learned = [np.append(pack.labels[1:] != IGNORED, False) for pack in whole]
        lists = {
            "input_ids": (pa.int32(), [pack.tokens for pack in whole]),
            "seq_start_id": (pa.int32(), [pack.begins for pack in whole]),
            "loss_mask": (pa.int8(), learned),
        }
        table = pa.table({name: _lists(rows, kind) for name, (kind, rows) in lists.items()})
        writer = writer or pq.ParquetWriter(out / "packs.idx.parquet", table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def _lists(rows: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = np.concatenate(rows).astype(kind.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values, kind))


def _write_dataset(data: Instances, folder: Path, columns: Callable[[Pack], dict[str, Any]]) -> None:
    """A folder that `datasets.load_from_disk` opens, of lists of int32."""
    folder.mkdir(exist_ok=True)
    name, names = "data-00000-of-00001.arrow", list[str]()
    with pa.OSFile(str(folder / name), "wb") as sink:
        writer = None
        for packs in packs_of(data):
            rows = [columns(pack) for pack in packs]
            names = list(rows[0])
            batch = pa.record_batch({name: _lists([row[name] for row in rows], pa.int32()) for name in names})
            writer = writer or pa.ipc.new_stream(sink, batch.schema)
            writer.write_batch(batch)
        if writer:
            writer.close()
    features = {name: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"} for name in names}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name}], "_fingerprint": None, "_format_columns": None, "_format_kwargs": {},
        "_format_type": None, "_output_all_columns": False, "_split": "train",
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}, indent=1))
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def write_messages(instances: Artifact, documents: Artifact, out: Path) -> None:
    """Writes the conversations in the order of the packs. documents: that were packed.

    Raises EclectusError for other documents.
    """
    with open(out / "messages.jsonl", "w", encoding="utf-8") as file:
        for path in document_tables(instances):
            table = pq.read_table(path, columns=["document", "name", "instance"])
            texts = _texts(documents, set(table["document"].to_pylist()))
            before, place = -1, 0
            for row in table.to_pylist():
                place = place + 1 if row["instance"] == before else 1
                before = row["instance"]
                if row["document"] not in texts:
                    raise EclectusError(
                        f"{documents.name} holds no document {row['document']}; give the documents that were packed"
                    )
                messages, tools = decode(texts[row["document"]])
                about = {"pack": row["instance"], "place": place, "document": row["document"], "name": row["name"]}
                more = {"tools": tools} if tools else {}
                file.write(json.dumps({"messages": messages, **more, **about}, ensure_ascii=False) + "\n")


def packed_documents(home: Home, instances: Artifact) -> str:
    """The digest of the documents that instances were packed from, by the home's lineage. Raises EclectusError."""
    from eclectus.storage.lineage.connection import connect

    query = """
        select i.artifact from step_inputs i join step_outputs o using (step)
        where i.name = 'documents' and o.artifact = $1"""
    with connect(home) as connection:
        row = connection.execute(query, [instances.digest]).fetchone()
    if row is None:
        raise EclectusError(f"lineage does not say what {instances.name} was packed from; name it with --documents")
    return str(row[0])


def _texts(documents: Artifact, wanted: set[str]) -> dict[str, str]:
    found = dict[str, str]()
    for path in parts(documents):
        for batch in read_part(path, ["document", "text"]):
            rows = zip(batch["document"].to_pylist(), batch["text"].to_pylist(), strict=True)
            found |= {name: text for name, text in rows if name in wanted}
    return found


PACKS: dict[str, Callable[[Instances, Path], None]] = {
    "llamafactory": _llamafactory,
    "axolotl": _axolotl,
    "trl": _trl,
    "nemo": _nemo,
}
MESSAGES = "messages"
