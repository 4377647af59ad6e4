"""Which works are held out so that every language and domain has its share.

Works are taken in the order of their draws: those below the share's draw, then, where that is too little, the next;
where it is too much, the last of them go. Twice: for each domain, where the share may miss by half a document more, and
for each language, over all its domains, which evens out what domains of a few documents cannot give alone. A work
counts by its middle: none is taken that would miss the share by more than leaving it out. The tolerances keep the
works of a growing corpus where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.documents.language_codes import shortened

TOLERANCE = 0.05
DOMAIN_TOLERANCE = 0.2
SMALL = 5
HALF = 0.5
NEAR = 1.2
MOST_DEVIATIONS = 20


class ShareSettings(Protocol):
    """The settings of the split that decide on shares."""

    @property
    def heldout_fraction(self) -> float: ...

    @property
    def heldout_minimum(self) -> int: ...

    @property
    def heldout_maximum(self) -> int: ...


class Shares:
    """The pages of each work and stratum.

    strata: (language, domain) [S]. stratum, work: int [N] of each document; stratum -1 is none. is_page: bool [N].
    A work's stratum is the one with most of its pages. size: pages of each work [W]. pages: of each stratum [S].
    """

    def __init__(
        self, strata: list[tuple[str, str]], stratum: np.ndarray, work: np.ndarray, is_page: np.ndarray
    ) -> None:
        self.strata, self.stratum, self.is_page = strata, stratum, is_page
        count = int(work.max()) + 1 if len(work) else 0
        self.size = np.bincount(work[is_page], minlength=count).astype(np.int32)
        self.pages = np.bincount(stratum[is_page], minlength=len(strata))
        self.home = np.full(count, -1, np.int32)
        self.home[work[is_page]] = stratum[is_page]
        self._home_of_several(work, stratum, is_page & (self.size > 1)[work])
        self.works_in = np.bincount(self.home[self.home >= 0], minlength=len(strata))

    def _home_of_several(self, work: np.ndarray, stratum: np.ndarray, here: np.ndarray) -> None:
        """Sets the home of works of several pages. here: those pages, bool [N]."""
        codes = work[here].astype(np.int64) * max(len(self.strata), 1) + stratum[here]
        codes, pages = np.unique(codes, return_counts=True)
        # Of equal places the last is written: the stratum of most pages.
        codes = codes[np.argsort(pages, kind="stable")]
        self.home[codes // max(len(self.strata), 1)] = codes % max(len(self.strata), 1)

    def languages(self) -> dict[str, np.ndarray]:
        """Numbers of the strata of each language."""
        numbers: dict[str, list[int]] = {}
        for number, (language, _) in enumerate(self.strata):
            numbers.setdefault(language, []).append(number)
        return {language: np.array(each) for language, each in numbers.items()}

    def statistics(self, held: np.ndarray, settings: ShareSettings) -> dict[str, Any]:
        """What came out by language, and in words where a language or domain deviates, the largest deviations first.

        held: documents that are held out, bool [N].
        """
        documents_S = np.bincount(self.stratum[self.stratum >= 0], minlength=len(self.strata))
        held_S = np.bincount(self.stratum[held], minlength=len(self.strata))
        shares, deviations = {}, []
        for language, numbers in self.languages().items():
            pages, count = int(self.pages[numbers].sum()), int(held_S[numbers].sum())
            shares[language] = {
                "documents": int(documents_S[numbers].sum()),
                "pages": pages,
                "works": int(self.works_in[numbers].sum()),
                "heldout": count,
                "share": round(count / max(pages, 1), 4),
            }
            deviations.append(self._deviation(language, numbers, count, (HALF, 2 * TOLERANCE), settings))
            if len(numbers) > 1:
                for number in numbers.tolist():
                    name = f"{language} {shortened(self.strata[number][1])}"
                    one = np.array([number])
                    deviations.append(self._deviation(name, one, int(held_S[number]), (2, DOMAIN_TOLERANCE), settings))
        largest = sorted((each for each in deviations if each), key=lambda each: -each[0])
        return {"shares": shares, "deviations": [text for _, text in largest[:MOST_DEVIATIONS]]}

    def _deviation(
        self, name: str, numbers: np.ndarray, count: int, allowed: tuple[float, float], settings: ShareSettings
    ) -> tuple[float, str] | None:
        """By how many documents these strata miss the share, and in words; None if it is allowed.

        allowed: documents, and documents per document wanted.
        """
        pages = int(self.pages[numbers].sum())
        wanted = settings.heldout_fraction * pages
        missed = abs(count - wanted)
        if missed <= allowed[0] + allowed[1] * wanted:
            return None
        reason = _reason(self.pages[numbers], int(self.works_in[numbers].sum()), settings)
        share = f"{count / pages:.1%}), not {settings.heldout_fraction:.1%}"
        return missed, f"{name}: {count} of {pages:,} documents held out ({share}: {reason}"


def choose(shares: Shares, draw: np.ndarray, settings: ShareSettings) -> np.ndarray:
    """Which works are held out, bool [W]. draw: float64 [W]."""
    held = np.zeros(len(draw), bool)
    members = np.argsort(shares.home, kind="stable").astype(np.int32)
    starts = np.searchsorted(shares.home[members], np.arange(len(shares.strata) + 1))
    works_of = [members[begin:end] for begin, end in pairwise(starts)]
    target = np.minimum(settings.heldout_fraction * shares.pages, settings.heldout_maximum)
    minimum = np.where(shares.pages >= SMALL * settings.heldout_minimum, settings.heldout_minimum, 0)
    # Domains that are near a bound of their own keep what they get by themselves.
    bound = (NEAR * minimum > target) | (NEAR * target > settings.heldout_maximum)
    full = np.zeros(len(shares.strata), bool)
    for number, works in enumerate(works_of):
        wanted = draw[works] < settings.heldout_fraction
        bounds = _Bounds.of_domain(target[number], minimum[number], settings)
        held[works] = _nearest(wanted, draw[works], shares.size[works], bounds)
        full[number] = shares.size[works[held[works]]].sum() + HALF > bounds.most
    for numbers in shares.languages().values():
        works = np.concatenate([works_of[number] for number in numbers])
        total = np.maximum(target, minimum)[numbers].sum()
        at_bound = bound[shares.home[works]]
        free, fixed = works[~at_bound], works[at_bound]
        rest = total - shares.size[fixed[held[fixed]]].sum()
        # What a language lacks comes from domains that have room, if it can.
        turn = draw[free] + (~held[free] & full[shares.home[free]])
        held[free] = _nearest(held[free], turn, shares.size[free], _Bounds.of_language(rest))
        _both_sides(held, works, draw, shares.size)
    return held


@dataclass(frozen=True)
class _Bounds:
    """Pages to hold out: from `least` to `most` about a target; in any case `minimum`, and never above `maximum`."""

    least: float
    most: float
    minimum: int = 0
    maximum: float = np.inf

    @classmethod
    def of_domain(cls, target: float, minimum: int, settings: ShareSettings) -> _Bounds:
        least, most = (1 - DOMAIN_TOLERANCE) * target - HALF, (1 + DOMAIN_TOLERANCE) * target + HALF
        return cls(least, most, minimum, settings.heldout_maximum)

    @classmethod
    def of_language(cls, target: float) -> _Bounds:
        return cls((1 - TOLERANCE) * target, (1 + TOLERANCE) * target)


def _nearest(wanted: np.ndarray, draw: np.ndarray, size: np.ndarray, bounds: _Bounds) -> np.ndarray:
    """The wanted works [n], and more or fewer of them until their pages are within the bounds: bool [n]."""
    order = np.lexsort((draw, ~wanted))
    return _taken(
        order, wanted, size, max(size.sum() / 2, 1), bounds.least, bounds.most, bounds.minimum, bounds.maximum
    )


@compiled
def _taken(
    order: np.ndarray,
    wanted: np.ndarray,
    size: np.ndarray,
    longest: float,
    least: float,
    most: float,
    minimum: int,
    maximum: float,
) -> np.ndarray:
    """Works that are held out when they are offered in this order, bool [n]. longest: the longest that may be added to
    reach the minimum."""
    held, count = np.zeros(len(order), np.bool_), 0
    for each in order:
        middle, missing = count + size[each] / 2, count < minimum and size[each] <= longest
        if not wanted[each] and not missing and count + 0.5 > least:
            break
        fits = middle <= most and (wanted[each] or middle <= least)
        if (fits or missing) and count + size[each] <= maximum:
            held[each] = True
            count += size[each]
    return held


def _both_sides(held: np.ndarray, works: np.ndarray, draw: np.ndarray, size: np.ndarray) -> None:
    """Of two or more works of a language one is held out, of at most half its pages, and one trained on."""
    works = works[size[works] > 0]
    if len(works) < 2:
        held[works] = False
    elif not held[works].any():
        short = works[size[works] <= size[works].sum() / 2]
        held[short[np.argmin(draw[short])]] = True
    elif held[works].all():
        held[works[np.argmax(draw[works])]] = False


def _reason(pages: np.ndarray, works: int, settings: ShareSettings) -> str:
    """Why the share of these strata is not the setting's. pages: of each."""
    target = settings.heldout_fraction * pages
    if (NEAR * target > settings.heldout_maximum).any():
        return "at most 'heldout_maximum'"
    if ((pages >= SMALL * settings.heldout_minimum) & (target < settings.heldout_minimum)).any():
        return "at least 'heldout_minimum'"
    if works < 2:
        return "one work is on one side" if works else "all are pieces of works of other domains"
    return f"its {works:,} works stay whole" if works < pages.sum() else "it has few documents"
