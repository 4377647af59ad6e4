"""Intervals of `lpr_claims.py`: bits per byte of one model over another's, over works of held-out text and seeds.

A language's bits per byte is a ratio of sums over documents; several languages count equally. Of the documents, those
of which over SEEN of the 50-byte passages stand in the training text are left out. With a base of its own under every
seed, the interval covers bases too. What it means: eclectus/tasks/evaluation/intervals.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lpr_data import Mixture, read_documents

from eclectus.tasks.evaluation.intervals import estimate, strata_of
from eclectus.tasks.evaluation.passages import seen_share

SEEN = 0.1


@dataclass(frozen=True)
class Ratio:
    """Bits per byte of a model over another's, its 95% interval and its values by seed; -0.05 is 5% less."""

    value: float
    low: float
    high: float
    by_seed: list[float]


class HeldOut:
    """The reported documents: their languages and works, and those that were hardly seen in training."""

    def __init__(self, packed: Path, mixture: Mixture, part: str = "held") -> None:
        """Looks for the documents' passages in the training text once, and keeps the result beside the text."""
        file = np.load(packed / f"{part}.npz")
        kept = packed / f"{part}-seen.npy"
        if not kept.exists():
            trained = (each["text"] for each in read_documents(mixture) if each["split"] == "train")
            np.save(kept, np.nan_to_num(seen_share(file["text"].tolist(), trained)))
        self.seen = np.load(kept)
        self.languages, self._language = file["streams"].tolist(), file["language"]
        self._work, self._unseen = file["work"], self.seen <= SEEN

    def counts(self) -> list[str]:
        """Documents and works by language, in words, of those that are reported."""
        found = []
        for number, language in enumerate(self.languages):
            own = (self._language == number) & self._unseen
            works, left_out = len(np.unique(self._work[own])), int((self._language == number).sum() - own.sum())
            found.append(f"{language} {own.sum()} documents of {works} works ({left_out} left out)")
        return found

    def ratio(self, before: Sequence[Any], after: Sequence[Any], languages: Sequence[str]) -> Ratio:
        """Mean bits per byte over these languages, `after` over `before`: results of the same seeds, pair by pair."""
        values, influences, shares = [], [], None
        works = np.unique(self._work)
        for one, two in zip(before, after, strict=True):
            rates, parts = [0.0, 0.0], [np.zeros(len(works)), np.zeros(len(works))]
            shares = np.zeros(len(works))
            for language in languages:
                own = (self._language == self.languages.index(language)) & self._unseen
                row = np.searchsorted(works, self._work[own])
                for at, result in enumerate((one, two)):
                    scored = result["documents"]["held"]
                    bits, size = (
                        np.bincount(row, np.array(scored[name])[own], len(works)) for name in ("bits", "bytes")
                    )
                    rate = bits.sum() / size.sum()
                    rates[at] += rate / len(languages)
                    parts[at] += (bits - rate * size) / size.sum() / len(languages)
                shares += size / size.sum() / len(languages)
            values.append(np.log(rates[1] / rates[0]))
            influences.append(parts[1] / rates[1] - parts[0] / rates[0])
        assert shares is not None
        read = shares > 0
        language = self._language[np.unique(self._work, return_index=True)[1]][read].astype(str).tolist()
        strata = strata_of(language, language)
        found = estimate(np.array(values), np.array(influences)[:, read], shares[read], strata)
        low, high = found.interval()
        ends = (float(np.expm1(each)) for each in (found.value, low, high))
        return Ratio(*ends, [float(np.expm1(value)) for value in values])
