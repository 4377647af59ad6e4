"""Contamination: how much of what a model is examined on stood in the documents that it was trained on.

    trained      every document in the instances upstream of the checkpoint (the lineage says which)
    items        questions with their right answers (tasks/evaluation/benchmark.py), and held-out documents (tasks/evaluation/evaluate.py)
    overlap      share of an item's n-grams of words that occur in a trained document; items of fewer words count as one n-gram
    seen         overlap of at least `contamination_share`

Words are runs of letters or digits in lower case; a Chinese, Japanese or Thai character is a word of its own. That no held-out
document is itself a trained one is checked on the documents' ids, which are hashes of their texts.

Files: `items.parquet` (overlap of each item, and a trained document that holds it), `shares.parquet` (by task, language, domain: how
many were seen, and the score with and without them), `about.json`. Price: one pass over the trained documents, 2 to 4 MB/s a core;
16 bytes of memory an n-gram of the items.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.history import Made, read_history
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.table import read_batches
from eclectus.tasks.run import current_run, metric, progress
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

ROWS_AT_ONCE = 256
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
# Odd multipliers keep a rolling polynomial hash of 64 bits invertible in each word.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
KINDS = ("task", "text")
SHARE_FIELDS = {
    "kind": pa.string(), "name": pa.string(), "items": pa.int64(), "seen": pa.int64(), "share": pa.float64(),
    "mean_overlap": pa.float64(), "score": pa.float64(), "score_unseen": pa.float64(),
}  # fmt: skip


class ContaminationSettings(Settings):
    """What counts as seen in training."""

    contamination_words: int = Field(8, ge=2, description="Words in a row that are compared (an n-gram).")
    contamination_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="An item counts as seen when at least this share of its n-grams is in trained documents.",
    )
    contamination_shortest: int = Field(
        4, ge=1, description="Items of fewer words are not compared: they are too common to tell."
    )


@step(makes="evaluation", version=1)
def contamination(
    documents: Artifact,
    trained: list[Artifact],
    instances: list[Artifact],
    evaluation: Artifact,
    settings: ContaminationSettings,
    out: Draft,
    benchmark: Artifact | None = None,
) -> None:
    """Compares what a model was examined on with what it was trained on.

    documents: with the held-out texts. trained, instances: what the model was trained on, as texts and as packed (`trained_on`).
    evaluation: of held-out text. benchmark: of tasks.
    """
    ids = _trained(instances)
    items = _Items(settings)
    scored = pq.read_table(evaluation.file("documents.parquet")).to_pylist()
    names = {row["document"] for row in scored}
    held = {
        document: text
        for batch in read_batches(documents, ["document", "text"], [("document", "in", sorted(names))])
        for document, text in zip(batch["document"].to_pylist(), batch["text"].to_pylist(), strict=True)
    }
    if len(held) < len(names):
        raise EclectusError(
            f"{evaluation.name} scored {len(names) - len(held)} documents that are not in {documents.name}; give the documents it was made from"
        )
    for row in scored:
        items.add("text", row["document"], held[row["document"]], row)
    for row in _questions(benchmark):
        items.add("task", f"{row['task']}/{row['item']}", f"{row['question']} {row['target']}", row)
    searched = _search(trained, ids, items)
    _write(
        items, sorted(ids & names), benchmark, {"trained_documents": len(ids), "compared_with": searched}, settings, out
    )


def trained_on(checkpoint: Artifact) -> tuple[list[Artifact], list[Artifact]]:
    """(documents, instances) that a checkpoint was trained on, by the lineage; both empty where it knows of none, or outside a run."""
    run = current_run()
    if run is None:
        return [], []
    made = read_history(run.home, run.id, [checkpoint]).made
    instances = [digest for digest, each in made.items() if each.kind == "instances"]
    find = run.home.store.find
    return [find(f"documents-{each}") for each in packed_documents(made)], [
        find(f"instances-{each}") for each in sorted(instances)
    ]


def packed_documents(made: dict[str, Made]) -> list[str]:
    """Digests of the `documents` that were packed into the instances of a history."""
    packed = {
        source
        for each in made.values()
        if each.kind == "instances"
        for source in each.inputs.values()
        if source in made and made[source].kind == "documents"
    }
    return sorted(packed)


def _trained(instances: list[Artifact]) -> set[str]:
    """Ids of the documents in these instances. Raises EclectusError without any."""
    if not instances:
        raise EclectusError("nothing is known of what this model was trained on: no instances lie upstream of it")
    return {
        document
        for each in instances
        for document in pq.read_table(each.file("documents.parquet"), columns=["document"])["document"]
        .unique()
        .to_pylist()
    }


def _questions(benchmark: Artifact | None) -> Iterator[dict[str, Any]]:
    """One row an item, of its first metric."""
    seen: set[tuple[str, int]] = set()
    for row in pq.read_table(benchmark.file("items.parquet")).to_pylist() if benchmark else ():
        if (row["task"], row["item"]) not in seen:
            seen.add((row["task"], row["item"]))
            yield row


class _Items:
    """What is looked for: the n-grams of every item, as 64-bit hashes."""

    def __init__(self, settings: ContaminationSettings) -> None:
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self._grams: list[np.ndarray] = []
        self.lengths: set[int] = set()

    def add(self, kind: str, name: str, text: str, row: dict[str, Any]) -> None:
        words = hash_words(text)
        length = min(self.settings.contamination_words, len(words))
        known = length >= self.settings.contamination_shortest
        grams = np.unique(hash_grams(words, length)) if known else np.zeros(0, np.uint64)
        self.lengths |= {length} if known else set()
        self._grams.append(grams)
        self.rows.append({"kind": kind, "item": name, "words": len(words), "row": row})

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """(hashes of all n-grams, sorted; owner of each)."""
        counts = [len(grams) for grams in self._grams]
        grams = np.concatenate(self._grams) if self._grams else np.zeros(0, np.uint64)
        owners = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(grams, kind="stable")
        return grams[order], owners[order]

    @property
    def counts(self) -> np.ndarray:
        return np.array([len(grams) for grams in self._grams])


def hash_words(text: str) -> np.ndarray:
    """A 64-bit hash of each word [W]."""
    from pandas.util import hash_array

    words = _WORD.findall(text.lower())
    if not words:
        return np.zeros(0, np.uint64)
    return hash_array(np.array(words, object), categorize=False)


def hash_grams(words: np.ndarray, length: int) -> np.ndarray:
    """A hash of every `length` words in a row [W - length + 1]."""
    if len(words) < length or not length:
        return np.zeros(0, np.uint64)
    total = np.zeros(len(words) - length + 1, np.uint64)
    with np.errstate(over="ignore"):
        for at in range(length):
            total = total * MULTIPLIER + words[at : len(words) - length + 1 + at]
            total ^= total >> np.uint64(29)
    return total


def _search(sources: list[Artifact], trained: set[str], items: _Items) -> int:
    """Adds `overlap` and `document` (the first that holds most of the item); the number of documents looked at."""
    grams, owners = items.index()
    hit = np.zeros(len(grams), bool)
    best = np.zeros(len(items.rows), np.int64)
    where: list[str | None] = [None] * len(items.rows)
    report_progress, seen = progress(len(trained), "comparing", "documents"), set()
    for batch in (
        batch for source in sources for batch in read_batches(source, ["document", "text"], rows=ROWS_AT_ONCE)
    ):
        for document, text in zip(batch["document"].to_pylist(), batch["text"].to_pylist(), strict=True):
            if document not in trained or document in seen:
                continue
            seen.add(document)
            words = hash_words(text)
            found = np.concatenate(
                [_found(grams, hash_grams(words, length)) for length in sorted(items.lengths)] or [grams[:0]]
            )
            if not len(found):
                continue
            places = np.flatnonzero(np.isin(grams, found.astype(np.uint64)))
            hit[places] = True
            held, counts = np.unique(owners[places], return_counts=True)
            for item, count in zip(held[counts > best[held]], counts[counts > best[held]], strict=True):
                best[item], where[item] = count, document
        report_progress(len(seen))
    found_of = np.bincount(owners[hit], minlength=len(items.rows)) if len(items.rows) else np.zeros(0, int)
    for row, found, count, document in zip(items.rows, found_of, items.counts, where, strict=True):
        row |= {"overlap": float(found / count) if count else None, "document": document}
    return len(seen)


def _found(grams: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Which of the candidates are among the sorted n-grams."""
    return candidates[positions_of(candidates, grams, ascending=True) >= 0]


def _write(
    items: _Items,
    same: list[str],
    benchmark: Artifact | None,
    counts: dict[str, int],
    settings: ContaminationSettings,
    out: Draft,
) -> None:
    for row in items.rows:
        row["seen"] = row["overlap"] is not None and row["overlap"] >= settings.contamination_share
    columns = ("kind", "item", "words", "overlap", "seen", "document")
    table = pa.table(
        {name: [row[name] for row in items.rows] for name in columns},
        schema=pa.schema(
            [
                ("kind", pa.string()),
                ("item", pa.string()),
                ("words", pa.int64()),
                ("overlap", pa.float64()),
                ("seen", pa.bool_()),
                ("document", pa.string()),
            ]
        ),
    )
    pq.write_table(table, out.file("items.parquet"), compression="zstd")
    shares = _shares(items, benchmark)
    fields = pa.schema(list(SHARE_FIELDS.items()))
    pq.write_table(pa.Table.from_pylist(shares, schema=fields), out.file("shares.parquet"), compression="zstd")
    for row in shares:
        metric("contamination", row["share"], **{row["kind"]: row["name"]})
    seen = sum(row["seen"] for row in items.rows)
    out.rows = len(items.rows)
    out.statistics = {
        "items": len(items.rows),
        "seen": seen,
        "share": round(seen / len(items.rows), 6) if items.rows else 0.0,
        "not_compared": sum(row["overlap"] is None for row in items.rows),
        "held_out_documents_that_were_trained_on": len(same),
        "words": settings.contamination_words,
        **counts,
    }
    out.file("about.json").write_text(json.dumps(out.statistics | {"same": same}, indent=1), "utf-8")


def _shares(items: _Items, benchmark: Artifact | None) -> list[dict[str, Any]]:
    """By task, by language and by domain of held-out text: items, those seen, and the score of all and of the unseen."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in items.rows:
        if row["kind"] == "task":
            groups["task", row["row"]["task"]].append(row)
        else:
            groups["language", row["row"]["language"]].append(row)
            groups["domain", row["row"]["domain"]].append(row)
    shares = []
    for (kind, name), rows in sorted(groups.items()):
        unseen = [row for row in rows if not row["seen"]]
        overlaps = [row["overlap"] for row in rows if row["overlap"] is not None]
        shares.append(
            {
                "kind": kind,
                "name": name,
                "items": len(rows),
                "seen": len(rows) - len(unseen),
                "share": (len(rows) - len(unseen)) / len(rows),
                "mean_overlap": float(np.mean(overlaps)) if overlaps else None,
                "score": _score(kind, rows),
                "score_unseen": _score(kind, unseen),
            }
        )
    return shares


def _score(kind: str, rows: list[dict[str, Any]]) -> float | None:
    """Mean of the first metric for a task, bits per byte for text; None over nothing."""
    if kind == "task":
        values = [row["row"]["value"] for row in rows if row["row"]["value"] is not None]
        return float(np.mean(values)) if values else None
    size = sum(row["row"]["bytes"] for row in rows)
    return sum(row["row"]["bits"] for row in rows) / size if size else None
