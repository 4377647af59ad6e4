"""Log-likelihoods of continuations, in which continuations of one context share its pass.

A multiple-choice question has one context and several answers. A row of a pass holds whole questions, one after the
other, each as a tree: its context once, then each answer, which sees the context and itself alone, at the positions
that it would have behind the context. So a log-likelihood is the one of a pass over that context and answer alone, up
to rounding. The head computes the tokens that predict an answer, and no others.

Cost: of a question with a context of C tokens and n answers of A, one pass over C + n * A tokens instead of
n * (C + A), and the head on n * A of them. Attention within a row of R tokens takes R ** 2 pairs, and a mask of as many
bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers.masking_utils import create_masks_for_generate

from eclectus.models.attention import causal_blocks

Context = tuple[int, ...]
TOKENS_A_REQUEST, MOST_TOKENS = 64, 4096


@dataclass
class Row:
    """Questions that share a pass.

    tokens, positions, questions, answers: of every token, the last two its question's number in the row and its
    answer's, 0 for a context. asked: (number of the request, indices of the tokens that predict its continuation).
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    asked: list[tuple[int, list[int]]] = field(default_factory=list)

    def add(self, context: Context, continuations: dict[int, list[int]]) -> None:
        """continuations: by number of the request, without their contexts."""
        number = self.questions[-1] + 1 if self.questions else 0
        self._extend(context, 0, number, 0)
        last = len(self.tokens) - 1
        for answer, (request, continuation) in enumerate(continuations.items(), 1):
            begin = len(self.tokens)
            # Nothing is predicted from the last token.
            self._extend(continuation[:-1], len(context), number, answer)
            self.asked.append((request, [last, *range(begin, len(self.tokens))]))

    def _extend(self, tokens: Sequence[int], position: int, question: int, answer: int) -> None:
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.questions += [question] * len(tokens)
        self.answers += [answer] * len(tokens)


def can_share(model: Any, longest: int) -> bool:
    """Whether a row of `longest` tokens gives this model's own log-likelihoods.

    It must take positions and a mask of pairs, and every layer must see all tokens before one: a sliding window counts
    the tokens of other answers.
    """
    config = model.config.get_text_config()
    takes = inspect.signature(model.forward).parameters
    layers = set(getattr(config, "layer_types", None) or ())
    windows = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
    return (
        {"position_ids", "attention_mask", "logits_to_keep"} <= set(takes)
        and config._attn_implementation in ("sdpa", "eager", causal_blocks.NAME)
        and layers <= {"full_attention", "sliding_attention", "chunked_attention"}
        and not getattr(config, "alibi", False)
        and all(window is None or window >= longest for window in windows)
    )


def plan_rows(requests: Sequence[tuple[Any, list[int], list[int]]], length: int, batch: int) -> list[Row]:
    """Rows that hold all requests (anything, context, continuation), as many tokens each as `batch` requests have.

    length: of the model's context, in tokens; longer requests are truncated on the left.
    """
    most = min(MOST_TOKENS, TOKENS_A_REQUEST * batch)
    questions: dict[Context, dict[int, list[int]]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        kept = tuple(context[max(0, len(context) + len(continuation) - length - 1) :])
        questions.setdefault(kept, {})[number] = continuation
    rows: list[Row] = []
    for shared, continuations in questions.items():
        for part, size in _parts(shared, continuations, most):
            if not rows or len(rows[-1].tokens) + size > most:
                rows.append(Row())
            rows[-1].add(shared, part)
    return rows


def _parts(context: Context, answers: dict[int, list[int]], most: int) -> Iterator[tuple[dict[int, list[int]], int]]:
    """The answers in parts that have at most that many tokens with their context, or one answer, and their tokens."""
    part: dict[int, list[int]] = {}
    size = len(context)
    for number, answer in answers.items():
        if part and size + len(answer) - 1 > most:
            yield part, size
            part, size = {}, len(context)
        part[number] = answer
        size += len(answer) - 1
    yield part, size


@torch.no_grad()
def answer_rows(model: Any, rows: Sequence[Row], requests: Sequence[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(number of the request, (log-likelihood, whether greedy)) for the requests of `plan_rows`."""
    for row in rows:
        needed = sorted({index for _, indices in row.asked for index in indices})
        place = {index: number for number, index in enumerate(needed)}
        logits = _logits(model, row, needed)
        for request, indices in row.asked:
            wanted = torch.tensor(requests[request][2], device=logits.device)
            logs = F.log_softmax(logits[[place[index] for index in indices]], dim=-1, dtype=torch.float32)
            value = logs.gather(1, wanted.unsqueeze(1)).sum()
            yield request, (float(value), bool((logs.argmax(-1) == wanted).all()))


def _logits(model: Any, row: Row, needed: list[int]) -> torch.Tensor:
    """The logits [needed, V] of one pass."""
    question, answer = (torch.tensor(each, device=model.device) for each in (row.questions, row.answers))

    def allowed(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (question[query] == question[key]) & ((answer[key] == 0) | (answer[key] == answer[query]))

    shape = torch.empty((), dtype=model.dtype, device=model.device).expand(1, len(row.tokens), 1)
    output = model(
        input_ids=torch.tensor([row.tokens], device=model.device),
        position_ids=torch.tensor([row.positions], device=model.device),
        attention_mask=create_masks_for_generate(model.config, shape, None, None, and_mask_function=allowed),
        logits_to_keep=torch.tensor(needed, device=model.device),
        use_cache=False,
    )
    return output.logits[0]
