"""Scores of one model by document, in one training or in several that differ only in the seed.

Two models are compared by tasks/evaluation/changes.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.routing_statistics import LayerRouting, describe_layers
from eclectus.tasks.evaluation.training_names import further_training
from eclectus.tasks.settings import RuntimeSetting, Settings


class IntervalSettings(Settings):
    """The 95% intervals of reports and gates."""

    report_resamples: int = RuntimeSetting(
        1000, ge=100, description="Ignored: intervals are computed without resampling (docs/evaluation.md)."
    )


SHOWN_DOMAINS = 60


@dataclass(frozen=True)
class Scores:
    """The evaluation of one model, by document: arrays [D] of ids, labels and sums.

    work: what a document is a piece of; None for evaluations that did not know it. repeats: further trainings of the
    model, by seed; means over trainings are given as such, all else is of the first one.
    """

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
    work: np.ndarray | None = None
    repeats: dict[int, Scores] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, evaluation: Artifact) -> Scores:
        table = pq.read_table(evaluation.file("documents.parquet"))
        columns = ("document", "language", "domain", "group", "bits", "bytes", "tokens")
        arrays = {column: table[column].to_numpy(zero_copy_only=False) for column in columns}
        by_prompt = None
        if "bits_by_prompt" in table.column_names and table["bits_by_prompt"].null_count < len(table):
            by_prompt = table["bits_by_prompt"].to_numpy(zero_copy_only=False)
        work = table["work"].to_numpy(zero_copy_only=False) if "work" in table.column_names else None
        return cls(name, evaluation, **arrays, bits_by_prompt=by_prompt, work=work)

    @property
    def works(self) -> np.ndarray:
        """The work of each document [D], its own id where none is known."""
        return self.document if self.work is None else self.work

    @property
    def trainings(self) -> dict[int | None, Scores]:
        """Every training by seed; None stands for the first one, whose seed is that of the run."""
        first: dict[int | None, Scores] = {None: self}
        return first | {seed: each for seed, each in self.repeats.items()}

    @property
    def first(self) -> Scores:
        """The first training alone."""
        return replace(self, repeats={})

    def rows(self, documents: np.ndarray) -> np.ndarray:
        """Rows [N] of these documents [N], all of which must be there."""
        order = np.argsort(self.document)
        return order[np.searchsorted(self.document, documents, sorter=order)]

    def where(self, **labels: str) -> np.ndarray:
        """Mask [D] of the documents with these labels: `where(group="original", domain="code")`."""
        chosen = np.ones(len(self.document), bool)
        for label, value in labels.items():
            chosen &= getattr(self, label) == value
        return chosen

    def bits_per_byte(self, **labels: str) -> float | None:
        """Over the documents with these labels, the mean over trainings; None when there are none."""
        return _mean([each._rate(each.bits, each.bytes, labels) for each in self.trainings.values()])

    def spread(self, **labels: str) -> float | None:
        """Relative standard deviation of `bits_per_byte` between trainings; None if there are not several."""
        rates = [each._rate(each.bits, each.bytes, labels) for each in self.trainings.values()]
        known = [math.log(rate) for rate in rates if rate is not None]
        return float(np.std(known, ddof=1)) if len(known) > 1 else None

    def bits_per_byte_by_prompt(self, **labels: str) -> float | None:
        """`bits_per_byte` when routed once per window by its context (docs/methods.md 1.4); None if the same."""
        by_training = self.trainings.values()
        return _mean(
            [
                None if each.bits_by_prompt is None else each._rate(each.bits_by_prompt, each.bytes, labels)
                for each in by_training
            ]
        )

    def perplexity(self, **labels: str) -> float | None:
        """Per token, the mean over trainings."""
        costs = [each._rate(each.bits, each.tokens, labels) for each in self.trainings.values()]
        return _mean([None if cost is None else float(np.exp2(cost)) for cost in costs])

    def _rate(self, bits: np.ndarray, units: np.ndarray, labels: dict[str, str]) -> float | None:
        chosen = self.where(**labels)
        return float(bits[chosen].sum() / units[chosen].sum()) if chosen.any() else None

    def values(self, label: str, **labels: str) -> list[str]:
        """The values of a label among these documents, sorted."""
        return sorted(set(getattr(self, label)[self.where(**labels)]))

    def domains(self, **labels: str) -> list[str]:
        """The domains of these documents that a display shows, sorted: of very many those of the most documents."""
        counts = Counter(self.domain[self.where(**labels)].tolist())
        return sorted(sorted(counts, key=lambda domain: (-counts[domain], domain))[:SHOWN_DOMAINS])

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads(self.artifact.file("about.json").read_text("utf-8"))

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        return json.loads(self.artifact.file("samples.json").read_text("utf-8"))

    @cached_property
    def chat(self) -> list[dict[str, Any]]:
        """Answers to fixed instructions; none of a model without a chat template, or of an earlier evaluation."""
        path = self.artifact.file("chat.json")
        return json.loads(path.read_text("utf-8")) if path.is_file() else []

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


def read_trainings(evaluations: dict[str, Artifact], repeats: dict[str, Artifact] | None = None) -> dict[str, Scores]:
    """Scores by model. repeats: evaluations of further trainings of these models, by name as "lory seed 1".

    Raises EclectusError for a repeat whose name has no seed.
    """
    further: dict[str, dict[int, Scores]] = defaultdict(dict)
    for name, evaluation in (repeats or {}).items():
        found = further_training(name)
        if found is None:
            raise EclectusError(f"'{name}' names no training; expected a model and its seed, as in 'lory seed 1'")
        model, seed = found
        further[model][seed] = Scores.read(name, evaluation)
    return {
        name: replace(Scores.read(name, evaluation), repeats=further[name]) for name, evaluation in evaluations.items()
    }


def divergence(shares: dict[str, list[float]]) -> float:
    """Mean Jensen-Shannon divergence, in bits, between the mean routings of each two kinds of text."""
    pairs = combinations(sorted(shares), 2)
    values = [_jensen_shannon(np.array(shares[one]), np.array(shares[two])) for one, two in pairs]
    return float(np.mean(values)) if values else 0.0


def _jensen_shannon(one: np.ndarray, two: np.ndarray) -> float:
    middle = (one + two) / 2

    def against(shares: np.ndarray) -> float:
        positive = shares > 0
        return float((shares[positive] * np.log2(shares[positive] / middle[positive])).sum())

    return max(0.0, (against(one) + against(two)) / 2) if math.isfinite(one.sum() + two.sum()) else math.nan


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
