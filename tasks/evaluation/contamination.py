"""Contamination: how much of the evaluation data is in the documents that the model was trained on.

    trained      every document in the instances upstream of the checkpoint, by lineage
    items        questions with their correct answers (tasks/evaluation/benchmark.py), and held-out documents
                 (tasks/evaluation/evaluate.py)
    overlap      share of an item's word n-grams that occur in a trained document; a shorter item is one n-gram
    passages     share of an item's windows of 50 bytes that occur in a trained document (tasks/evaluation/passages.py);
                 finds copies that words miss (code, tables, languages without spaces) and says how long they are
    seen         overlap of at least `contamination_share`, or passages of at least `contamination_passages`

Words are runs of letters or digits in lower case; a Chinese, Japanese or Thai character is a word of its own. Whether a
held-out document is itself a trained one is checked by the documents' ids, which are hashes of their texts.

Files:
    items.parquet    overlap and passages of each item, and a trained document that contains most of it
    shares.parquet   by task, language, domain and group: items seen, mean overlaps, and the score with and without the
                     items seen, so that a reader sees what contamination changes
    about.json
Cost: one pass over the trained documents, 2 to 4 MB/s per core, nearly all of it for words; 16 bytes of memory per
n-gram of the items and 24 per byte of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.history import Made
from eclectus.tasks.documents.digest_set import distinct, positions_of
from eclectus.tasks.documents.table import ids_of, read_batches
from eclectus.tasks.evaluation.passages import hash_grams, hash_words, seen_share
from eclectus.tasks.packing.instance_file import document_tables
from eclectus.tasks.run import current_run, metric, progress
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

ROWS_AT_ONCE = 256
IDS_AT_ONCE = 2**18

ITEM_FIELDS = {
    "kind": pa.string(), "item": pa.string(), "words": pa.int64(), "overlap": pa.float64(), "seen": pa.bool_(),
    "document": pa.string(), "passages": pa.float64(),
}  # fmt: skip
SHARE_FIELDS = {
    "kind": pa.string(), "name": pa.string(), "items": pa.int64(), "seen": pa.int64(), "share": pa.float64(),
    "mean_overlap": pa.float64(), "score": pa.float64(), "score_unseen": pa.float64(),
    "mean_passages": pa.float64(),
}  # fmt: skip


class ContaminationSettings(Settings):
    """What counts as seen in training."""

    contamination_words: int = Field(8, ge=2, description="Words in an n-gram.")
    contamination_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="An item counts as seen when at least this share of its n-grams is in trained documents.",
    )
    contamination_window: int = Field(50, ge=8, description="Bytes of a passage that is looked for word for word.")
    contamination_passages: float = Field(
        0.5,
        gt=0,
        le=1,
        description="An item also counts as seen when at least this share of its passages is in trained documents.",
    )
    contamination_shortest: int = Field(
        4, ge=1, description="Items with fewer words are not compared: they occur by chance."
    )


@step(makes="evaluation", version=2)
def contamination(
    documents: Artifact,
    trained: list[Artifact],
    instances: list[Artifact],
    evaluation: Artifact,
    settings: ContaminationSettings,
    out: Draft,
    benchmark: Artifact | None = None,
) -> None:
    """Compares a model's evaluation data with its training data.

    documents: with the held-out texts. trained, instances: the training data as documents and as packed (`trained_on`).
    evaluation: of held-out text. benchmark: of tasks.
    """
    ids = _trained(instances)
    items = _Items(settings)
    scored = pq.read_table(evaluation.file("documents.parquet")).to_pylist()
    names = {row["document"] for row in scored}
    held: dict[str, str] = {}
    for batch in read_batches(documents, ["document", "text"], [("document", "in", sorted(names))]):
        held.update(zip(batch["document"].to_pylist(), batch["text"].to_pylist(), strict=True))
    if len(held) < len(names):
        raise EclectusError(
            f"{evaluation.name} scored {len(names) - len(held)} documents that are not in {documents.name}; give the "
            "documents it was made from"
        )
    for row in scored:
        items.add("text", row["document"], held[row["document"]], row)
    for row in _questions(benchmark):
        items.add("task", f"{row['task']}/{row['item']}", f"{row['question']} {row['target']}", row)
    searched = _search(_trained_texts(trained, ids), items)
    known = sorted(names)
    same = np.flatnonzero(positions_of(ids_of(pa.chunked_array([known], pa.string())), ids, ascending=True) >= 0)
    counts = {"trained_documents": len(ids), "compared_with": searched}
    _write(items, [known[number] for number in same.tolist()], benchmark, counts, settings, out)


def trained_on(checkpoint: Artifact) -> tuple[list[Artifact], list[Artifact]]:
    """(documents, instances) that a checkpoint was trained on, by lineage; both empty if unknown or outside a run."""
    run = current_run()
    if run is None:
        return [], []
    made = run.upstream([checkpoint])
    instances = [digest for digest, each in made.items() if each.kind == "instances"]
    documents = [run.find("documents", each) for each in packed_documents(made)]
    return documents, [run.find("instances", each) for each in sorted(instances)]


def packed_documents(made: dict[str, Made]) -> list[str]:
    """Digests of the `documents` that were packed into the instances of a history, sorted."""
    packed: set[str] = set()
    for each in made.values():
        if each.kind == "instances":
            packed |= {digest for digest in each.inputs.values() if digest in made and made[digest].kind == "documents"}
    return sorted(packed)


def _trained(instances: list[Artifact]) -> np.ndarray:
    """Ids of the documents in these instances, S16, ascending. Raises EclectusError if there are none."""
    if not instances:
        raise EclectusError("the training data of this model is unknown: no instances are upstream of it")
    ids = [np.empty(0, "S16")]
    for each in instances:
        for path in document_tables(each):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(IDS_AT_ONCE, columns=["document"]):
                    ids.append(distinct(ids_of(pa.chunked_array([batch["document"].cast(pa.string())]))))
    return distinct(np.concatenate(ids))


def _questions(benchmark: Artifact | None) -> Iterator[dict[str, Any]]:
    """One row per item, of its first metric."""
    seen: set[tuple[str, int]] = set()
    for row in pq.read_table(benchmark.file("items.parquet")).to_pylist() if benchmark else ():
        if (row["task"], row["item"]) not in seen:
            seen.add((row["task"], row["item"]))
            yield row


class _Items:
    """The items, with the n-grams of each as 64-bit hashes."""

    def __init__(self, settings: ContaminationSettings) -> None:
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self._grams: list[np.ndarray] = []
        self.lengths: set[int] = set()

    def add(self, kind: str, name: str, text: str, row: dict[str, Any]) -> None:
        words = hash_words(text)
        length = min(self.settings.contamination_words, len(words))
        known = length >= self.settings.contamination_shortest
        grams = distinct(hash_grams(words, length)) if known else np.zeros(0, np.uint64)
        self.lengths |= {length} if known else set()
        self._grams.append(grams)
        self.texts.append(text)
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


def _trained_texts(sources: list[Artifact], trained: np.ndarray) -> Iterator[tuple[str, str]]:
    """(id, text) of every trained document, once each; reports progress. trained: ids, ascending."""
    report_progress = progress(len(trained), "comparing", "documents")
    wanted = np.ones(len(trained), bool)
    for source in sources:
        for batch in read_batches(source, ["document", "text"], rows=ROWS_AT_ONCE):
            place = positions_of(ids_of(pa.chunked_array([batch["document"]])), trained, ascending=True)
            here = np.flatnonzero((place >= 0) & wanted[place])
            wanted[place[here]] = False
            yield from zip(
                *(batch[name].take(pa.array(here)).to_pylist() for name in ("document", "text")), strict=True
            )
            report_progress(int(len(wanted) - wanted.sum()))


def _search(trained_texts: Iterable[tuple[str, str]], items: _Items) -> int:
    """Adds `overlap`, `passages` and `document` (the one with most n-grams of the item); returns documents compared."""
    grams, owners = items.index()
    hit = np.zeros(len(grams), bool)
    best = np.zeros(len(items.rows), np.int64)
    where: list[str | None] = [None] * len(items.rows)
    compared = 0

    def by_words() -> Iterator[str]:
        """Compares the words of every trained text, and passes the text on."""
        nonlocal compared
        for document, text in trained_texts:
            compared += 1
            words = hash_words(text)
            in_text = np.concatenate([grams[:0], *(hash_grams(words, length) for length in items.lengths)])
            at = np.flatnonzero(np.isin(grams, in_text[positions_of(in_text, grams, ascending=True) >= 0]))
            hit[at] = True
            held, counts = np.unique(owners[at], return_counts=True)
            better = counts > best[held]
            for item, count in zip(held[better], counts[better], strict=True):
                best[item], where[item] = count, document
            yield text

    passages = seen_share(items.texts, by_words(), items.settings.contamination_window)
    found_of = np.bincount(owners[hit], minlength=len(items.rows)) if len(items.rows) else np.zeros(0, int)
    for number, row in enumerate(items.rows):
        count = items.counts[number]
        row |= {"overlap": float(found_of[number] / count) if count else None, "document": where[number]}
        row["passages"] = None if np.isnan(passages[number]) else float(passages[number])
    return compared


def _write(
    items: _Items,
    same: list[str],
    benchmark: Artifact | None,
    counts: dict[str, int],
    settings: ContaminationSettings,
    out: Draft,
) -> None:
    for row in items.rows:
        row["seen"] = (row["overlap"] or 0.0) >= settings.contamination_share
        row["seen"] |= (row["passages"] or 0.0) >= settings.contamination_passages
    table = pa.Table.from_pylist(items.rows, schema=pa.schema(list(ITEM_FIELDS.items())))
    pq.write_table(table, out.file("items.parquet"), compression="zstd")
    shares = _shares(items, benchmark)
    fields = pa.schema(list(SHARE_FIELDS.items()))
    pq.write_table(pa.Table.from_pylist(shares, schema=fields), out.file("shares.parquet"), compression="zstd")
    for row in shares:
        metric("contamination", row["share"], **{row["kind"]: row["name"]})
        if row["mean_passages"] is not None:
            metric("contamination_passages", row["mean_passages"], **{row["kind"]: row["name"]})
    seen = sum(row["seen"] for row in items.rows)
    out.rows = len(items.rows)
    out.statistics = {
        "items": len(items.rows),
        "seen": seen,
        "share": round(seen / len(items.rows), 6) if items.rows else 0.0,
        "not_compared": sum(row["overlap"] is None and row["passages"] is None for row in items.rows),
        "held_out_documents_that_were_trained_on": len(same),
        "words": settings.contamination_words,
        "window": settings.contamination_window,
        **counts,
    }
    out.file("about.json").write_text(json.dumps(out.statistics | {"same": same}, indent=1), "utf-8")


def _shares(items: _Items, benchmark: Artifact | None) -> list[dict[str, Any]]:
    """By task, language and domain of held-out text: number of items, those seen, scores of all and of the unseen."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in items.rows:
        if row["kind"] == "task":
            groups["task", row["row"]["task"]].append(row)
        else:
            groups["language", row["row"]["language"]].append(row)
            groups["domain", row["row"]["domain"]].append(row)
            groups["group", row["row"]["group"]].append(row)
    shares = []
    for (kind, name), rows in sorted(groups.items()):
        unseen = [row for row in rows if not row["seen"]]
        means = {}
        for measure in ("overlap", "passages"):
            known = [row[measure] for row in rows if row[measure] is not None]
            means[f"mean_{measure}"] = float(np.mean(known)) if known else None
        shares.append(
            {
                "kind": kind,
                "name": name,
                "items": len(rows),
                "seen": len(rows) - len(unseen),
                "share": (len(rows) - len(unseen)) / len(rows),
                **means,
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
