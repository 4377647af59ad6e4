"""Split: which documents are held out, decided document by document before any training.

A document's draw is a number in [0, 1), from a hash of its id and the seed. Within a stratum (language and domain),
documents with draws below a threshold are held out. The threshold is `heldout_fraction`, raised in steps of 2^(1/4)
until the stratum gives `heldout_minimum` documents, or lowered until it gives at most `heldout_maximum`. So a growing
corpus does not reshuffle its documents: a stratum's threshold only falls as it grows, and no training document
becomes a held-out one. The exception is a stratum of less than five times the minimum: it gives the lowest fifth of
its draws, and every language of two or more documents holds out at least one and trains on at least one. Documents of
group `other` are in neither: their split is `apart`. Price: one pass over ids and labels, 12 bytes of memory per
document.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_batches, relabel
from eclectus.tasks.run import metric
from eclectus.tasks.settings import SEED, Settings
from eclectus.tasks.step import step

SPLITS = np.array(["train", "heldout", "apart"])
TRAIN, HELDOUT, APART = range(3)
SMALL = 5
STEP = 2**0.25


class SplitSettings(Settings):
    """How many documents of each language and domain are held out."""

    heldout_fraction: float = Field(
        0.05, gt=0, le=0.5, description="Share of the documents of each language and domain to hold out."
    )
    heldout_minimum: int = Field(
        10, ge=1, description="At least this many documents of each language and domain that has five times as many."
    )
    heldout_maximum: int = Field(
        1000, ge=1, description="At most this many documents of each language and domain.", validate_default=True
    )
    seed: int = SEED

    @field_validator("heldout_maximum")
    @classmethod
    def _above_minimum(cls, maximum: int, info: ValidationInfo) -> int:
        if maximum < 2 * info.data.get("heldout_minimum", 0):
            raise ValueError("heldout_maximum must be at least twice heldout_minimum")
        return maximum


@step(makes="documents", version=2)
def split(documents: Artifact, settings: SplitSettings, out: Draft) -> None:
    """Fills the column split. Raises EclectusError if no document is left to train on."""
    strata: dict[tuple[str, str], int] = {}
    drawn, stratum_of = [], []
    for batch in read_batches(documents, ["document", "language", "domain", "group"]):
        drawn.append(draws(batch["document"].to_pylist(), "split", settings.seed))
        stratum_of.append(np.array([_stratum(strata, *row) for row in _rows(batch)], np.int32))
    draw = np.concatenate(drawn) if drawn else np.zeros(0)
    stratum = np.concatenate(stratum_of) if stratum_of else np.zeros(0, np.int32)
    choice = assign(draw, stratum, list(strata), settings)
    if not (choice == TRAIN).any():
        raise EclectusError(
            f"no document is left to train on: {len(choice)} documents, {int((choice == APART).sum())} of them "
            "excluded; add documents, or lower 'language_confidence'"
        )
    relabel(documents, {"split": pa.array(SPLITS[choice])}, out)
    out.statistics = _statistics(choice, stratum, strata)
    for name in ("train", "heldout", "apart"):
        metric("split_documents", out.statistics[name], split=name)


def assign(draw: np.ndarray, stratum: np.ndarray, strata: list[tuple[str, str]], settings: SplitSettings) -> np.ndarray:
    """The split of each document, as an index into SPLITS [N] int8.

    draw [N]: in [0, 1). stratum [N]: index into `strata` (language, domain); -1 is none.
    """
    choice = np.full(len(draw), TRAIN, np.int8)
    choice[stratum < 0] = APART
    languages: dict[str, list[np.ndarray]] = defaultdict(list)
    order = np.argsort(stratum, kind="stable")
    starts = np.searchsorted(stratum[order], np.arange(len(strata) + 1))
    for number, (language, _) in enumerate(strata):
        rows = order[starts[number] : starts[number + 1]]
        choice[rows[_below(draw[rows], settings)]] = HELDOUT
        languages[language].append(rows)
    for parts in languages.values():
        rows = np.concatenate(parts)
        if len(rows) >= 2 and not (choice[rows] == HELDOUT).any():
            choice[rows[np.argmin(draw[rows])]] = HELDOUT
    return choice


def draws(documents: list[str], purpose: str, seed: int) -> np.ndarray:
    """A number in [0, 1) for each document id [N], independent between purposes and seeds, the same in every corpus."""
    prefix = hashlib.sha256(f"{purpose} {seed} ".encode())
    words = bytearray()
    for document in documents:
        digest = prefix.copy()
        digest.update(document.encode())
        words += digest.digest()[:8]
    return (np.frombuffer(bytes(words), ">u8") >> np.uint64(11)) * 2.0**-53


def _below(draw: np.ndarray, settings: SplitSettings) -> np.ndarray:
    """Which rows of one stratum are held out, as a mask."""
    count = len(draw)
    if count < SMALL * settings.heldout_minimum:
        return np.argsort(np.argsort(draw)) < count // SMALL
    threshold = settings.heldout_fraction
    while (draw < threshold).sum() < settings.heldout_minimum:
        threshold *= STEP
    while (draw < threshold).sum() > settings.heldout_maximum:
        threshold /= STEP
    return draw < threshold


def _rows(batch: pa.RecordBatch) -> Any:
    return zip(*(batch[name].to_pylist() for name in ("language", "domain", "group")), strict=True)


def _stratum(strata: dict[tuple[str, str], int], language: str, domain: str, group: str) -> int:
    return -1 if group == "other" else strata.setdefault((language, domain), len(strata))


def _statistics(choice: np.ndarray, stratum: np.ndarray, strata: dict[tuple[str, str], int]) -> dict[str, Any]:
    table: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    counts = np.zeros((len(strata), len(SPLITS)), np.int64)
    inside = stratum >= 0
    np.add.at(counts, (stratum[inside], choice[inside]), 1)
    for (language, domain), number in sorted(strata.items()):
        table[language][domain] = {
            "train": int(counts[number, TRAIN]),
            "heldout": int(counts[number, HELDOUT]),
        }
    return {str(name): int((choice == i).sum()) for i, name in enumerate(SPLITS)} | {
        "by_language": dict(table),
        "without_heldout": [
            language for language, domains in table.items() if not any(each["heldout"] for each in domains.values())
        ],
    }
