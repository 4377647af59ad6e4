"""Scoring a causal language model on held-out text: bits by document and by position, and routing statistics.

    stream     the tokens of documents of one kind, each document followed by the end-of-document token; where it is
               led, C tokens of a document that is not scored come first
    windows    L tokens each, starting every L - C tokens; a window's first C tokens are context only
    bits       -log2 p(token | the tokens before it in its window), summed by document in float64

Every token but the first C of a stream is scored exactly once, with at least C tokens before it: of a led stream,
every token of its documents, so that tokenizers which cut C tokens at other bytes score the same text. If C is at least
Lory's segment length T, no score of a Lory model depends on later tokens: the look-ahead of the paper's first segment
ends with that segment (docs/methods.md 1.3), and token T is predicted from tokens 0 to T - 1. Scores do not depend on
how windows are batched or divided between processes: short ones are padded on the right, which a causal model does not
see.

Where documents stand apart (`Windows.numbers`), a token sees its own document only, and the first of a document in its
window is read and never scored. Then every document has a first segment of Lory's, which is routed with equal weights,
so that there is no look-ahead in it either.

Cost: one forward pass over L / (L - C) times the tokens; memory for `batch` windows of logits.
Shapes: B windows, L tokens, N routed units (segments or tokens), E experts, S streams, D documents, P position buckets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from eclectus.models.attention.document_mask import within_documents
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.pretraining.export_dense import prompt_routing_weights
from eclectus.models.staged_folder import replacing
from eclectus.models.training.precision import Precision, autocast
from eclectus.models.training.process import Process

NO_DOCUMENT = -1
LOGITS_AT_ONCE = 2**28
MOST_BUCKETS = 32
# Between two writes of the sums so far.
KEEP_SECONDS = 20.0


class NotFinite(Exception):
    """The model gave logits that are not finite. document: the ordinal of the document."""

    def __init__(self, document: int) -> None:
        super().__init__(f"the logits on document {document} are not finite")
        self.document = document


@dataclass(frozen=True)
class Windows:
    """Token streams and the windows over them.

    tokens [T], documents [T]: the streams, concatenated; documents holds ordinals, NO_DOCUMENT at end-of-document
    tokens, which are read and never scored. table [W, 4] int64: (start, length, overlap, stream); the first `overlap`
    tokens of a window are also in the window before, or lead the stream. context: C. length: L. bytes_per_token [D]
    float64. begin: tokens that precede every document; at most C, and a window reads them in place of its first ones.
    numbers [T]: the document of every token, those that begin and end one too, where documents stand apart; else None.
    """

    tokens: np.ndarray
    documents: np.ndarray
    table: np.ndarray
    context: int
    length: int
    bytes_per_token: np.ndarray
    begin: tuple[int, ...] = ()
    numbers: np.ndarray | None = None

    @property
    def bucket(self) -> int:
        """Tokens per position bucket: a multiple of C, so that scoring begins at a bucket's border."""
        return self.context * max(1, math.ceil(self.length / self.context / MOST_BUCKETS))

    @property
    def buckets(self) -> int:
        return 1 + math.ceil((self.length - self.context) / self.bucket)

    def bucket_of(self, position: np.ndarray) -> np.ndarray:
        """0 for context, then buckets of equal width."""
        return np.where(position < self.context, 0, 1 + (position - self.context) // self.bucket)


@dataclass
class Sums:
    """The sums of scoring, all float64.

    bits, tokens [D]. positions [S, P, 3]: bits, bytes, tokens; bucket 0 is context, which is in no score.
    routed [S]: routed units. shares, chosen: by layer [S, E], summed mixture weights (or router probabilities) and
    counts of top-k choices; `chosen` is empty for Lory, both are for dense models.
    """

    bits: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    routed: np.ndarray
    shares: list[np.ndarray] = field(default_factory=list)
    chosen: list[np.ndarray] = field(default_factory=list)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.bits + other.bits,
            self.tokens + other.tokens,
            self.positions + other.positions,
            self.routed + other.routed,
            _add_layers(self.shares, other.shares),
            _add_layers(self.chosen, other.chosen),
        )


def plan_windows(lengths: list[int], length: int, context: int, led: Sequence[bool] = ()) -> np.ndarray:
    """The windows [W, 4] over streams of these lengths: (start, length, overlap, stream), longest first.

    length: L > context: C >= 1, else ValueError. A stream of at most C tokens has no window, as nothing is scored in
    it. led: which streams begin with C tokens of no document of theirs, whose routing does not count; by default none.
    """
    if not 1 <= context < length:
        raise ValueError(
            f"a window of {length} tokens with {context} of context scores nothing; context must be 1 to {length - 1}"
        )
    rows, begin = [], 0
    for stream, size in enumerate(lengths):
        for start in range(0, max(0, size - context), length - context):
            shared = context if start or (led and led[stream]) else 0
            rows.append((begin + start, min(length, size - start), shared, stream))
        begin += size
    rows.sort(key=lambda row: -row[1])
    return np.array(rows, np.int64).reshape(-1, 4)


@torch.no_grad()
def score(
    model: Any,
    windows: Windows,
    streams: int,
    process: Process,
    batch: int,
    report_progress: Callable[[int, int], None],
    kept: Path | None = None,
    by_prompt: bool = False,
    closed_from: int | None = None,
    precision: Precision = "auto",
) -> Sums:
    """Scores all windows; the processes divide them, and all get the same sums.

    batch: windows per forward pass, fewer if their logits would be more than LOGITS_AT_ONCE numbers.
    report_progress: called with (windows done, windows to do) of this process. kept: a directory where the sums so far
    are written every KEEP_SECONDS, from which interrupted scoring resumes. by_prompt: route a Lory model once per
    window, by its context alone (docs/methods.md 1.4), and collect no routing statistics. closed_from: in windows
    without tokens from this id on, these get no probability. precision: of matrix products. Raises NotFinite.
    """
    model.to(process.device).eval()
    mine = windows.table[process.rank :: process.world]
    size = max(1, min(batch, LOGITS_AT_ONCE // (windows.length * model.config.vocab_size)))
    documents = len(windows.bytes_per_token)
    sums = Sums(np.zeros(documents), np.zeros(documents), np.zeros((streams, windows.buckets, 3)), np.zeros(streams))
    path = kept / f"{'prompt-' if by_prompt else ''}{process.rank}-of-{process.world}.npz" if kept else None
    sums, begin = _read_sums(path, sums)
    written = time.monotonic()
    for first in range(begin, len(mine), size):
        rows = mine[first : first + size]
        tokens, owners = read_windows(windows, rows)
        apart = _documents_apart(windows, rows, owners)
        tokens = tokens.to(process.device)
        asks = _routing_arguments(model, apart is not None)
        with autocast(process.device, precision), within_documents(model, apart, process.device):
            arguments = _fixed_weights(model, tokens[:, : windows.context]) if by_prompt else asks
            output = model(input_ids=tokens, use_cache=False, **arguments)
        logits = output.logits if closed_from is None else without_new_words(output.logits, tokens, closed_from)
        _add_bits(sums, windows, rows, owners, next_token_bits(logits, tokens))
        if not by_prompt:
            _add_routing(sums, model, rows, output)
        done = min(first + size, len(mine))
        if path and time.monotonic() - written >= KEEP_SECONDS:
            _write_sums(path, sums, done)
            written = time.monotonic()
        report_progress(done, len(mine))
    first, *others = process.gather(sums)
    for each in others:
        first = first + each
    return first


def without_new_words(logits: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """The logits [B, L, V], in which tokens from `first` on have no probability in rows that hold none of them.

    tokens [B, L]. What was given is changed.
    """
    closed = (tokens < first).all(-1)
    logits[closed, :, first:] = -math.inf
    return logits


def routes_by_prompt(model: Any) -> bool:
    """Whether prompt-only routing differs from the model's usual routing."""
    return isinstance(model, LoryForCausalLM) and model.config.num_experts > 1 and model.config.routing != "dense"


def _fixed_weights(model: Any, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"expert_weights": prompt_routing_weights(model, prompt)}


def _write_sums(path: Path, sums: Sums, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"shares-{i}": each for i, each in enumerate(sums.shares)}
    arrays |= {f"chosen-{i}": each for i, each in enumerate(sums.chosen)}
    arrays |= {"bits": sums.bits, "tokens": sums.tokens, "positions": sums.positions, "routed": sums.routed}
    with replacing(path) as partial, open(partial, "wb") as handle:
        np.savez(handle, done=done, **arrays)


def _read_sums(path: Path | None, zero: Sums) -> tuple[Sums, int]:
    """(the sums so far, windows in them); `zero` if nothing was stored."""
    if path is None or not path.is_file():
        return zero, 0
    with np.load(path, allow_pickle=False) as kept:

        def by_layer(kind: str) -> list[np.ndarray]:
            layers = sum(name.startswith(kind) for name in kept.files)
            return [kept[f"{kind}-{i}"] for i in range(layers)]

        totals = kept["bits"], kept["tokens"], kept["positions"], kept["routed"]
        return Sums(*totals, by_layer("shares"), by_layer("chosen")), int(kept["done"])


def read_windows(windows: Windows, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """(tokens [B, L] int64, documents [B, L]) of these windows, padded on the right with token 0 and NO_DOCUMENT."""
    longest = int(rows[:, 1].max())
    tokens = np.zeros((len(rows), longest), np.int64)
    owners = np.full((len(rows), longest), NO_DOCUMENT, np.int64)
    for i, (start, length, _, _) in enumerate(rows):
        tokens[i, :length] = windows.tokens[start : start + length]
        owners[i, :length] = windows.documents[start : start + length]
        tokens[i, : len(windows.begin)] = windows.begin
        owners[i, : len(windows.begin)] = NO_DOCUMENT
    return torch.from_numpy(tokens), owners


def _documents_apart(windows: Windows, rows: np.ndarray, owners: np.ndarray) -> torch.Tensor | None:
    """The documents [B, L] of `read_windows`, NO_DOCUMENT at padding; None where they do not stand apart.

    In `owners` the first token of each then has none, as it is predicted from nothing.
    """
    if windows.numbers is None:
        return None
    numbers = np.full(owners.shape, NO_DOCUMENT, np.int64)
    for i, (start, length, _, _) in enumerate(rows):
        numbers[i, :length] = windows.numbers[start : start + length]
    owners[:, 1:][numbers[:, 1:] != numbers[:, :-1]] = NO_DOCUMENT
    return torch.from_numpy(numbers)


def next_token_bits(logits: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """-log2 p of every token but the first, [B, L - 1] float64; log-softmax in fp32, one window at a time."""
    rows = [
        F.cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(rows).double().cpu().numpy() / math.log(2)


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    tokens: int,
    temperature: float,
    ends: list[int],
    seed: int,
    process: Process,
    closed_from: int | None = None,
) -> list[tuple[list[int], list[list[float]]]]:
    """(new tokens, routing weights by layer [E] on the prompt) for each prompt; greedy at temperature 0, else seeded.

    ends: tokens after which a text ends; the first also pads.
    One prompt at a time, so that none is padded; the processes divide the prompts. Dense models have no weights.
    closed_from: tokens from this id on are not written after prompts without any.
    """
    if not prompts:
        return []
    from transformers import GenerationConfig

    model.to(process.device).eval()
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=tokens, eos_token_id=ends, pad_token_id=ends[0], **chosen)
    mine: dict[int, tuple[list[int], list[list[float]]]] = {}
    for number in range(process.rank, len(prompts), process.world):
        prompt = torch.tensor([prompts[number]], device=process.device)
        torch.manual_seed(seed * 1_000_003 + number)
        with autocast(process.device):
            output = model(input_ids=prompt, use_cache=False, **_routing_arguments(model))
            closed = closed_from is not None and max(prompts[number]) < closed_from
            settings.suppress_tokens = list(range(closed_from or 0, model.config.vocab_size)) if closed else None
            written = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        shares, _, _ = routing(model, output, 1)
        weights = [_rounded(layer[0].mean(0)) for layer in shares]
        mine[number] = (written[0, prompt.shape[1] :].tolist(), weights)
    by_number: dict[int, Any] = {}
    for each in process.gather(mine):
        by_number |= each
    return [by_number[number] for number in range(len(prompts))]


def routing(model: Any, output: Any, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """(shares by layer [B, N, E] fp32, top-k choices by layer [B, N, E] of 0 and 1, tokens per routed unit).

    Lory: the mixture weights of each segment, and no choices. Top-k models: router probabilities of each token. Dense
    models: nothing.
    """
    if isinstance(model, LoryForCausalLM):
        length = output.logits.shape[1]
        return [layer.float() for layer in output.router_weights or ()], [], min(model.config.segment_length, length)
    shares, chosen = [], []
    for layer in getattr(output, "router_logits", None) or ():
        logits = layer.float().view(batch, -1, layer.shape[-1])
        shares.append(logits.softmax(-1))
        best = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
        chosen.append(torch.zeros_like(logits).scatter_(-1, best, 1.0))
    return shares, chosen, 1


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _routing_arguments(model: Any, apart: bool = False) -> dict[str, Any]:
    if isinstance(model, LoryForCausalLM):
        return {"output_router_weights": True, **({"first_segment": "uniform"} if apart else {})}
    return {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}


def _add_bits(sums: Sums, windows: Windows, rows: np.ndarray, owners: np.ndarray, bits: np.ndarray) -> None:
    """bits [B, L - 1]; owners [B, L]."""
    position = np.broadcast_to(np.arange(1, owners.shape[1]), bits.shape)
    owners = owners[:, 1:]
    real = owners != NO_DOCUMENT
    wrong = real & ~np.isfinite(bits)
    if wrong.any():
        raise NotFinite(int(owners[wrong][0]))
    scored = real & (position >= windows.context)
    np.add.at(sums.bits, owners[scored], bits[scored])
    np.add.at(sums.tokens, owners[scored], 1.0)
    stream = np.broadcast_to(rows[:, 3:], bits.shape)
    index = (stream[real], windows.bucket_of(position[real]))
    values = np.stack([bits[real], windows.bytes_per_token[owners[real]], np.ones(real.sum())], axis=1)
    np.add.at(sums.positions, index, values)


def _add_routing(sums: Sums, model: Any, rows: np.ndarray, output: Any) -> None:
    """Adds every routed unit that lies completely in a window and in no window before."""
    shares, chosen, unit = routing(model, output, len(rows))
    if not shares:
        return
    if (segments := getattr(output, "segments", None)) is None:
        begin = np.arange(shares[0].shape[1]) * unit
        counted = (begin >= rows[:, 2:3]) & (begin + unit <= rows[:, 1:2])
    else:
        shares, counted = _by_window(shares, segments.cpu().numpy(), rows)
    np.add.at(sums.routed, rows[:, 3], counted.sum(1))
    for into, layers in ((sums.shares, shares), (sums.chosen, chosen)):
        if layers and not into:
            into += [np.zeros((len(sums.routed), layer.shape[-1])) for layer in layers]
        for total, layer in zip(into, layers, strict=True):
            mask = torch.from_numpy(counted).to(layer.device).unsqueeze(-1)
            np.add.at(total, rows[:, 3], (layer.double() * mask).sum(1).cpu().numpy())


def _by_window(
    shares: list[torch.Tensor], segments: np.ndarray, rows: np.ndarray
) -> tuple[list[torch.Tensor], np.ndarray]:
    """Weights [1, P, E] of packed documents' segments as [B, P, E], and which of them count for a window, [B, P]."""
    sizes = np.bincount(segments.ravel())
    row, begin = np.divmod(np.cumsum(sizes) - sizes, segments.shape[1])
    counted = (begin >= rows[row, 2]) & (begin + sizes <= rows[row, 1])
    own = row == np.arange(len(rows))[:, None]
    return [layer.expand(len(rows), -1, -1) for layer in shares], own & counted


def _add_layers(left: list[np.ndarray], right: list[np.ndarray]) -> list[np.ndarray]:
    """The sum layer by layer; a process without windows has no layers."""
    return [a + b for a, b in zip(left, right, strict=True)] if left and right else left or right
