"""News: what the sources hold that was not trained on before, and whether that is enough to train on; and what to train on then.

New is a training document (tasks/documents/split.py) of an original or expanded language whose id is in none of the `documents` that were
packed for the models judged so far. Tokens are counted by the champion's own tokenizer. `refresh` sets the expanded languages' old
documents apart but for a share, so that a night's few steps are spent on what is new.
Price: one read of the ids, and of the new texts (0.5M tokens a second); `refresh` 20 bytes a document.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft, write_json
from eclectus.tasks.documents.split import draws
from eclectus.tasks.documents.table import TRAINING, read_batches, read_table, relabel
from eclectus.tasks.packing.tokenizer import load_tokenizer, token_ids
from eclectus.tasks.settings import BASIC, SEED, Settings
from eclectus.tasks.step import step

TEXTS_AT_ONCE = 512


class NewsSettings(Settings):
    """How much has to be new before training again is worth it."""

    retrain_documents: int = Field(
        200,
        ge=0,
        description="Training runs again from this many new training documents on; 'retrain_tokens' must be met too.",
        json_schema_extra=BASIC,
    )
    retrain_tokens: int = Field(
        50_000,
        ge=0,
        description="... and from this many new tokens on, as the champion's tokenizer counts.",
        json_schema_extra=BASIC,
    )
    retrain_languages: int = Field(
        1,
        ge=0,
        description="However few the documents: training runs again when this many of the languages set here are new; 0: never for that.",
    )


class RefreshSettings(Settings):
    """What a retraining reads beside what is new."""

    retrain_replay: float = Field(
        1.0,
        ge=0,
        description="Documents of expanded languages that the champion knows already and reads again, for each one that is new.",
    )
    seed: int = SEED


@step(makes="report", version=1)
def news(
    documents: Artifact,
    settings: NewsSettings,
    out: Draft,
    seen: list[Artifact] | None = None,
    model: Artifact | None = None,
) -> None:
    """Counts what is new and decides. documents, seen: with split; seen: trained on before. model: the one trained last, if any."""
    known = known_ids(seen or [])
    languages = {
        language
        for artifact in seen or ()
        for batch in read_batches(artifact, ["language"], TRAINING)
        for language in batch["language"].unique().to_pylist()
    }
    tokens = load_tokenizer(model.path) if model else None
    counts: Counter[str] = Counter()
    new_tokens = 0
    for batch in read_batches(documents, ["document", "language", "text"], TRAINING, TEXTS_AT_ONCE):
        fresh = [row for row in batch.to_pylist() if row["document"] not in known]
        counts.update(row["language"] for row in fresh)
        if tokens and fresh:
            new_tokens += sum(map(len, token_ids(tokens, [row["text"] for row in fresh])))
    told = decide(dict(counts), new_tokens, sorted(set(counts) - languages), settings, model is not None)
    write_json(out.file("news.json"), told)
    out.rows = told["new_documents"]
    out.statistics = told


def decide(
    counts: dict[str, int], tokens: int, new_languages: list[str], settings: NewsSettings, trained_before: bool
) -> dict[str, Any]:
    """The numbers, `train` and the `reason` in words. counts: new documents by language."""
    documents = sum(counts.values())
    told = {"new_documents": documents, "by_language": counts, "new_tokens": tokens, "new_languages": new_languages}
    if not trained_before:
        return {**told, "train": True, "reason": "nothing was trained for this line yet"}
    if settings.retrain_languages and len(new_languages) >= settings.retrain_languages:
        return {**told, "train": True, "reason": f"languages never trained on: {', '.join(new_languages)}"}
    if not documents:
        return {**told, "train": False, "reason": "nothing is new"}
    wanted = (("documents", documents, settings.retrain_documents), ("tokens", tokens, settings.retrain_tokens))
    missing = [f"{value} of {least} {name}" for name, value, least in wanted if value < least]
    if missing:
        return {**told, "train": False, "reason": f"not enough is new: {' and '.join(missing)}"}
    return {**told, "train": True, "reason": f"{documents} new documents with {tokens} tokens"}


@step(makes="documents", version=1)
def refresh(documents: Artifact, settings: RefreshSettings, out: Draft, seen: list[Artifact] | None = None) -> None:
    """Sets documents of expanded languages that were trained on before apart, but for the share that is read again.

    All stay where none is new: training on for the sake of other languages must not starve.
    """
    known = known_ids(seen or [])
    table = read_table(documents, ["document", "split", "group"])
    trained = pc.and_(pc.equal(table["split"], "train"), pc.equal(table["group"], "expanded"))
    ids = table["document"].to_pylist()
    old = np.array(trained) & np.array([each in known for each in ids], bool)
    new = int(np.array(trained).sum() - old.sum())
    rows = np.flatnonzero(old)
    again = min(len(rows), round(settings.retrain_replay * new)) if new else len(rows)
    order = np.argsort(draws([ids[row] for row in rows], "refresh", settings.seed), kind="stable")
    apart = np.zeros(len(ids), bool)
    apart[rows[order[again:]]] = True
    relabel(documents, {"split": pc.if_else(pa.array(apart), "apart", table["split"])}, out)
    out.statistics = {"new": new, "read_again": again, "set_apart": int(apart.sum())}


def known_ids(seen: list[Artifact]) -> set[str]:
    """Ids of all documents of wanted languages in these artifacts, whatever a budget or a refresh set apart among them."""
    known: set[str] = set()
    for artifact in seen:
        for batch in read_batches(artifact, ["document"], [("group", "!=", "other")]):
            known.update(batch["document"].to_pylist())
    return known
