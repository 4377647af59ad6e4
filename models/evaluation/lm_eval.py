"""Models for lm-evaluation-harness: log-likelihoods of continuations and of whole texts, and greedy generation.

Dense and top-k models use the harness's own HFLM, so their scores are those of the `lm_eval` command on the same
directory. A Lory model uses prompt-only routing (docs/methods.md 1.4): one mixture per layer from the mean of the
context, then the merged network reads context and continuation, so no score depends on its own continuation through the
router. Whole texts (rolling log-likelihood, which has no prompt) are routed by segment with a uniform first one
(docs/methods.md 1.3).

The processes divide the requests and store answers in a file as they come, so that an interrupted evaluation resumes.
Cost: one forward pass per question, over its context and all answers to it (shared_contexts.py); for Lory, and for
models whose attention such a pass does not give, one per answer, and for Lory one more over the context.
Shapes: B requests, L tokens, C context tokens, E experts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn import functional as F

from eclectus.models.checkpoints.tokenizer_files import text_frame
from eclectus.models.evaluation.scoring import routes_by_prompt
from eclectus.models.evaluation.shared_contexts import answer_rows, can_share, plan_rows
from eclectus.models.pretraining.export_dense import prompt_routing_weights
from eclectus.models.training.precision import Precision, is_half
from eclectus.models.training.process import Process

# Answers per write: a kill loses few more than these.
ANSWERS_PER_WRITE = 64
# Of one question, that a process computes together. Whole texts, and tasks without contexts, all share one.
ANSWERS = 16

Request = tuple[Any, list[int], list[int]]


class HarnessModel(HFLM):
    """HFLM over a model in memory; processes divide the requests, and answers are stored on disk.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: of the transformers library.
        length: tokens of the model's context.
        batch: requests per forward pass.
        process: this process among those that divide the requests.
        kept: directory for the answers so far; None to store none.
        report_progress: called with (answers, requests) of this process.
        encode: token ids of each text, without special tokens; by default the tokenizer's. Questions are texts: a
            special token that one spells is encoded as text, unlike in HFLM.
        begin: token ids that precede every text; by default those that the tokenizer itself puts there. What it puts
            after a text is left out: an answer continues its question.
        closed_from: tokens from this id on get no probability in requests without any of them.
        precision: of matrix products.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        length: int,
        batch: int,
        process: Process,
        kept: Path | None,
        report_progress: Callable[[int, int], None],
        encode: Callable[[list[str]], list[list[int]]] | None = None,
        begin: list[int] | None = None,
        closed_from: int | None = None,
        precision: Precision = "auto",
    ) -> None:
        mixed = "bfloat16" if is_half(precision, process.device) else None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=length,
            batch_size=batch,
            mixed_precision_dtype=mixed,
            # A log-likelihood of 40 in bfloat16 is right to 0.1.
            softmax_dtype="float32",
        )
        self._process, self._kept, self._report_progress = process, kept, report_progress
        self._known: dict[str, Any] | None = None
        self._encode = encode or self._encode_as_text
        self._begin = text_frame(tokenizer)[0] if begin is None else begin
        self._closed_from = closed_from
        # (context, continuation) of requests that were truncated on the left.
        self.cut: set[tuple[str, str]] = set()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """HFLM's token ids, with the special tokens that precede a text but none from within it."""
        ids = [*([] if add_special_tokens is False else self._begin), *self._encode([string])[0]]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, mask), both [B, L], padded on the left, truncated on the left to `left_truncate_len`."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        longest, padding = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        tokens = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return tokens, mask

    def _encode_as_text(self, texts: list[str]) -> list[list[int]]:
        given = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(texts, **given)["input_ids"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        # The first token of a whole text is predicted from HFLM's prefix token, so what precedes it is not scored.
        begin, self._begin = self._begin, []
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._begin = begin

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each request; NaN if the continuation alone is too long."""
        for text, context, continuation in requests:
            if text is not None and len(context) + len(continuation) > self.max_length + 1:
                self.cut.add(tuple(text))
        fitting = {
            _name(self._routing(), context, continuation): (text, context, continuation)
            for text, context, continuation in requests
            if len(continuation) <= self.max_length
        }

        def score(some: list[Request]) -> list[tuple[float, bool]]:
            return self._closing(some, lambda each: each[1] + each[2], lambda part: self._score(part, override_bs))

        answers = self._answer(fitting, score)
        missing = (math.nan, False)
        return [
            tuple(answers.get(_name(self._routing(), context, continuation), missing))
            for _, context, continuation in requests
        ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text that the model generates for each request."""
        named = {_name("generate", *each.args): each for each in requests}
        generate = super().generate_until
        answers = self._answer(
            named,
            lambda some: self._closing(
                some, lambda each: self.tok_encode(each.args[0]), lambda part: generate(part, disable_tqdm=True)
            ),
        )
        return [answers[_name("generate", *each.args)] for each in requests]

    def _closing(
        self, requests: list[Any], tokens_of: Callable[[Any], list[int]], work: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """The answers of `work`, which does those requests with new tokens apart from those without any."""
        first = self._closed_from
        if first is None:
            return work(requests)
        is_old = [max(tokens_of(each), default=0) < first for each in requests]
        answers: dict[int, Any] = {}
        for old in (True, False):
            numbers = [number for number, each in enumerate(is_old) if each == old]
            with self._without_new_tokens(first) if old else nullcontext():
                answers |= zip(numbers, work([requests[number] for number in numbers]) if numbers else [], strict=True)
        return [answers[number] for number in range(len(requests))]

    @contextmanager
    def _without_new_tokens(self, first: int) -> Iterator[None]:
        def close(_: Any, __: Any, output: Any) -> None:
            output.logits[..., first:] = -math.inf

        hook = self.model.register_forward_hook(close)
        try:
            yield
        finally:
            hook.remove()

    def _routing(self) -> str:
        return "dense"

    def _score(self, requests: list[Request], override_bs: int | None) -> list[tuple[float, bool]]:
        rows = plan_rows(requests, self.max_length, override_bs or self.batch_size)
        if can_share(self.model, max(len(row.tokens) for row in rows)):
            with self._mixed_precision():
                return [answer for _, answer in sorted(answer_rows(self.model, rows, requests))]
        return HFLM._loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=override_bs)

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None)

    def _answer(self, wanted: dict[str, Any], work: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
        """Answers by name: stored ones, and new ones, of which every process computes its share."""
        if self._known is None:
            self._known = self._read_kept()
        known = self._known
        todo = sorted((name for name in wanted if name not in known), key=lambda name: (-_size(wanted[name]), name))
        mine = _questions(todo, wanted)[self._process.rank :: self._process.world]
        given: dict[str, Any] = {}
        names: list[str] = []
        for number, question in enumerate(mine, 1):
            names += question
            if len(names) < ANSWERS_PER_WRITE and number < len(mine):
                continue
            fresh = dict(zip(names, work([wanted[name] for name in names]), strict=True))
            self._keep(fresh)
            given |= fresh
            names = []
            self._report_progress(len(given), sum(map(len, mine)))
        for each in self._process.gather(given):
            known |= each
        return known

    def _read_kept(self) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for path in sorted(self._kept.glob("*.ndjson")) if self._kept else ():
            for line in path.read_text("utf-8").splitlines():
                try:
                    name, answer = json.loads(line)
                except ValueError:
                    continue  # the line was being written when the process was killed
                known[name] = answer
        # All processes must know the same answers, or they would divide different work.
        for each in self._process.gather(known):
            known |= each
        return known

    def _keep(self, answers: dict[str, Any]) -> None:
        if self._kept is None:
            return
        self._kept.mkdir(parents=True, exist_ok=True)
        with open(self._kept / f"{self._process.rank}.ndjson", "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(pair) + "\n" for pair in answers.items())


class LoryHarnessModel(HarnessModel):
    """A Lory model: prompt-only routing for continuations, segments with a uniform first one for whole texts."""

    _whole_texts = False

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        self._whole_texts = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._whole_texts = False

    def _routing(self) -> str:
        return "segment" if self._whole_texts else "prompt"

    def _score(self, requests: list[Request], override_bs: int | None) -> list[tuple[float, bool]]:
        size = override_bs or self.batch_size
        return [
            answer
            for first in range(0, len(requests), size)
            for answer in self._score_batch(requests[first : first + size])
        ]

    @torch.no_grad()
    def _score_batch(self, requests: list[Request]) -> list[tuple[float, bool]]:
        # The last token is only predicted, and long requests are truncated on the left, as in HFLM.
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        tokens, mask = _padded([row[:-1] for row in rows], self.device)
        with self._mixed_precision():
            chosen: dict[str, Any]
            if self._whole_texts:
                chosen = {"first_segment": "uniform"}
            else:
                prompts = _padded([row[: len(row) - n] for row, n in zip(rows, counts, strict=True)], self.device)
                chosen = {"expert_weights": prompt_routing_weights(self.model, *prompts)}
            logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False, **chosen).logits
        answers = []
        for row, count, scores in zip(rows, counts, logits, strict=True):
            begin = len(row) - 1 - count
            wanted = torch.tensor(row[-count:], device=self.device)
            logs = F.log_softmax(scores[begin : begin + count], dim=-1, dtype=torch.float32)
            value = logs.gather(1, wanted.unsqueeze(1)).sum()
            answers.append((float(value), bool((logs.argmax(-1) == wanted).all())))
        return answers


def make_harness_model(model: Any, *args: Any, **named: Any) -> HarnessModel:
    """The HarnessModel for this model; the arguments are those of HarnessModel."""
    return (LoryHarnessModel if routes_by_prompt(model) else HarnessModel)(model, *args, **named)


def _padded(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B, L], mask [B, L]), padded on the right with token 0."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return tokens, mask


def _name(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _questions(names: list[str], requests: dict[str, Any]) -> list[list[str]]:
    """The names in parts whose requests share a context, at most ANSWERS of them each, in the order of their first."""
    parts: list[list[str]] = []
    latest: dict[Any, list[str]] = {}
    for name in names:
        request = requests[name]
        context = tuple(request[1]) if isinstance(request, tuple) else name
        if context not in latest or len(latest[context]) == ANSWERS:
            latest[context] = []
            parts.append(latest[context])
        latest[context].append(name)
    return parts


def _size(request: Any) -> int:
    return len(request[1]) + len(request[2]) if isinstance(request, tuple) else len(request.args[0])
