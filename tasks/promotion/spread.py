"""The spread of a model's trainings, against which a rule may be written: `champion + 2 * spread`.

Two trainings that differ only in the seed differ in their scores; a rule that is tighter than that refuses or promotes
by chance. The spread is the relative standard deviation of bits per byte between trainings of the candidate's model on
the rule's text, from the first of these that is there: the trainings of this run, those at an earlier decision of the
line, the gate file's `default_spread`. Two trainings tell too little of a spread; MINIMUM are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from eclectus.tasks.evaluation.scores import Scores

MINIMUM = 3
# Of bits per byte. The same dense method with 5 seeds differed by up to 4.1% in perplexity between two trainings.
DEFAULT = 0.01


@dataclass(frozen=True)
class Spread:
    """A relative standard deviation of bits per byte, and in words where it is from."""

    relative: float
    source: str

    def of(self, measure: str, value: float) -> float:
        """In units of a measure of text (bits_per_byte, perplexity, retention, gain), near this value of it."""
        if measure == "perplexity":
            return value ** (1 + self.relative) - value
        return self.relative * (1 - value if measure == "gain" else value)


@dataclass(frozen=True)
class Spreads:
    """What is known of the spread without this run's trainings.

    earlier: by text (language, group, ...), (relative, trainings) of an earlier decision. default: if nothing is known.
    """

    earlier: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    default: float = DEFAULT

    def on(self, text: str, model: Scores, labels: dict[str, str]) -> Spread:
        """The spread on the text of these labels. text: their name, as in `earlier`."""
        measured = measure_spread(model, labels)
        if measured:
            return Spread(measured[0], f"between {measured[1]} trainings of this run")
        if text in self.earlier:
            relative, trainings = self.earlier[text]
            return Spread(relative, f"between {trainings} trainings at an earlier decision of this line")
        return Spread(self.default, "the gate file's default, not measured")


def measure_spread(model: Scores, labels: dict[str, str]) -> tuple[float, int] | None:
    """(relative spread, trainings) of a model on the text of these labels; None with fewer than MINIMUM trainings."""
    relative, trainings = model.spread(**labels), len(model.trainings)
    return None if relative is None or trainings < MINIMUM else (relative, trainings)


NOTHING_MEASURED = Spreads()
