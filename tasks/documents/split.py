"""Split: which documents are held out, decided work by work before any training.

    page        documents whose texts nearly repeat each other (tasks/documents/near_duplicates.py) count as one page;
                shares and settings are of pages
    draw        a number in [0, 1) of every work, a hash of its name and the seed; a work of which at least half the
                documents stand in works of higher draws as well has the highest of these draws
    held out    works whose draw is below `heldout_fraction`, corrected (tasks/documents/held_out_share.py) so that each
                language and domain has its share: the next works in order of draw, until the share is met within a
                twentieth; works so long that they would miss it further stay in training
    copies      of copies within the held-out works one is held out. A document of a held-out work that a training work
                of a higher draw repeats, and a document of a training work that repeats a held-out one, are in neither
                split: `copies.parquet`

So no work is on both sides, no held-out page stands in training, and none is held out twice. Copies make a page less
likely to be held out, for then a growing corpus moves pages out of the held-out side only. A training document becomes
a held-out one only where the correction changes, and when a work of which half was copies gets new documents that are
not. In simulations of languages that grew from 300, 1,000 and 10,000 documents to 1.03 to 4 times as many, the
correction moved 0.1 to 3 training documents of a thousand (at worst 14); from 30,000 documents on, hardly any. Every
language of two or more works holds out at least one and trains on at least one. Documents of group `other` are in
neither split: `apart`, as copies are.

Price: that of finding near-duplicates; 300 bytes of memory per document.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationInfo, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.held_out_share import Shares, choose
from eclectus.tasks.documents.near_duplicates import near_duplicate_pairs
from eclectus.tasks.documents.table import read_codes, read_table, relabel
from eclectus.tasks.run import metric, notify
from eclectus.tasks.settings import SEED, Settings
from eclectus.tasks.step import step

SPLITS = np.array(["train", "heldout", "apart"])
TRAIN, HELDOUT, APART = range(3)
COPIES = "copies.parquet"
OTHER_DOMAINS = "(other domains)"
MOST_STRATA = 1000


class DuplicateSettings(Settings):
    """When two texts are near-duplicates, for the split and for the grouping."""

    duplicate_overlap: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Overlap of the texts (Jaccard of 5-character shingles) from which they are near-duplicates. The "
        "grouping looks among similar documents, the split among all, from 0.5 on.",
    )


class SplitSettings(DuplicateSettings):
    """How many documents of each language and domain are held out."""

    heldout_fraction: float = Field(
        0.05,
        gt=0,
        le=0.5,
        description="Share of the documents of each language to hold out, over its domains in proportion; "
        "near-duplicates count once, and works stay whole.",
    )
    heldout_minimum: int = Field(
        0,
        ge=0,
        description="At least this many documents of each language and domain that has five times as many, even if "
        "that is more than the share.",
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


@step(makes="documents", version=3)
def split(documents: Artifact, settings: SplitSettings, out: Draft) -> None:
    """Fills the column split, writes copies.parquet. Raises EclectusError if no document is left to train on."""
    corpus = _Corpus(documents, settings)
    shares = Shares(corpus.strata, corpus.stratum, corpus.work, corpus.is_page)
    held_W = choose(shares, corpus.draw_W, settings)
    choice = np.where(held_W[corpus.work], HELDOUT, TRAIN).astype(np.int8)
    choice[corpus.stratum < 0] = APART
    copies = corpus.without_copies(choice)
    if not (choice == TRAIN).any():
        raise EclectusError(
            f"no document is left to train on: {len(choice)} documents, {int((choice == APART).sum())} of them "
            "excluded; add documents, or lower 'language_confidence'"
        )
    relabel(documents, {"split": pa.array(SPLITS[choice])}, out)
    pq.write_table(copies, out.file(COPIES), compression="zstd")
    out.statistics = _statistics(corpus, choice, copies) | shares.statistics(choice == HELDOUT, settings)
    for name in ("train", "heldout", "apart"):
        metric("split_documents", out.statistics[name], split=name)
    for language, each in out.statistics["shares"].items():
        metric("heldout_share", each["share"], language=language)
    if out.statistics["deviations"]:
        first, *others = out.statistics["deviations"]
        more = f"; {len(others)} more in the data report" if others else ""
        notify("split", f"Held-out shares that deviate from the setting: {first}{more}.")


def draws(names: list[str], purpose: str, seed: int) -> np.ndarray:
    """A number in [0, 1) for each name [N], independent between purposes and seeds, the same in every corpus."""
    prefix = hashlib.sha256(f"{purpose} {seed} ".encode())
    words = bytearray()
    for name in names:
        digest = prefix.copy()
        digest.update(name.encode())
        words += digest.digest()[:8]
    return (np.frombuffer(bytes(words), ">u8") >> np.uint64(11)) * 2.0**-53


class _Corpus:
    """The documents as the split sees them.

    ids: pyarrow [N]. stratum: int32 [N], index into `strata` (language, domain); -1 is none. work: int32 [N].
    name_draw, draw_W: float64 [W], by the work's name alone, and raised by its copies. pairs: int64 [P, 2], rows of
    near-duplicates. is_page: bool [N], one document of each page.
    """

    def __init__(self, documents: Artifact, settings: SplitSettings) -> None:
        table = read_table(documents, ["document", "work"])
        works = table["work"].dictionary_encode().combine_chunks()
        self.ids = table["document"]
        self.work = works.indices.to_numpy().astype(np.int32)
        self.strata, self.stratum = _strata(documents)
        self.name_draw = draws(works.dictionary.to_pylist(), "split", settings.seed)
        ids = np.array(self.ids.to_pylist(), "S32")
        # Within a work the ids decide, not the order of reading.
        self._rank = np.argsort(np.lexsort((ids, self.name_draw[self.work]))) if len(ids) else np.empty(0, np.int64)
        rank = np.where(self.stratum < 0, -1, self._rank)
        self.pairs, self.overlaps = near_duplicate_pairs(documents, rank, settings.duplicate_overlap)
        self.is_page = (self.stratum >= 0) & ~self._repeats(np.ones(len(self.work), bool))
        self.draw_W = self._raised_draws()

    def _repeats(self, among: np.ndarray) -> np.ndarray:
        """Which of these documents [N] near-duplicate one of higher rank that does not: greedy from the top."""
        repeats = np.zeros(len(self.work), bool)
        pairs = self.pairs[among[self.pairs].all(axis=1)]
        low_high = np.take_along_axis(pairs, np.argsort(self._rank[pairs], axis=1), axis=1)
        for low, high in low_high[np.argsort(-self._rank[low_high[:, 0]], kind="stable")].tolist():
            repeats[low] |= not repeats[high]
        return repeats

    def _raised_draws(self) -> np.ndarray:
        """The draw of each work [W]: its own, or what half its documents reach by their copies' works."""
        reach = self.name_draw[self.work]
        for one, other in ((0, 1), (1, 0)):
            np.maximum.at(reach, self.pairs[:, one], self.name_draw[self.work[self.pairs[:, other]]])
        order = np.lexsort((reach, self.work))
        sizes = np.bincount(self.work, minlength=len(self.name_draw))
        return reach[order][np.cumsum(sizes) - sizes + sizes // 2] if len(order) else self.name_draw

    def without_copies(self, choice: np.ndarray) -> pa.Table:
        """Excludes copies in `choice` [N] (changed in place); returns them: document, copy_of, overlap."""
        held, copy_of = choice == HELDOUT, np.full(len(choice), -1)
        overlap = np.zeros(len(choice))
        both_ways = np.concatenate([self.pairs, self.pairs[:, ::-1]])
        overlaps = np.concatenate([self.overlaps, self.overlaps])

        def exclude(which: np.ndarray) -> None:
            rows, others = both_ways[which].T
            copy_of[rows], overlap[rows] = others, overlaps[which]
            choice[rows] = APART

        one, other = both_ways.T
        train_above = self.name_draw[self.work[other]] > self.draw_W[self.work[one]]
        exclude(held[one] & (choice[other] == TRAIN) & train_above)
        held = choice == HELDOUT
        repeats = self._repeats(held)
        exclude(repeats[one] & held[other] & ~repeats[other])
        exclude((choice[one] == TRAIN) & (choice == HELDOUT)[other])
        rows = np.flatnonzero(copy_of >= 0)
        columns = {"document": self.ids.take(rows), "copy_of": self.ids.take(copy_of[rows]), "overlap": overlap[rows]}
        return pa.table(columns)


def _strata(documents: Artifact) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Names (language, domain) of the strata, sorted, and each document's [N]; -1 for documents of group other."""
    language, languages = read_codes(documents, "language")
    domain, domains = read_codes(documents, "domain")
    group, groups = read_codes(documents, "group")
    here = np.array([name != "other" for name in groups], bool)[group] if groups else np.empty(0, bool)
    stratum = np.full(len(language), -1, np.int32)
    pairs, stratum[here] = np.unique(language[here] * max(len(domains), 1) + domain[here], return_inverse=True)
    return [(languages[pair // len(domains)], domains[pair % len(domains)]) for pair in pairs.tolist()], stratum


def _statistics(corpus: _Corpus, choice: np.ndarray, copies: pa.Table) -> dict[str, Any]:
    """Counts by split and stratum; of very many domains the largest, and the others together."""
    table: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    counts = np.zeros((len(corpus.strata), len(SPLITS)), np.int64)
    inside = corpus.stratum >= 0
    np.add.at(counts, (corpus.stratum[inside], choice[inside]), 1)
    shown = set(np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_STRATA].tolist())
    for number, ((language, domain), each) in enumerate(zip(corpus.strata, counts.tolist(), strict=True)):
        here = table[language].setdefault(domain if number in shown else OTHER_DOMAINS, {"train": 0, "heldout": 0})
        here["train"] += each[TRAIN]
        here["heldout"] += each[HELDOUT]
    return {str(name): int((choice == i).sum()) for i, name in enumerate(SPLITS)} | {
        "by_language": dict(table),
        "without_heldout": [
            language for language, domains in table.items() if not any(each["heldout"] for each in domains.values())
        ],
        "pages": int(corpus.is_page.sum()),
        "near_duplicates": int((inside & ~corpus.is_page).sum()),
        "works": len(np.unique(corpus.work[inside])),
        "works_heldout": len(np.unique(corpus.work[choice == HELDOUT])),
        "copies_excluded": len(copies),
    }
