"""New documents: which documents were not trained on before, whether they suffice to retrain, and what to train on
then.

A document is new if it is a training document (tasks/documents/split.py) of an original or expanded language and its id
is in none of the `documents` packed for the models evaluated so far. Tokens are counted with the champion's tokenizer.
`refresh` excludes known documents of the expanded languages except for a share, so that the few steps of a scheduled
run are spent on new ones. Cost: reading all ids and the new texts (0.5M tokens/s); 16 bytes per known document.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft, write_json
from eclectus.tasks.documents.digest_set import distinct, positions_of
from eclectus.tasks.documents.split import draws
from eclectus.tasks.documents.table import TRAINING, ids_of, read_batches, read_part_table, relabel
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import load_tokenizer
from eclectus.tasks.settings import BASIC, SEED, Settings
from eclectus.tasks.step import step

TEXTS_AT_ONCE = 512
IDS_AT_ONCE = 2**17


class NewDocumentsSettings(Settings):
    """How much new data triggers a retraining."""

    retrain_documents: int = Field(
        200,
        ge=0,
        description="New training documents needed for a retraining; 'retrain_tokens' must be met too.",
        json_schema_extra=BASIC,
    )
    retrain_tokens: int = Field(
        50_000,
        ge=0,
        description="New tokens needed for a retraining, counted with the champion's tokenizer.",
        json_schema_extra=BASIC,
    )
    retrain_languages: int = Field(
        1,
        ge=0,
        description="New languages that trigger a retraining, however few their documents; 0: they never do.",
    )


class RefreshSettings(Settings):
    """What a retraining reads in addition to new documents."""

    retrain_replay: float = Field(
        1.0,
        ge=0,
        description="Known documents of expanded languages to read again, per new document.",
    )
    seed: int = SEED


@step(makes="report", version=2)
def news(
    documents: Artifact,
    settings: NewDocumentsSettings,
    out: Draft,
    seen: list[Artifact] | None = None,
    model: Artifact | None = None,
) -> None:
    """Counts new documents and decides whether to train.

    documents: with split. seen: the documents trained on before, with split. model: the model trained last, if any.
    """
    known = known_ids(seen or [])
    languages: set[str] = set()
    for artifact in seen or ():
        for batch in read_batches(artifact, ["language"], TRAINING):
            languages.update(batch["language"].unique().to_pylist())
    encode = TextTokens(load_tokenizer(model.path)) if model else None
    counts: Counter[str] = Counter()
    new_tokens = 0
    columns = ["document", "language", *(["text"] if encode else [])]
    for batch in read_batches(documents, columns, TRAINING, TEXTS_AT_ONCE):
        fresh = batch.filter(pa.array(~_are_known(batch["document"], known)))
        counts.update(fresh["language"].to_pylist())
        if encode and len(fresh):
            new_tokens += sum(map(len, encode(fresh["text"].to_pylist())))
    decision = decide(dict(counts), new_tokens, sorted(set(counts) - languages), settings, model is not None)
    write_json(out.file("news.json"), decision)
    out.rows = decision["new_documents"]
    out.statistics = decision


def decide(
    counts: dict[str, int], tokens: int, new_languages: list[str], settings: NewDocumentsSettings, trained_before: bool
) -> dict[str, Any]:
    """The numbers, whether to `train`, and the `reason`. counts: new documents by language."""
    documents = sum(counts.values())
    numbers = {"new_documents": documents, "by_language": counts, "new_tokens": tokens, "new_languages": new_languages}
    if not trained_before:
        return {**numbers, "train": True, "reason": "nothing was trained for this line yet"}
    if settings.retrain_languages and len(new_languages) >= settings.retrain_languages:
        return {**numbers, "train": True, "reason": f"languages never trained on: {', '.join(new_languages)}"}
    if not documents:
        return {**numbers, "train": False, "reason": "nothing is new"}
    needed = (("documents", documents, settings.retrain_documents), ("tokens", tokens, settings.retrain_tokens))
    missing = [f"{value} of {least} {name}" for name, value, least in needed if value < least]
    if missing:
        return {**numbers, "train": False, "reason": f"not enough is new: {' and '.join(missing)}"}
    return {**numbers, "train": True, "reason": f"{documents} new documents with {tokens} tokens"}


@step(makes="documents", version=1)
def refresh(documents: Artifact, settings: RefreshSettings, out: Draft, seen: list[Artifact] | None = None) -> None:
    """Excludes documents of expanded languages that were trained on before, except for the share that is read again.

    If none is new, all stay: a retraining because of other languages still needs text of these.
    """
    known = known_ids(seen or [])
    kinds, is_old, draw = [], [], []
    for batch in read_batches(documents, ["document", "split", "group"], rows=IDS_AT_ONCE):
        trained = pc.and_(pc.equal(batch["split"], "train"), pc.equal(batch["group"], "expanded")).fill_null(False)
        old = np.array(trained) & _are_known(batch["document"], known)
        kinds.append(np.array(trained))
        is_old.append(old)
        draw.append(draws(batch["document"].filter(pa.array(old)).to_pylist(), "refresh", settings.seed))
    rows = np.flatnonzero(np.concatenate([np.empty(0, bool), *is_old]))
    new = int(sum(each.sum() for each in kinds)) - len(rows)
    again = min(len(rows), round(settings.retrain_replay * new)) if new else len(rows)
    order = np.argsort(np.concatenate([np.empty(0), *draw]), kind="stable")
    excluded = np.zeros(sum(map(len, kinds)), bool)
    excluded[rows[order[again:]]] = True

    def labels(path: Path, begin: int, end: int) -> dict[str, pa.ChunkedArray]:
        before = read_part_table(path, ["split"])["split"]
        return {"split": pc.if_else(pa.array(excluded[begin:end]), "apart", before)}

    relabel(documents, labels, out)
    out.statistics = {"new": new, "read_again": again, "set_apart": int(excluded.sum())}


def known_ids(seen: list[Artifact]) -> np.ndarray:
    """Ids of all documents of wanted languages in these artifacts, also of those a budget or refresh excluded.

    As 16 bytes each, S16 [n], ascending.
    """
    known = [np.empty(0, "S16")]
    for artifact in seen:
        for batch in read_batches(artifact, ["document"], [("group", "!=", "other")], IDS_AT_ONCE):
            known.append(ids_of(pa.chunked_array([batch["document"]])))
    return distinct(np.concatenate(known))


def _are_known(documents: pa.Array, known: np.ndarray) -> np.ndarray:
    """Which of these documents' ids [n] are among the known ones: bool [n]."""
    return positions_of(ids_of(pa.chunked_array([documents])), known, ascending=True) >= 0
