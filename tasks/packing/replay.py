"""Replay: the documents of the review stage, a random sample of every language (docs/methods.md 2.4).

The paper reviews 50,000 documents of each of three original languages and 100,000 of each of three expanded ones: one
original document to two expanded. Automatic counts keep that ratio over all languages together, at the largest size
up to the paper's that the corpus allows without repetition: a language with fewer documents gives all of them. Only
documents of the train split are drawn. A language's sample under one seed grows with its count, and does not change
when documents of other languages are added. Price: two passes over the documents, 10 bytes of memory per document.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import draws
from eclectus.tasks.documents.table import DocumentsWriter, read_batches
from eclectus.tasks.run import metric, progress
from eclectus.tasks.settings import SEED, Settings
from eclectus.tasks.step import step

PAPER_EXPANDED = 100_000
ORIGINALS_PER_EXPANDED = 0.5


class ReplaySettings(Settings):
    """How many documents the review stage trains on."""

    review_original_documents: int = Field(
        0, ge=0, description="Documents of each original language in the review; 0 keeps the paper's 1:2 to expanded."
    )
    review_expanded_documents: int = Field(
        0,
        ge=0,
        description="Documents of each expanded language in the review; 0 takes as many as there are, up to 100,000.",
    )
    seed: int = SEED


@step(makes="documents", version=1)
def replay(documents: Artifact, settings: ReplaySettings, out: Draft, grouping: Artifact | None = None) -> None:
    """Draws the review documents. Raises EclectusError if a group has none to draw from.

    grouping: if given, only documents that it kept are drawn, so none that is a near-duplicate of a held-out one.
    """
    strata: dict[tuple[str, str], int] = {}
    draw, stratum = [], []
    for batch in read_batches(documents, ["document", "language", "group", "split"]):
        draw.append(draws(batch["document"].to_pylist(), "replay", settings.seed))
        columns = (batch[name].to_pylist() for name in ("group", "language", "split"))
        stratum.append(np.array([_stratum(strata, *row) for row in zip(*columns, strict=True)], np.int16))
    draw_N = np.concatenate(draw or [np.zeros(0)])
    stratum_N = np.concatenate(stratum or [np.zeros(0, np.int16)])
    if grouping is not None:
        kept = pq.read_table(grouping.file("order.parquet"), columns=["row"])["row"].to_numpy()
        stratum_N[~np.isin(np.arange(len(stratum_N)), kept)] = -1
    available = {key: int((stratum_N == number).sum()) for key, number in strata.items()}
    counts = review_counts(available, settings)
    chosen = np.zeros(len(draw_N), bool)
    for (group, _), number in strata.items():
        rows = np.flatnonzero(stratum_N == number)
        chosen[rows[np.argsort(draw_N[rows], kind="stable")[: counts[group]]]] = True
    _write(documents, chosen, out)
    out.statistics = {
        "documents": int(chosen.sum()),
        "languages": {
            language: {
                "group": group,
                "documents": min(counts[group], there),
                "wanted": counts[group],
                "available": there,
            }
            for (group, language), there in sorted(available.items())
        },
    }
    for language, each in out.statistics["languages"].items():
        metric("replay_documents", each["documents"], language=language)


def review_counts(available: dict[tuple[str, str], int], settings: ReplaySettings) -> dict[str, int]:
    """Documents to draw per language, by group. available: (group, language) -> documents that may be drawn.

    Raises EclectusError if a group has no document.
    """
    sizes: dict[str, list[int]] = {"original": [], "expanded": []}
    for (group, _), documents in available.items():
        if documents and group in sizes:
            sizes[group].append(documents)
    for group, each in sizes.items():
        if not each:
            raise EclectusError(
                f"the review has no document of an {group} language to draw from; "
                f"add documents of '{group}_languages' to the train split"
            )
    originals, expandeds = len(sizes["original"]), len(sizes["expanded"])
    # Documents of each original language per document of each expanded language, at the paper's ratio.
    share = ORIGINALS_PER_EXPANDED * expandeds / originals
    expanded = settings.review_expanded_documents
    if not expanded:
        most = int((settings.review_original_documents or max(sizes["original"])) / share)
        expanded = max(1, min(PAPER_EXPANDED, max(sizes["expanded"]), most))
    original = settings.review_original_documents or max(1, round(expanded * share))
    return {"original": original, "expanded": expanded}


def _stratum(strata: dict[tuple[str, str], int], group: str, language: str, split: str) -> int:
    """The number of the (group, language), or -1 if the document may not be drawn."""
    if split != "train" or group == "other":
        return -1
    return strata.setdefault((group, language), len(strata))


def _write(documents: Artifact, chosen: np.ndarray, out: Draft) -> None:
    report_progress, row = progress(len(chosen), "drawing the review", "documents"), 0
    with DocumentsWriter(out) as writer:
        for batch in read_batches(documents):
            kept = pa.table(batch.columns, batch.schema.names).filter(pa.array(chosen[row : row + len(batch)]))
            row += len(batch)
            if len(kept):
                writer.write(kept)
            report_progress(row)
