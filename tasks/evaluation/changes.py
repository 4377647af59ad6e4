"""The change from one model to another on the documents that both scored, with an interval that says what it covers.

Pairs cancel out what both models share: the difficulty of a text, and for several trainings the seed, which gives the
order of the data and the base. The interval is over works (pieces of one work stay together) and, when both models were
trained several times, over trainings: tasks/evaluation/intervals.py. With one training it says nothing about another
training of the same method, and with one work there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from eclectus.tasks.evaluation.intervals import ALPHA, estimate, strata_of
from eclectus.tasks.evaluation.scores import Scores

Interval = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """Relative changes from one model to another on the same documents (-0.05 is 5% less), with 95% intervals.

    before, after: bits per byte, the mean over trainings. bits: change of bits per byte. p: two-sided, of no change.
    perplexity: change of perplexity per token; None if the two models did not score the same tokens.
    Intervals and p are None if all documents are of one work.
    trainings: pairs of trainings. spread: standard deviation of `bits` between them; None for one. single: name of the
    model that has one training while the other has several.
    """

    before: float
    after: float
    bits: float
    bits_interval: Interval | None
    perplexity: float | None
    perplexity_interval: Interval | None
    p: float | None
    documents: int
    works: int
    trainings: int = 1
    spread: float | None = None
    single: str = ""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.p is not None and self.p < ALPHA

    @property
    def of_method(self) -> bool:
        """Whether both models were trained several times, so that the change is one of methods."""
        return self.trainings > 1 and not self.single

    @property
    def covers(self) -> str:
        """What the interval covers, in words."""
        if self.trainings == 1:
            return "on these documents, one training"
        single = f" (one of {self.single})" if self.single else ""
        return f"over {self.works} works and {self.trainings} trainings{single}"

    @property
    def retention(self) -> float:
        """Bits per byte of the first model over the second's; 1 is nothing forgotten (docs/methods.md 2.5)."""
        return 1 / (1 + self.bits)

    @property
    def retention_interval(self) -> Interval | None:
        if self.bits_interval is None:
            return None
        low, high = self.bits_interval
        return 1 / (1 + high), 1 / (1 + low)

    @property
    def gain(self) -> float:
        """Part of the first model's bits that the second saves."""
        return -self.bits

    @property
    def gain_interval(self) -> Interval | None:
        if self.bits_interval is None:
            return None
        low, high = self.bits_interval
        return -high, -low


def compare(before: Scores, after: Scores, **labels: str) -> Change | None:
    """The change from one model to another over the documents with these labels that both scored; None if none.

    Models with repeats are compared training by training: those of one seed are a pair. A model without repeats, as a
    given base, stands in every pair.
    """
    pairs, single = _pairs(before, after)
    common = reduce(np.intersect1d, [each.document for pair in pairs for each in pair])
    common = common[before.where(**labels)[before.rows(common)]]
    if not len(common):
        return None
    works, work = np.unique(before.works[before.rows(common)], return_inverse=True)
    sums, same = [], True
    for pair in pairs:
        rows = [each.rows(common) for each in pair]
        one, two = ([each.bits[row], each.bytes[row], each.tokens[row]] for each, row in zip(pair, rows, strict=True))
        same = same and bool((one[2] == two[2]).all())
        sums.append([np.bincount(work, column.astype(float), len(works)) for column in (*one, *two)])
    first = before.rows(common)[np.unique(work, return_index=True)[1]]
    strata = strata_of(before.language[first].tolist(), before.domain[first].tolist())
    return _change(np.array(sums), same, len(common), single, strata)


def _pairs(before: Scores, after: Scores) -> tuple[list[tuple[Scores, Scores]], str]:
    """(the trainings to compare, the model that has only one if the other has several)."""
    ones, twos = before.trainings, after.trainings
    if len(ones) == 1 or len(twos) == 1:
        single = "" if len(ones) == len(twos) else before.name if len(ones) == 1 else after.name
        return [(one, two) for one in ones.values() for two in twos.values()], single
    return [(ones[seed], twos[seed]) for seed in ones if seed in twos], ""


def _change(sums: np.ndarray, same: bool, documents: int, single: str, strata: np.ndarray) -> Change:
    """sums [M, 6, W]: bits, bytes and tokens of both models by training and work. same: whether of the same tokens.

    strata [W]: as in `estimate`.
    """
    total = sums.sum(-1)
    parts, several = sums / total[..., None], sums.shape[-1] > 1
    rates = [total[:, 0] / total[:, 1], total[:, 3] / total[:, 4]]
    values = np.log(rates[1] / rates[0])
    bits_interval = p = perplexity = perplexity_interval = None
    if several:
        influences = parts[:, 3] - parts[:, 4] - parts[:, 0] + parts[:, 1]
        found = estimate(values, influences, parts[:, 1].mean(0), strata)
        low, high = found.interval()
        bits_interval, p = (float(np.expm1(low)), float(np.expm1(high))), float(found.p())
    if same:
        costs = [total[:, 0] / total[:, 2], total[:, 3] / total[:, 5]]
        perplexity = float(2 ** (costs[1] - costs[0]).mean() - 1)
        if several:
            one, two = (
                cost[:, None] * (parts[:, at] - parts[:, at + 2]) for cost, at in zip(costs, (0, 3), strict=True)
            )
            low, high = estimate(costs[1] - costs[0], two - one, parts[:, 2].mean(0), strata).interval()
            perplexity_interval = (float(2**low - 1), float(2**high - 1))
    return Change(
        before=float(rates[0].mean()),
        after=float(rates[1].mean()),
        bits=float(np.expm1(values.mean())),
        bits_interval=bits_interval,
        perplexity=perplexity,
        perplexity_interval=perplexity_interval,
        p=p,
        documents=documents,
        works=sums.shape[-1],
        trainings=len(values),
        spread=float(values.std(ddof=1)) if len(values) > 1 else None,
        single=single,
    )
