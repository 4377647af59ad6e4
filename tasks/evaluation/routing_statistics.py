"""Routing statistics of one model per layer: utilisation, entropy, collapse and specialisation.

    entropy          of the mean routing, divided by log E: 1 is uniform, 0 is one expert for everything
    utilisation      share of experts with a mean weight above 1 / (4 E)
    specialisation   mutual information between expert and kind of text, in bits; 0 when every kind is routed the same
                     way. Our measure: the paper defines none (docs/methods.md 1.7).
    collapse         an expert takes more than 90% of every kind of text, or the entropy of the mean routing is below
    0.1

Rows are those of `routing.parquet` (tasks/evaluation/evaluate.py). Expert 0 of an extended model is meant to take
nearly all tokens of the original languages, so collapse is measured over all kinds of text, with equal weights.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

COLLAPSED_SHARE = 0.9
COLLAPSED_ENTROPY = 0.1


@dataclass(frozen=True)
class LayerRouting:
    """Statistics of one layer. specialisation: between languages, and between the domains of one language (mean)."""

    layer: int
    experts: int
    entropy: float
    utilisation: float
    largest_share: float
    specialisation_language: float
    specialisation_domain: float
    collapsed: bool

    def row(self) -> dict[str, Any]:
        return asdict(self)


def describe_layers(rows: list[dict[str, Any]]) -> list[LayerRouting]:
    """One entry per layer, in order; none for a dense model."""
    layers: dict[int, dict[tuple[str, str], dict[int, tuple[float, int]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        layers[row["layer"]][row["language"], row["domain"]][row["expert"]] = row["share"], row["routed"]
    return [_describe(layer, kinds) for layer, kinds in sorted(layers.items())]


def collapsed_layers(rows: list[dict[str, Any]]) -> list[int]:
    return [each.layer for each in describe_layers(rows) if each.collapsed]


def _describe(layer: int, kinds: dict[tuple[str, str], dict[int, tuple[float, int]]]) -> LayerRouting:
    """kinds: {(language, domain): {expert: (share, number routed)}}."""
    experts = 1 + max(max(shares) for shares in kinds.values())
    table: dict[tuple[str, str], np.ndarray] = {}
    for kind, shares in kinds.items():
        table[kind] = np.zeros(experts)
        for expert, (share, _) in shares.items():
            table[kind][expert] = share
    by_language: dict[str, np.ndarray] = {}
    domains: list[float] = []
    for language in sorted({language for language, _ in table}):
        own = [kind for kind in table if kind[0] == language]
        routed = [float(kinds[kind][0][1]) for kind in own]
        by_language[language] = np.average([table[kind] for kind in own], axis=0, weights=routed)
        if len(own) > 1:
            domains.append(_information([table[kind] for kind in own]))
    mean = np.mean(list(by_language.values()), axis=0)
    entropy = _entropy(mean) / np.log2(experts) if experts > 1 else 1.0
    return LayerRouting(
        layer,
        experts,
        round(float(entropy), 6),
        float((mean > 1 / (4 * experts)).mean()),
        round(float(mean.max()), 6),
        round(_information(list(by_language.values())), 6),
        round(float(np.mean(domains)), 6) if domains else 0.0,
        bool(experts > 1 and (_leader_everywhere(table) > COLLAPSED_SHARE or entropy < COLLAPSED_ENTROPY)),
    )


def _leader_everywhere(table: dict[tuple[str, str], np.ndarray]) -> float:
    """The smallest share, over all kinds of text, of the expert with the largest overall share."""
    shares = np.stack(list(table.values()))
    return float(shares[:, shares.mean(0).argmax()].min())


def _information(shares: list[np.ndarray]) -> float:
    """Mutual information in bits between the kind of text (uniform) and the expert."""
    if len(shares) < 2:
        return 0.0
    return max(0.0, _entropy(np.mean(shares, axis=0)) - float(np.mean([_entropy(each) for each in shares])))


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())
