"""Intervals of `lory_claims.py`: changes of perplexity over the works of the held-out text and the seeds together.

A change is a contrast of models of the same seed on the same documents: log2 of the perplexity is bits per token, so
the change of two models is the sum over works of a difference of bits, divided by the tokens; the change of a change
(does similarity batching raise Lory's gain?) has four terms. Documents of which over SEEN of the passages stand in the
training text are left out. What the interval means: eclectus/tasks/evaluation/intervals.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.evaluation.intervals import estimate, strata_of

SEEN = 0.1
TERMS = list[tuple[int, tuple[str, str, str]]]


class Documents:
    """The reported documents: rows of the held-out file, their work, and those that were hardly seen in training."""

    def __init__(self, data: Path, vocabulary: int, part: np.ndarray) -> None:
        """part: of each document, as `lory_claims_data.held_out` gives it."""
        with np.load(data / f"v{vocabulary}.npz") as file:
            work, seen, domain = file["held_work"], np.nan_to_num(file["held_seen"]), file["held_domain"]
        self.rows = np.flatnonzero((part == 0) & (seen <= SEEN))
        self.seen = np.flatnonzero((part == 0) & (seen > SEEN))
        _, first, self.work = np.unique(work[self.rows], return_index=True, return_inverse=True)
        self.works = len(first)
        domains = domain[self.rows][first].astype(str).tolist()
        self.strata = strata_of(["en"] * self.works, domains)


def contrast(runs: Any, terms: TERMS, documents: Documents) -> dict[str, Any] | None:
    """The change of the perplexity in percent, its 95% interval and p, over the seeds that have all models.

    terms: (sign, key of runs); a change is [(1, model), (-1, twin)]. None if no seed has all.
    """
    seeds = set.intersection(*({*runs.get(key, {})} for _, key in terms))
    if not seeds:
        return None
    bits, tokens = [], None
    for seed in sorted(seeds):
        total = 0.0
        for sign, key in terms:
            scored = runs[key][seed]["scores"]["by_document"]
            tokens = np.bincount(documents.work, np.array(scored["tokens"])[documents.rows])
            total = total + sign * np.bincount(documents.work, np.array(scored["bits"])[documents.rows])
        bits.append(total)
    assert tokens is not None
    shares = tokens / tokens.sum()
    each = np.array(bits) / tokens.sum()
    values = each.sum(1)
    found = estimate(values, each - values[:, None] * shares, shares, documents.strata)
    low, high = found.interval()
    return {
        "percent": percent(found.value),
        "low": percent(low),
        "high": percent(high),
        "p": float(found.p()),
        "seeds": len(seeds),
        "by_seed": [percent(value) for value in values],
    }


def percent(bits_per_token: Any) -> float:
    return float(100 * (2**bits_per_token - 1))


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['percent']:+.1f}% ({found['low']:+.1f} to {found['high']:+.1f})"
