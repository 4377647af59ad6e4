"""Which cells of a table are coloured: significance over all comparisons of the table, not cell by cell.

Of 20 comparisons without any difference one comes out at 5% by chance. Holm's procedure over the table keeps the chance
of any wrong colour below 5%.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from eclectus.tasks.evaluation.changes import Change
from eclectus.tasks.evaluation.intervals import holm

Key = TypeVar("Key")


class Tested(Protocol):
    """A comparison with a p value; None if it has none."""

    @property
    def p(self) -> float | None: ...


def significant(found: Mapping[Key, Tested | None]) -> dict[Key, bool]:
    """Which comparisons of one table are significant together; None is a cell without a comparison."""
    together = holm([each.p if each else None for each in found.values()])
    return dict(zip(found, together, strict=True))


def tones(changes: Mapping[Key, Change | None]) -> dict[Key, str]:
    """Cells of a table of changes of bits: good, bad, even where not significant, empty without a comparison."""
    clear = significant(changes)
    return {key: "" if change is None else tone(change) if clear[key] else "even" for key, change in changes.items()}


def tone(change: Change) -> str:
    """A comparison that stands alone: good, bad, or even where the interval holds 0."""
    return "even" if not change.clear else "good" if change.bits < 0 else "bad"


def colour_note(found: Iterable[Tested | None], what: str = "change") -> str:
    """The legend of a table whose cells `significant` or `tones` marked."""
    compared = sum(each is not None and each.p is not None for each in found)
    return f"Coloured: the {what} is significant at 5% by Holm over {compared} comparison{'s' * (compared != 1)}."


def coverage(changes: Iterable[Change | None]) -> str:
    """What the intervals of several comparisons cover, in words."""
    trainings = sorted({each.trainings for each in changes if each})
    several = [str(number) for number in trainings if number > 1]
    if not several:
        return "on these documents, one training"
    words = f"over works and {' or '.join(several)} trainings"
    return f"{words}; of models trained once: on these documents, one training" if 1 in trainings else words
