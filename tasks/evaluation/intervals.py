"""95% intervals and p-values of a change measured on few, uneven works and in one or several trainings.

The unit is the work: pieces of one book are not independent, and a bootstrap over pieces covers far too little. Given
the linearised statistic (a sum over works of influences d_w, which sum to 0) and each work's share s_w of the text:

    variance over works      sum of d_w^2 / (1 - 2 s_w + sum of s^2), unbiased if works differ and s is fixed (CR2)
    its degrees of freedom   Satterthwaite's under the same model, between 1 and works - 1 (Bell and McCaffrey 2002);
                             a single large work among small ones leaves little more than 1
    over strata              held-out works are drawn language by language and domain by domain, so that what differs
                             between these is no chance: variances within strata add up
    over trainings           variance of the M trainings' values / M, with M - 1 degrees of freedom
    both                     the distances of the ends from the value, each with its own t, add as squares (MOVER: Zou
                             and Donner 2008): few trainings count as few. What a training does to single works is in
                             both terms, so that the interval is rather too wide than too narrow

Over works the interval is Student's. On the side of the longer tail it is wider by the factor by which Hall's
transformation (1992) widens a normal interval for the skewness of the influences. p is the level at which an end of the
interval touches 0. Coverage, simulated: tests/tasks/evaluation/test_intervals.py. Cost: linear in works and trainings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05
# Samples show less skewness than their population has; with this factor few works of skewed effects are covered too.
SKEWNESS_FACTOR = 1.5
# Standard error of equal numbers: far above rounding, far below anything that matters.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over trainings and what its interval is made of: arrays [...].

    error, freedom, skewness: standard error over works, its degrees of freedom, skewness of the value over works.
    between: standard error over trainings, with trainings - 1 degrees of freedom.
    """

    value: np.ndarray
    error: np.ndarray
    freedom: np.ndarray
    skewness: np.ndarray
    between: np.ndarray
    trainings: int

    def interval(self, alpha: float | np.ndarray = ALPHA) -> tuple[np.ndarray, np.ndarray]:
        """(low, high): the ends at level 1 - alpha."""
        from scipy.special import ndtri, stdtrit

        t, normal = -stdtrit(self.freedom, alpha / 2), -ndtri(alpha / 2)
        down = self.error * t * np.maximum(1, _undo_hall(normal, self.skewness) / normal)
        up = self.error * t * np.maximum(1, _undo_hall(-normal, self.skewness) / -normal)
        across = self.between * -stdtrit(self.trainings - 1, alpha / 2) if self.trainings > 1 else 0.0
        return self.value - np.hypot(down, across), self.value + np.hypot(up, across)

    def p(self) -> np.ndarray:
        """Two-sided p of "the value is 0", by bisection; at least e^-36."""
        smallest, largest = np.full_like(self.value, -36.0), np.full_like(self.value, -1e-9)
        for _ in range(45):
            middle = (smallest + largest) / 2
            low, high = self.interval(np.exp(middle))
            holds = (low <= 0) & (high >= 0)
            smallest, largest = np.where(holds, middle, smallest), np.where(holds, largest, middle)
        return np.exp(largest)


def estimate(
    values: np.ndarray, influences: np.ndarray, shares: np.ndarray, strata: np.ndarray | None = None
) -> Estimate:
    """The mean of a statistic over trainings, for its interval over works and trainings.

    values [..., M]: the statistic of each training. influences [..., M, W]: of each work on it, their sum is 0.
    shares [..., W]: of each work in the text, summing to 1. strata [W]: the stratum of each work (`strata_of`), None
    for one. Every stratum must have at least 2 works.
    """
    trainings = values.shape[-1]
    if strata is None:
        strata = np.zeros(shares.shape[-1], int)
    variance, freedom, third = _over_strata(influences.mean(-2), shares, strata)
    error = np.sqrt(variance + ROUNDING**2)
    between = values.std(-1, ddof=1) / trainings**0.5 if trainings > 1 else np.zeros_like(error)
    return Estimate(values.mean(-1), error, freedom, SKEWNESS_FACTOR * third / error**3, between, trainings)


def strata_of(languages: Sequence[str], domains: Sequence[str]) -> np.ndarray:
    """The stratum [W] of each work: its language and domain; those of one work are joined, in their language first."""
    labels: list[tuple[str, ...]] = list(zip(languages, domains, strict=True))
    for level in (1, 0):
        counts = Counter(labels)
        labels = [label if counts[label] > 1 else label[:level] for label in labels]
        counts = Counter(labels)
        for at, label in enumerate(labels):
            near = [other for other in counts if other != label and other[:level] == label[:level]]
            if counts[label] == 1 and near:
                labels[at] = min(near, key=lambda other: (counts[other], other))
    return np.unique([repr(label) for label in labels], return_inverse=True)[1]


def holm(p_values: Sequence[float | None]) -> list[bool]:
    """Which of several comparisons are significant together at 5% (Holm 1979); None is a comparison without p."""
    known = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    significant = [False] * len(p_values)
    for number, (p, at) in enumerate(known):
        if p * (len(known) - number) >= ALPHA:
            break
        significant[at] = True
    return significant


def _over_strata(
    influences: np.ndarray, shares: np.ndarray, strata: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_over_works`, with the works of each stratum about its own mean; degrees of freedom under the same model."""
    sums = np.zeros((4, *shares.shape[:-1]))
    for stratum in np.unique(strata):
        own = strata == stratum
        part = shares[..., own] / shares[..., own].sum(-1, keepdims=True)
        about = influences[..., own] - influences[..., own].sum(-1, keepdims=True) * part
        variance, freedom, third = _over_works(about, part)
        weight = (shares[..., own] ** 2).sum(-1)
        sums += variance, third, weight, weight**2 / freedom
    return sums[0], sums[2] ** 2 / sums[3], sums[1]


def _over_works(influences: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(variance, degrees of freedom, third central moment) [...] of a sum of influences [..., W]."""
    squares = (shares**2).sum(-1)
    left = 1 - 2 * shares + squares[..., None]
    variance = (influences**2 / left).sum(-1)
    third = (influences**3 / left**1.5).sum(-1)
    # The variance is a quadratic form in the works' effects, of matrix B_ij = sqrt(a_i a_j) ([i = j] - s_i - s_j +
    # squares) with a = s^2 / left and trace `squares`. The sum of B's squares needs no matrix. The largest work, whose
    # `a` may exceed the others' by orders of magnitude, is summed apart so that no digits are lost.
    a, top = shares**2 / left, shares.argmax(-1)[..., None]
    largest, share = np.take_along_axis(a, top, -1)[..., 0], np.take_along_axis(shares, top, -1)
    np.put_along_axis(a, top, 0.0, -1)
    zeroth, first, second = a.sum(-1), (a * shares).sum(-1), (a * shares**2).sum(-1)
    others = squares**2 * zeroth**2 + 2 * second * zeroth + 2 * first**2 - 4 * squares * zeroth * first
    others -= (a**2 * (squares[..., None] - 2 * shares) ** 2).sum(-1)
    others += 2 * largest * (a * (squares[..., None] - share - shares) ** 2).sum(-1)
    freedom = squares**2 / ((shares**4).sum(-1) + others)
    return variance, np.clip(freedom, 1, shares.shape[-1] - 1), third


def _undo_hall(value: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    """The t statistic t of Hall's monotone cubic, value = t + k/3 t^2 + k^2/27 t^3 + k/6 with k the skewness."""
    third = np.where(np.abs(skewness) < 1e-9, 1e-9, skewness) / 3
    return (np.cbrt(1 + 3 * third * (value - third / 2)) - 1) / third
