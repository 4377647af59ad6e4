"""Scores of one model by document, and paired comparisons of two models with a bootstrap over documents.

Two models are compared on the documents that both scored. The same documents are resampled for both, so the difficulty
of a document cancels out and the interval is that of the difference. 1,000 resamples of 1,000 documents take 20 ms.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact
from eclectus.tasks.evaluation.routing_statistics import LayerRouting, describe_layers
from eclectus.tasks.settings import SEED, Settings

DRAWS_AT_ONCE = 4_000_000


class BootstrapSettings(Settings):
    """The bootstrap behind confidence intervals."""

    report_resamples: int = Field(1000, ge=100, description="Bootstrap resamples over documents for the 95% intervals.")
    seed: int = SEED


@dataclass(frozen=True)
class Scores:
    """The evaluation of one model, by document: arrays [D] of ids, labels and sums."""

    name: str
    artifact: Artifact
    document: np.ndarray
    language: np.ndarray
    domain: np.ndarray
    group: np.ndarray
    bits: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    # Bits under prompt-only routing; None for models without it.
    bits_by_prompt: np.ndarray | None = None

    @classmethod
    def read(cls, name: str, evaluation: Artifact) -> Scores:
        table = pq.read_table(evaluation.file("documents.parquet"))
        columns = ("document", "language", "domain", "group", "bits", "bytes", "tokens")
        arrays = {column: table[column].to_numpy(zero_copy_only=False) for column in columns}
        by_prompt = None
        if "bits_by_prompt" in table.column_names and table["bits_by_prompt"].null_count < len(table):
            by_prompt = table["bits_by_prompt"].to_numpy(zero_copy_only=False)
        return cls(name, evaluation, **arrays, bits_by_prompt=by_prompt)

    def where(self, **labels: str) -> np.ndarray:
        """Mask [D] of the documents with these labels: `where(group="original", domain="code")`."""
        chosen = np.ones(len(self.document), bool)
        for label, value in labels.items():
            chosen &= getattr(self, label) == value
        return chosen

    def bits_per_byte(self, **labels: str) -> float | None:
        """Over the documents with these labels; None when there are none."""
        chosen = self.where(**labels)
        return float(self.bits[chosen].sum() / self.bytes[chosen].sum()) if chosen.any() else None

    def bits_per_byte_by_prompt(self, **labels: str) -> float | None:
        """`bits_per_byte` when routed once per window by its context (docs/methods.md 1.4); None if the same."""
        chosen = self.where(**labels)
        if self.bits_by_prompt is None or not chosen.any():
            return None
        return float(self.bits_by_prompt[chosen].sum() / self.bytes[chosen].sum())

    def perplexity(self, **labels: str) -> float | None:
        """Per token."""
        chosen = self.where(**labels)
        return float(2 ** (self.bits[chosen].sum() / self.tokens[chosen].sum())) if chosen.any() else None

    def values(self, label: str, **labels: str) -> list[str]:
        """The values of a label among these documents, sorted."""
        return sorted(set(getattr(self, label)[self.where(**labels)]))

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads(self.artifact.file("about.json").read_text("utf-8"))

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        return json.loads(self.artifact.file("samples.json").read_text("utf-8"))

    @cached_property
    def routing(self) -> list[dict[str, Any]]:
        return pq.read_table(self.artifact.file("routing.parquet")).to_pylist()

    @cached_property
    def positions(self) -> list[dict[str, Any]]:
        return pq.read_table(self.artifact.file("positions.parquet")).to_pylist()

    @property
    def experts(self) -> int:
        """Experts in a layer; 0 for a dense model."""
        return 1 + max((row["expert"] for row in self.routing), default=-1)

    @cached_property
    def layer_routing(self) -> list[LayerRouting]:
        """Entropy, utilisation, specialisation and collapse, layer by layer."""
        return describe_layers(self.routing)

    @property
    def layers(self) -> list[int]:
        return sorted({row["layer"] for row in self.routing})

    def shares(self, label: str, layer: int, field: str = "share", **groups: str) -> dict[str, list[float]]:
        """Mean share of each expert [E] in a layer, by value of a label ("language", "domain" or "group")."""
        labels = {
            (language, domain): {"language": language, "domain": domain, "group": group}
            for language, domain, group in zip(self.language, self.domain, self.group, strict=True)
        }
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(self.experts))
        counts: dict[str, float] = defaultdict(float)
        for row in self.routing:
            own = labels.get((row["language"], row["domain"]))
            if row["layer"] != layer or own is None or any(own[key] != value for key, value in groups.items()):
                continue
            sums[own[label]][row["expert"]] += (row[field] or 0.0) * row["routed"]
            counts[own[label]] += row["routed"] if row["expert"] == 0 else 0
        return {name: (sums[name] / counts[name]).tolist() for name in sorted(sums) if counts[name]}


@dataclass(frozen=True)
class Change:
    """Relative changes from one model to another on the same documents (-0.05 is 5% less), with 95% intervals.

    before, after: bits per byte. bits: change of bits per byte. perplexity: change of perplexity per token; None if the
    two models did not score the same tokens.
    """

    before: float
    after: float
    bits: float
    bits_interval: tuple[float, float]
    perplexity: float | None
    perplexity_interval: tuple[float, float] | None
    documents: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.bits_interval
        return low > 0 or high < 0

    @property
    def retention(self) -> float:
        """Bits per byte of the first model over the second's; 1 is nothing forgotten (docs/methods.md 2.5)."""
        return 1 / (1 + self.bits)

    @property
    def retention_interval(self) -> tuple[float, float]:
        low, high = self.bits_interval
        return 1 / (1 + high), 1 / (1 + low)

    @property
    def gain(self) -> float:
        """Part of the first model's bits that the second saves."""
        return -self.bits

    @property
    def gain_interval(self) -> tuple[float, float]:
        low, high = self.bits_interval
        return -high, -low


def compare(before: Scores, after: Scores, resamples: int, seed: int, **labels: str) -> Change | None:
    """The change from one model to another over the documents with these labels that both scored; None if none."""
    _, one, two = np.intersect1d(before.document, after.document, return_indices=True)
    chosen = before.where(**labels)[one]
    one, two = one[chosen], two[chosen]
    if not len(one):
        return None
    sums = np.stack(
        [before.bits[one], before.bytes[one], before.tokens[one], after.bits[two], after.bytes[two], after.tokens[two]],
        axis=1,
    ).astype(float)
    drawn = _resample(sums, resamples, seed)
    total = sums.sum(0)
    same = bool((before.tokens[one] == after.tokens[two]).all())
    return Change(
        float(total[0] / total[1]),
        float(total[3] / total[4]),
        float(_bits_change(total)),
        _interval(_bits_change(drawn)),
        float(_perplexity_change(total)) if same else None,
        _interval(_perplexity_change(drawn)) if same else None,
        len(one),
    )


def divergence(shares: dict[str, list[float]]) -> float:
    """Mean Jensen-Shannon divergence, in bits, between the mean routings of each two kinds of text."""
    pairs = combinations(sorted(shares), 2)
    values = [_jensen_shannon(np.array(shares[one]), np.array(shares[two])) for one, two in pairs]
    return float(np.mean(values)) if values else 0.0


def _resample(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums [R, C] over R resamples, with replacement, of documents [D, C]."""
    generator, count = np.random.default_rng(seed), len(sums)
    parts, left = [], resamples
    while left:
        size = min(left, max(1, DRAWS_AT_ONCE // count))
        parts.append(generator.multinomial(count, np.full(count, 1 / count), size=size) @ sums)
        left -= size
    return np.concatenate(parts)


def _bits_change(sums: np.ndarray) -> np.ndarray:
    return (sums[..., 3] / sums[..., 4]) / (sums[..., 0] / sums[..., 1]) - 1


def _perplexity_change(sums: np.ndarray) -> np.ndarray:
    return 2 ** (sums[..., 3] / sums[..., 5] - sums[..., 0] / sums[..., 2]) - 1


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _jensen_shannon(one: np.ndarray, two: np.ndarray) -> float:
    middle = (one + two) / 2

    def against(shares: np.ndarray) -> float:
        positive = shares > 0
        return float((shares[positive] * np.log2(shares[positive] / middle[positive])).sum())

    return max(0.0, (against(one) + against(two)) / 2) if math.isfinite(one.sum() + two.sum()) else math.nan
