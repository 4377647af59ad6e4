"""How good a grouping is, in numbers and in a picture, before any training (docs/methods.md 1.6).

    adjacent similarity     mean cosine of documents that follow each other in the order
    random                  the same after a shuffle within each partition: the lower bound
    best neighbour          mean cosine with the nearest document of the graph: the upper bound
    restarts                share of documents at which a new chain begins

and, once instances are packed, the domain purity of an instance and the similarity across adjacent instances, which the
shuffle of instances should lower to that of random ones. Price: at most PAIRS pairs of embeddings are read per number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.grouping.nearest import Matrix, unit

PAIRS = 50_000
BLOCK = 32_768
BINS = 48
EDGES = (-0.2, 1.0)


def pair_similarities(vectors: Matrix, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines float32 [P] of the rows a [P] with the rows b [P]; NaN if one has no embedding."""
    cosines = np.empty(len(a), np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        for begin in range(0, len(a), BLOCK):
            part = slice(begin, begin + BLOCK)
            both = unit(vectors, np.concatenate([a[part], b[part]]))
            cosines[part] = np.einsum("nd,nd->n", both[: len(both) // 2], both[len(both) // 2 :])
    return cosines


def adjacent_similarities(vectors: Matrix, order: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Cosines float32 [M - 1] of the rows of `order` [M] with those that follow them; NaN if one has no embedding.

    known: float32 [M - 1], those that the search has measured; NaN for the others.
    """
    cosines = known.astype(np.float32)
    wanted = np.flatnonzero(np.isnan(known))
    cosines[wanted] = pair_similarities(vectors, order[wanted], order[wanted + 1])
    return cosines


def mean(values: np.ndarray) -> float | None:
    """The mean of the finite numbers, rounded; None if there are none."""
    values = values[np.isfinite(values)]
    return round(float(values.mean(dtype=np.float64)), 4) if len(values) else None


def order_quality(
    vectors: Matrix,
    order: np.ndarray,
    partitions: np.ndarray,
    restarts: np.ndarray,
    best: np.ndarray,
    domains: np.ndarray,
    adjacent: np.ndarray,
    seed: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The numbers of an order, and the similarities (adjacent, random, best) that the picture shows.

    vectors: [N, D]. order: rows int64 [M]. partitions: int [M], restarts: bool [M], in that order.
    best: float [M], similarity to the nearest document in the order. domains: [M], one label per document.
    adjacent: float [M - 1], of `adjacent_similarities`. At most PAIRS pairs are evaluated, drawn under the seed.
    """
    random = np.random.default_rng([seed, 1])
    inside = np.flatnonzero(partitions[1:] == partitions[:-1])
    chosen = _sample(inside, random)
    adjacent = adjacent[chosen]
    shuffled = _shuffled_within(partitions, random)
    at_random = pair_similarities(vectors, order[shuffled[chosen]], order[shuffled[chosen + 1]])
    restart = restarts[chosen + 1]
    numbers = {
        "adjacent_similarity": mean(adjacent),
        "random_similarity": mean(at_random),
        "best_neighbor_similarity": mean(best),
        "similarity_inside_chains": mean(adjacent[~restart]),
        "similarity_at_restarts": mean(adjacent[restart]),
        "restart_share": round(float(restarts.mean()), 4) if len(restarts) else None,
        "adjacent_same_domain": _share(domains[chosen] == domains[chosen + 1]),
        "random_same_domain": _share(domains[shuffled[chosen]] == domains[shuffled[chosen + 1]]),
    }
    return numbers, {"adjacent": adjacent, "random": at_random, "best neighbour": best}


def instance_quality(
    vectors: Matrix,
    rows: np.ndarray,
    offsets: np.ndarray,
    tokens: np.ndarray,
    domains: np.ndarray,
    seed: int = 0,
    following: np.ndarray | None = None,
) -> dict[str, float | None]:
    """The numbers of packed instances.

    vectors: [N, D], of all documents. rows: int64 [P], the documents (rows of `vectors`) of the instances, instance
    after instance in training order. offsets: int64 [I + 1], where each instance begins in `rows`. tokens: int [P],
    tokens of that document in that instance. domains: [N], one label per document. following: float [P], how similar
    each document is to the next one of its instance, where that is known.
    """
    random = np.random.default_rng([seed, 2])
    instance = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    inside = np.flatnonzero((instance[1:] == instance[:-1]) & (rows[1:] != rows[:-1]))
    across = np.flatnonzero(instance[1:] != instance[:-1])
    inside, across = _sample(inside, random), _sample(across, random)
    # Long documents are at more borders than short ones, so the baseline is taken at the borders of random instances.
    count = len(offsets) - 1
    a = random.integers(0, max(1, count), min(PAIRS, count) if count > 1 else 0)
    b = (a + random.integers(1, max(2, count), len(a))) % max(1, count)
    ends, heads = rows[offsets[a + 1] - 1], rows[offsets[b]]
    labels = np.unique(domains, return_inverse=True)[1]
    within = pair_similarities(vectors, rows[inside], rows[inside + 1]) if following is None else following[inside]
    return {
        "instance_domain_purity": _purity(instance, labels[rows], tokens),
        "random_domain_purity": _purity(instance, labels[rows][random.permutation(len(rows))], tokens),
        "similarity_within_instances": mean(within),
        "similarity_across_instances": mean(pair_similarities(vectors, rows[across], rows[across + 1])),
        "similarity_across_random_instances": mean(pair_similarities(vectors, ends, heads)),
    }


def draw(path: Path, similarities: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
    """Writes the histogram of similarities of adjacent, random and nearest documents. Equal input gives equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, values), color in zip(similarities.items(), ("#1f77b4", "#999999", "#2ca02c"), strict=True):
        values = values[np.isfinite(values)]
        if len(values):
            heights, edges = np.histogram(np.clip(values, *EDGES), BINS, EDGES)
            label = f"{name} (mean {values.mean(dtype=np.float64):.2f})"
            axes.stairs(heights / len(values), edges, label=label, color=color, fill=name == "adjacent", alpha=0.8)
    axes.set_xlabel("cosine similarity of two documents")
    axes.set_ylabel("share of pairs")
    restarts = numbers["restart_share"]
    axes.set_title(f"{numbers['grouped']} documents in order, {100 * (restarts or 0):.1f}% restarts", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _sample(positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """At most PAIRS of the positions, ascending."""
    return positions if len(positions) <= PAIRS else np.sort(random.choice(positions, PAIRS, replace=False))


def _shuffled_within(partitions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A permutation [M] within each partition."""
    shuffled = np.empty(len(partitions), np.int64)
    shuffled[np.argsort(partitions, kind="stable")] = np.lexsort((random.random(len(partitions)), partitions))
    return shuffled


def _purity(instance: np.ndarray, labels: np.ndarray, tokens: np.ndarray) -> float | None:
    """Mean over instances of the share of tokens that have the instance's most frequent label."""
    if len(instance) == 0:
        return None
    kinds = int(labels.max()) + 1
    pairs, pair = np.unique(instance.astype(np.int64) * kinds + labels, return_inverse=True)
    counts = np.bincount(pair, weights=tokens)
    largest, total = np.zeros(instance[-1] + 1), np.zeros(instance[-1] + 1)
    np.maximum.at(largest, pairs // kinds, counts)
    np.add.at(total, pairs // kinds, counts)
    return round(float((largest[total > 0] / total[total > 0]).mean()), 4)


def _share(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None
