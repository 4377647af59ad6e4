import hashlib
from collections import Counter

import numpy as np
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import SplitSettings, draws, split
from tests.support.topics import make, numbered, splits, tally


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def test_every_large_stratum_holds_out_its_share_within_the_bounds(store):
    counts = {("en", "code"): 60, ("en", "novels"): 3000, ("el", "help"): 400, ("tr", "help"): 2000}
    settings = SplitSettings(heldout_fraction=0.05, heldout_minimum=10, heldout_maximum=50)
    documents = make(store, split, documents=numbered(store, counts), settings=settings)
    held = {key[:2]: n for key, n in tally(documents, "language", "domain", "split").items() if key[2] == "heldout"}
    assert all(10 <= held[key] <= 50 for key in counts)
    assert held["en", "novels"] > 30 and documents.statistics["heldout"] == sum(held.values())
    assert documents.statistics["by_language"]["en"]["code"]["heldout"] == held["en", "code"]


def test_a_small_language_keeps_some_to_train_on_and_holds_out_one(store):
    counts = {("en", "a"): 100, ("el", "a"): 3, ("tr", "a"): 1, ("tr", "b"): 1, ("es", "a"): 1}
    documents = make(store, split, documents=numbered(store, counts), settings=SplitSettings())
    found = tally(documents, "language", "split")
    assert (found["el", "train"], found["el", "heldout"]) == (2, 1)
    assert (found["tr", "train"], found["tr", "heldout"]) == (1, 1)
    assert (found["es", "train"], found["es", "heldout"]) == (1, 0)
    assert documents.statistics["without_heldout"] == ["es"]


def test_documents_of_other_languages_are_in_neither_split(store):
    documents = make(
        store, split, documents=numbered(store, {("en", "a"): 100, ("fr", "a"): 100}), settings=SplitSettings()
    )
    assert tally(documents, "language", "split")["fr", "apart"] == 100
    with pytest.raises(EclectusError, match="no document is left to train on: 5 documents, 5 of them excluded"):
        make(store, split, documents=numbered(store, {("fr", "a"): 5}), settings=SplitSettings())


@pytest.mark.parametrize("more", [30, 300, 3000])
def test_no_trained_document_becomes_held_out_when_documents_are_added(store, more):
    counts = {("en", "a"): 1000, ("el", "b"): 70}
    settings = SplitSettings(heldout_maximum=60)
    before = splits(make(store, split, documents=numbered(store, counts), settings=settings))
    with_more = {("en", "a"): 1000 + more, ("el", "b"): 70 + more}
    after = splits(make(store, split, documents=numbered(store, with_more), settings=settings))
    moved = Counter((old, after[document]) for document, old in before.items() if after[document] != old)
    assert moved["train", "heldout"] == 0
    assert more > 30 or sum(moved.values()) < 5


def test_the_seed_decides_and_decides_alone(store):
    documents = numbered(store, {("en", "a"): 500})
    first, again, other = (
        make(store, split, documents=documents, settings=SplitSettings(seed=seed)) for seed in (0, 0, 1)
    )
    assert first.digest == again.digest != other.digest


def test_draws_are_uniform_and_independent_between_purposes():
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(20_000)]
    one, two = draws(ids, "split", 0), draws(ids, "replay", 0)
    assert abs(one.mean() - 0.5) < 0.01 and one.min() >= 0 and one.max() < 1
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
