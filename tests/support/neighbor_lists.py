"""Neighbour lists of a grown corpus, and what must hold of any lists, for tests."""

import numpy as np

from eclectus.tasks.disk_matrix import open_matrix
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from tests.support.topics import write_documents, write_embeddings


def lists(artifact):
    return open_matrix(artifact, "neighbors")[:], open_matrix(artifact, "similarities")[:]


def check(artifact, vectors):
    """Every list: best first, no document twice nor in its own list, the similarities true."""
    rows, similarities = lists(artifact)
    for row, (near, cosines) in enumerate(zip(rows, similarities, strict=True)):
        there = near[near >= 0]
        assert (near[: len(there)] >= 0).all() and np.isnan(cosines[len(there) :]).all()
        assert len(np.unique(there)) == len(there) and row not in there
        assert (np.diff(cosines[: len(there)]) <= 0).all()
        assert np.allclose(cosines[: len(there)], vectors[there] @ vectors[row], atol=1e-5)


def recall(artifact, vectors):
    """Share of the exact neighbours that are listed, or as near as the last of them."""
    products = vectors @ vectors.T
    np.fill_diagonal(products, -np.inf)
    last = -np.sort(-products, axis=1)[:, 9:10]
    return float((lists(artifact)[1] >= last - 1e-5).mean())


def recall_within(artifact, vectors, here):
    products = vectors[here] @ vectors[here].T
    np.fill_diagonal(products, -np.inf)
    last = -np.sort(-products, axis=1)[:, 9:10]
    return float((lists(artifact)[1][here] >= last - 1e-5).mean())


def grown(store, rows, vectors, parts=2, ends=None, **settings):
    """Neighbours of these documents with these vectors, in the run under way; `embedding_key` marks one model. ends:
    of the parts of the embeddings."""
    documents = write_documents(store, rows, parts)
    ids = read_table(documents, ["document"])["document"].to_pylist()
    ask = {"curation_workers": 1, "neighbors_k": 10, "neighbors_exact_below": 200, **settings}
    embeddings = write_embeddings(store, vectors, ids, "one model", ends)
    return neighbors(documents=documents, embeddings=embeddings, settings=NeighborSettings(**ask))


def described(artifact, name="en"):
    return next(each for each in artifact.statistics["partitions"] if each["partition"] == name)
