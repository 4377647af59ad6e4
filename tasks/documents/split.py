"""Split: which documents are held out, decided work by work before any training.

    page        documents whose texts nearly repeat each other (tasks/documents/near_duplicates) count as one page;
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

The pairs of near-duplicates stand in `near_duplicates.parquet`, for the grouping. Price: 35 CPU seconds for a million
documents of 450 characters, nearly all of it for near-duplicates, and a third of that where 1% is new; 40 bytes of
memory per document and per pair.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationInfo, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.compiled import compiled
from eclectus.tasks.disk_matrix import PartMatrix
from eclectus.tasks.documents.held_out_share import Shares, choose
from eclectus.tasks.documents.near_duplicates import read_pairs, write_near_duplicates
from eclectus.tasks.documents.table import (
    NEAR_DUPLICATES,
    codes_of,
    first_rows,
    ids_of,
    parts,
    read_part_table,
    read_rows,
    relabel,
)
from eclectus.tasks.over_parts import Part, key_of, over_parts
from eclectus.tasks.run import metric, notify
from eclectus.tasks.settings import SEED, CurationWorkerSettings
from eclectus.tasks.step import step

SPLITS = ("train", "heldout", "apart")
TRAIN, HELDOUT, APART = range(3)
COPIES = "copies.parquet"
IDS, WORKS = "ids.npy", "works.npy"
SECONDS_DRAW = 2e-6
OTHER_DOMAINS = "(other domains)"
MOST_STRATA = 1000


class DuplicateSettings(CurationWorkerSettings):
    """When two texts are near-duplicates, for the split and for the grouping."""

    duplicate_overlap: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Overlap of the texts (Jaccard of 5-character shingles) from which they are near-duplicates, for "
        "the split and for the grouping; below 0.5 it acts as 0.5.",
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


@step(makes="documents", version=4)
def split(documents: Artifact, settings: SplitSettings, out: Draft) -> None:
    """Fills the column split, writes copies.parquet and near_duplicates.parquet (row, other, overlap).

    Raises EclectusError if no document is left to train on.
    """
    corpus = _Corpus.read(documents, settings)
    rank = np.where(corpus.stratum < 0, -1, corpus.rank)
    near = out.file(NEAR_DUPLICATES)
    compared = write_near_duplicates(documents, rank, settings.duplicate_overlap, near, settings.curation_workers)
    del rank
    pages = _Pages(corpus, near)
    shares = Shares(corpus.strata, corpus.stratum, corpus.work, pages.is_page)
    held_W = choose(shares, pages.draw_W, settings)
    choice = np.where(held_W[corpus.work], np.int8(HELDOUT), np.int8(TRAIN))
    choice[corpus.stratum < 0] = APART
    copies = pages.exclude_copies(choice)
    if not (choice == TRAIN).any():
        raise EclectusError(
            f"no document is left to train on: {len(choice)} documents, {int((choice == APART).sum())} of them "
            "excluded; add documents, or lower 'language_confidence'"
        )
    relabel(documents, lambda _, begin, end: {"split": pa.array(SPLITS).take(pa.array(choice[begin:end]))}, out)
    _write_copies(documents, copies, out)
    out.statistics = _statistics(corpus, pages, choice) | shares.statistics(choice == HELDOUT, settings) | compared
    out.statistics["copies_excluded"] = len(copies[0])
    for name in ("train", "heldout", "apart"):
        metric("split_documents", out.statistics[name], split=name)
    for language, each in out.statistics["shares"].items():
        metric("heldout_share", each["share"], language=language)
    if out.statistics["deviations"]:
        first, *others = out.statistics["deviations"]
        more = f"; {len(others)} more in the data report" if others else ""
        notify("split", f"Held-out shares that deviate from the setting: {first}{more}.")


def hashes_of(names: list[str], purpose: str, seed: int) -> np.ndarray:
    """16 bytes of a hash of each name [N] with the purpose and the seed: uint64 [N, 2]."""
    prefix = hashlib.sha256(f"{purpose} {seed} ".encode())
    words = bytearray()
    for name in names:
        digest = prefix.copy()
        digest.update(name.encode())
        words += digest.digest()[:16]
    return np.frombuffer(bytes(words), ">u8").astype(np.uint64).reshape(-1, 2)


def draws(names: list[str], purpose: str, seed: int) -> np.ndarray:
    """A number in [0, 1) for each name [N], independent between purposes and seeds, the same in every corpus."""
    return _as_draws(hashes_of(names, purpose, seed)[:, 0])


def _as_draws(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53


def _write_copies(documents: Artifact, copies: tuple[np.ndarray, np.ndarray, np.ndarray], out: Draft) -> None:
    """The excluded copies: document, copy_of, overlap. copies: rows, ascending, those they copy, and overlaps."""
    rows, originals, overlaps = copies
    ids = read_rows(documents, np.concatenate([rows, originals]), ["document"])["document"]
    columns = {"document": ids[: len(rows)], "copy_of": ids[len(rows) :], "overlap": overlaps}
    pq.write_table(pa.table(columns), out.file(COPIES), compression="zstd")


@dataclass
class _Corpus:
    """The documents as the split sees them.

    firsts: the first row of each part, and the number of all. strata: (language, domain) [S]. stratum: int32 [N], index
    into `strata`; -1 is none. work: int32 [N], numbered in the order of the documents. draw_W: float64 [W], by the
    work's name. rank: int32 [N], distinct, the highest draw is the highest.
    """

    firsts: np.ndarray
    strata: list[tuple[str, str]]
    stratum: np.ndarray
    work: np.ndarray
    draw_W: np.ndarray
    rank: np.ndarray

    @classmethod
    def read(cls, documents: Artifact, settings: SplitSettings) -> _Corpus:
        digests, paths = documents.digests(), parts(documents)
        work = [
            Part(
                key_of("works 1", digests[f"documents/{path.name}"], settings.seed),
                {"part": path, "seed": settings.seed},
                pq.read_metadata(path).num_rows,
                f"works of {path.name}",
            )
            for path in paths
        ]
        done = over_parts(draw_works, work, "drawing works", seconds=SECONDS_DRAW, workers=settings.curation_workers)
        strata, stratum = _strata(paths)
        works, draw_W = _numbered([each.file(WORKS) for each in done])
        rank = _ranks(draw_W[works], [each.file(IDS) for each in done])
        return cls(first_rows(documents), strata, stratum, works, draw_W, rank)


class _Pages:
    """What near-duplicates mean for the split.

    pairs: the file of the pairs. is_page: bool [N], one document of each page. draw_W: raised by copies.
    """

    def __init__(self, corpus: _Corpus, pairs: Path) -> None:
        self._corpus, self._pairs = corpus, pairs
        self.is_page = (corpus.stratum >= 0) & ~self._repeats(np.ones(len(corpus.work), bool))
        self.draw_W = self._raised_draws()

    def _repeats(self, among: np.ndarray) -> np.ndarray:
        """Which of these documents [N] near-duplicate one of higher rank that does not: greedy from the top."""
        rank, found = self._corpus.rank, [np.empty((0, 2), np.int32)]
        for one, other, _ in read_pairs(self._pairs):
            here = among[one] & among[other]
            pairs = np.stack([one[here], other[here]], axis=1).astype(np.int32)
            falling = rank[pairs[:, 0]] > rank[pairs[:, 1]]
            found.append(np.where(falling[:, None], pairs[:, ::-1], pairs))
        low_high = np.concatenate(found)
        order = np.argsort(-rank[low_high[:, 0]].astype(np.int64), kind="stable")
        return _greedy(low_high, order, np.zeros(len(rank), bool))

    def _raised_draws(self) -> np.ndarray:
        """The draw of each work [W]: its own, or what half its documents reach by their copies' works."""
        work, draw_W = self._corpus.work, self._corpus.draw_W
        reach = draw_W[work]
        for one, other, _ in read_pairs(self._pairs):
            np.maximum.at(reach, one, draw_W[work[other]])
            np.maximum.at(reach, other, draw_W[work[one]])
        sizes = np.bincount(work, minlength=len(draw_W)).astype(np.int32)
        raised = np.empty_like(draw_W)
        # Right for works of one document, which are most.
        raised[work] = reach
        several = sizes > 1
        rows = np.flatnonzero(several[work])
        order = rows[np.lexsort((reach[rows], work[rows]))]
        middle = np.cumsum(sizes[several]) - sizes[several] + sizes[several] // 2
        raised[several] = reach[order][middle]
        return raised

    def exclude_copies(self, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Excludes copies in `choice` [N] (changed in place). Returns their rows, ascending, the row of which each is a
        copy, and the overlaps."""
        work, draw_W = self._corpus.work, self._corpus.draw_W
        excluded = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]

        def exclude(which: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
            """which: of pairs of rows (one, other), in which one is excluded."""
            found = []
            for swapped in (False, True):
                for pair_one, pair_other, overlaps in read_pairs(self._pairs):
                    one, other = (pair_other, pair_one) if swapped else (pair_one, pair_other)
                    here = np.flatnonzero(which(one, other))
                    found.append((one[here], other[here], overlaps[here]))
            for one, _, _ in found:
                choice[one] = APART
            excluded.extend(found)

        def repeats_training(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            above = draw_W[work[other]] > self.draw_W[work[one]]
            return (choice[one] == HELDOUT) & (choice[other] == TRAIN) & above

        exclude(repeats_training)
        held = choice == HELDOUT
        repeats = self._repeats(held)
        exclude(lambda one, other: repeats[one] & held[other] & ~repeats[other])
        exclude(lambda one, other: (choice[one] == TRAIN) & (choice[other] == HELDOUT))
        rows, copy_of, overlaps = (np.concatenate(each)[::-1] for each in zip(*excluded, strict=True))
        # Of several pairs of a document the last counts.
        rows, last = np.unique(rows, return_index=True)
        return rows, copy_of[last], overlaps[last]


def draw_works(out: Path, part: Path, seed: int) -> dict[str, Any]:
    """Writes ids.npy, S16 [n], and works.npy, uint64 [n, 2]: 16 bytes of a hash of each document's work and the seed,
    of which the first 8 are its draw."""
    table = read_part_table(part, ["document", "work"])
    works = table["work"].dictionary_encode().combine_chunks()
    hashes = hashes_of(works.dictionary.to_pylist(), "split", seed)
    np.save(out / WORKS, hashes[works.indices.to_numpy()])
    np.save(out / IDS, ids_of(table["document"]))
    return {"documents": len(table)}


def _numbered(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The works' numbers in the order of the documents, int32 [N], and the draw of each work, float64 [W].

    files: works.npy of each part.
    """
    high, low = (np.concatenate([np.empty(0, np.uint64), *(np.load(each)[:, i] for each in files)]) for i in (0, 1))
    order = np.argsort(high, kind="stable")
    if (low[order[1:]] != low[order[:-1]])[high[order[1:]] == high[order[:-1]]].any():
        order = np.lexsort((low, high))
    new = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    new = np.concatenate([[True], new])[: len(order)]
    del low
    first = order[new]
    group = np.cumsum(new, dtype=np.int32) - 1
    number = np.empty(len(first), np.int32)
    by_row = np.argsort(first)
    number[by_row] = np.arange(len(first), dtype=np.int32)
    work = np.empty(len(order), np.int32)
    work[order] = number[group]
    return work, _as_draws(high[first[by_row]])


def _ranks(draw: np.ndarray, files: list[Path]) -> np.ndarray:
    """The rank of each document by its work's draw [N] and within a work by its id, not by the order of reading.

    files: ids.npy of each part.
    """
    order = np.argsort(draw, kind="stable")
    same = np.concatenate([[False], draw[order[1:]] == draw[order[:-1]], [False]])
    places = np.flatnonzero(same[1:] | same[:-1])[: len(order)]
    if len(places):
        tied = np.sort(order[places])
        ids = np.ascontiguousarray(PartMatrix(files)[tied]).view(">u8").astype(np.uint64)
        order[places] = tied[np.lexsort((ids[1::2], ids[::2], draw[tied]))]
    rank = np.empty(len(draw), np.int32 if len(draw) < 2**31 else np.int64)
    rank[order] = np.arange(len(draw), dtype=rank.dtype)
    return rank


@compiled
def _greedy(low_high: np.ndarray, order: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """Marks the lower document of each pair, in this order, unless the higher one is marked."""
    for number in order:
        if not repeats[low_high[number, 1]]:
            repeats[low_high[number, 0]] = True
    return repeats


def _strata(paths: list[Path]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Names (language, domain) of the strata, sorted, and each document's [N]; -1 for documents of group other."""
    numbers: dict[tuple[str, str], int] = {}
    found = [np.empty(0, np.int32)]
    names = ["language", "domain", "group"]
    for path in paths:
        table = read_part_table(path, names, names)
        (language, languages), (domain, domains), (group, groups) = (codes_of(table[name]) for name in names)
        here = np.array([name != "other" for name in groups], bool)[group]
        stratum = np.full(len(language), -1, np.int32)
        pairs, inverse = np.unique(language[here] * len(domains) + domain[here], return_inverse=True)
        named = [(languages[pair // len(domains)], domains[pair % len(domains)]) for pair in pairs.tolist()]
        stratum[here] = np.array([numbers.setdefault(each, len(numbers)) for each in named], np.int32)[inverse]
        found.append(stratum)
    strata = sorted(numbers)
    places = np.empty(len(strata) + 1, np.int32)
    places[[numbers[each] for each in strata]] = np.arange(len(strata))
    places[-1] = -1
    return strata, places[np.concatenate(found)]


def _statistics(corpus: _Corpus, pages: _Pages, choice: np.ndarray) -> dict[str, Any]:
    """Counts by split and stratum; of very many domains the largest, and the others together."""
    table: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    counts = np.zeros((len(corpus.strata), len(SPLITS)), np.int64)
    inside = corpus.stratum >= 0
    codes = corpus.stratum[inside].astype(np.int64) * len(SPLITS) + choice[inside]
    counts += np.bincount(codes, minlength=counts.size).reshape(counts.shape)
    shown = set(np.argsort(-counts.sum(axis=1), kind="stable")[:MOST_STRATA].tolist())
    for number, ((language, domain), each) in enumerate(zip(corpus.strata, counts.tolist(), strict=True)):
        here = table[language].setdefault(domain if number in shown else OTHER_DOMAINS, {"train": 0, "heldout": 0})
        here["train"] += each[TRAIN]
        here["heldout"] += each[HELDOUT]
    return {name: int((choice == i).sum()) for i, name in enumerate(SPLITS)} | {
        "by_language": dict(table),
        "without_heldout": [
            language for language, domains in table.items() if not any(each["heldout"] for each in domains.values())
        ],
        "pages": int(pages.is_page.sum()),
        "near_duplicates": int((inside & ~pages.is_page).sum()),
        "works": _distinct(corpus.work[inside]),
        "works_heldout": _distinct(corpus.work[choice == HELDOUT]),
    }


def _distinct(numbers: np.ndarray) -> int:
    return int((np.bincount(numbers) > 0).sum())
