"""What a server answered against what the training model answers: log-probabilities, greedy text, tokens.

log-probabilities    of the likeliest tokens at every position of every prompt: in float32 the largest difference
                     counts, in bfloat16 and float16 (whose rounding each server does in its own order) the mean
greedy text          may part only where the training model itself is undecided: at the first token that differs,
                     its own token may be ahead of the server's by no more than twice the largest difference
tokens               the server's tokenizer gives the ids that the training gave
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 1e-3
# Mean difference of log-probabilities in 16 bits. Measured on tiny models with wide weights: 0.01 to 0.06.
NARROW_TOLERANCE = 0.1
# What rounding alone does to a number, as a share of it. Servers round the logits too.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}


@dataclass(frozen=True)
class Expected:
    """The training model on one prompt. rows: log-probabilities `[length + greedy, vocabulary]`, the last ones of the
    greedy text's positions. greedy: that text. largest: logit, in size.
    """

    rows: Any
    length: int
    greedy: list[int]
    largest: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A server in one type of numbers.

    max_difference, mean_difference: of log-probabilities. compared: how many. equal_texts, texts: greedy texts that are
    equal, of all. widest_margin: by which the training model was decided where a text parts. faults: what is beyond
    tolerance, in words; none: certified.
    """

    server: str
    version: str
    dtype: str
    max_difference: float
    mean_difference: float
    compared: int
    equal_texts: int
    texts: int
    widest_margin: float
    tokens_equal: bool | None
    tolerance: float
    seconds: float
    faults: tuple[str, ...]

    @property
    def certified(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"certified": self.certified, "faults": list(self.faults)}


def tolerance_in(dtype: str, tolerance: float, narrow: float, expected: list[Expected]) -> float:
    """The allowed difference in a type of numbers; in 16 bits at least what rounding does to the largest logit."""
    if dtype == "float32":
        return tolerance
    return max(tolerance, narrow, ROUNDING[dtype] * max(each.largest for each in expected))


def compare(
    answer: dict[str, Any],
    expected: list[Expected],
    tokens: list[list[int]] | None,
    names: list[str],
    asked: tuple[str, str, float, float],
) -> Comparison:
    """Compares an answer with what is expected, prompt by prompt.

    tokens: of the prompts' texts, by the training's tokenizer. names: of the prompts. asked: the server, the type of
    its numbers, the tolerance in that type, and the seconds it took.
    """
    server, dtype, tolerance, seconds = asked
    differences, faults = _differences(answer["log_probs"], expected), list[str]()
    largest, mean = (max(differences), sum(differences) / len(differences)) if differences else (float("inf"),) * 2
    counted, what = (largest, "largest") if dtype == "float32" else (mean, "mean")
    # NaN is not within any tolerance.
    if not counted <= tolerance:
        faults.append(f"{what} difference of log-probabilities {counted:.2g}, allowed {tolerance:.2g}")
    margins = [_margin(each, text) for each, text in zip(expected, answer["greedy"], strict=True)]
    decided = [margin for margin in margins if margin is not None]
    widest = max(decided, default=0.0)
    if not widest <= 2 * max(largest, tolerance):
        faults.append(f"greedy text parts where the training model is ahead by {widest:.2g}")
    equal: bool | None = None
    if tokens is not None and answer["tokens"] is not None:
        parted = [name for name, a, b in zip(names, tokens, answer["tokens"], strict=True) if list(a) != list(b)]
        equal = not parted
        if parted:
            faults.append(f"its tokenizer reads other tokens in {', '.join(parted)}")
    return Comparison(
        server,
        str(answer["version"]),
        dtype,
        largest,
        mean,
        len(differences),
        len(margins) - len(decided),
        len(margins),
        widest,
        equal,
        tolerance,
        round(seconds, 1),
        tuple(faults),
    )


def _differences(answered: list[list[dict[str, float]]], expected: list[Expected]) -> list[float]:
    found = []
    for rows, ours in zip(answered, expected, strict=True):
        # vLLM says nothing about what follows the first token of a prompt that it was not given: rows align at the end.
        for position, row in enumerate(rows, ours.length - len(rows)):
            found += [abs(value - float(ours.rows[position][int(token)])) for token, value in row.items()]
    return found


def _margin(ours: Expected, text: list[int]) -> float | None:
    """By how much the training model prefers its own token where a server's text parts from it; None: it does not.

    A text that ends early (llama.cpp stops at the end of a document) is compared as far as it goes.
    """
    for step, (own, other) in enumerate(zip(ours.greedy, text, strict=False)):
        if own != other:
            row = ours.rows[ours.length - 1 + step]
            return float(row[own]) - float(row[other])
    return None
