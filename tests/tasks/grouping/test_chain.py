import os
import subprocess
import sys

import numpy as np
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.grouping.chain import chain_with_restarts
from eclectus.tasks.grouping.group import chain
from tests.support.topics import unit_vectors


def nearest(vectors, k):
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(cosines, rows, axis=1)


def plain_chain(neighbors, similarities):
    """docs/methods.md 1.6 in plain Python: symmetrised graph, minimum-degree starts, greedy best unused neighbour."""
    count = len(neighbors)
    graph = [{} for _ in range(count)]
    for i in range(count):
        for j, similarity in zip(neighbors[i].tolist(), similarities[i].tolist(), strict=True):
            if j >= 0 and j != i and similarity == similarity:
                graph[i][j] = max(similarity, graph[i].get(j, -np.inf))
                graph[j][i] = max(similarity, graph[j].get(i, -np.inf))
    starts = sorted(range(count), key=lambda i: (len(graph[i]), i))
    used, order, restarts, last = set(), [], [], None
    for _ in range(count):
        free = [(-similarity, j) for j, similarity in graph[last].items() if j not in used] if last is not None else []
        restarts.append(not free)
        last = min(free)[1] if free else next(i for i in starts if i not in used)
        used.add(last)
        order.append(last)
    return order, restarts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_equals_the_published_algorithm_in_plain_python(seed, kind):
    neighbors, similarities = nearest(unit_vectors(300, 16, seed), 6)
    random = np.random.default_rng(seed)
    neighbors[random.random(neighbors.shape) < 0.2] = -1
    similarities[random.random(neighbors.shape) < 0.05] = np.nan
    similarities = np.round(similarities, 1).astype(np.float32)  # many ties
    order, restarts = chain_with_restarts(neighbors.astype(kind), similarities)
    assert (order.tolist(), restarts.tolist()) == plain_chain(neighbors, similarities)


def test_double_precision_is_not_rounded_into_ties():
    random = np.random.default_rng(0)
    neighbors = np.stack([random.choice(200, 8, replace=False) for _ in range(200)]).astype(np.uint32)
    similarities = 0.5 + 1e-12 * random.random(neighbors.shape)
    order, restarts = chain_with_restarts(neighbors, similarities)
    assert (order.tolist(), restarts.tolist()) == plain_chain(neighbors, similarities)


def test_every_document_once_and_the_same_twice():
    neighbors, similarities = nearest(unit_vectors(2000, 8), 20)
    order = chain(neighbors, similarities)
    assert np.array_equal(np.sort(order), np.arange(2000))
    assert np.array_equal(order, chain(neighbors, similarities))


def test_adjacent_documents_are_far_more_alike_than_at_random():
    vectors = unit_vectors(1000, 16)
    neighbors, similarities = nearest(vectors, 20)
    order = chain(neighbors, similarities)
    adjacent = (vectors[order[1:]] * vectors[order[:-1]]).sum(axis=1).mean()
    best = similarities[:, 0].mean()
    assert adjacent > 0.9 * best
    assert abs((vectors[1:] * vectors[:-1]).sum(axis=1).mean()) < 0.5 * best


def test_documents_without_neighbours_are_kept_each_as_a_chain():
    order, restarts = chain_with_restarts(np.full((5, 3), -1), np.full((5, 3), np.nan))
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert restarts.all()


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (3, 0)])
def test_empty_and_single(shape):
    assert sorted(chain(np.full(shape, -1), np.zeros(shape, np.float32)).tolist()) == list(range(shape[0]))


def test_equal_documents_chain_in_row_order():
    neighbors = np.array([[j for j in range(6) if j != i] for i in range(6)])
    assert chain(neighbors, np.ones((6, 5))).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("neighbors", "similarities", "words"),
    [
        (np.zeros((3, 2), int), np.zeros((3, 3)), "must both be"),
        (np.zeros((3, 2)), np.zeros((3, 2)), "expected integers"),
        (np.full((3, 2), 3), np.zeros((3, 2)), "document 0 lists neighbour 3"),
    ],
)
def test_wrong_input_is_named(neighbors, similarities, words):
    with pytest.raises(EclectusError, match=words):
        chain(neighbors, similarities)


@pytest.mark.slow
def test_compiles_where_nothing_can_be_cached(tmp_path):
    program = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import numpy as np\nfrom eclectus.tasks.grouping.group import chain\n"
        "print(chain(np.array([[1], [0]]), np.ones((2, 1))).tolist())"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "[0, 1]", done.stderr
