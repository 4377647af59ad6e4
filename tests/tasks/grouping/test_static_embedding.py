from pathlib import Path

import numpy as np
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.grouping.static_embedding import SEEN, StaticEmbeddingSettings, train_embedding
from eclectus.tasks.grouping.static_model import StaticModel
from eclectus.tasks.run import Run, activate
from tests.support.topics import TOPICS, make, topical, write_documents

SMALL = {"embedding_dimension": 16, "embedding_vocabulary": 600, "embedding_steps": 20}


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


@pytest.fixture
def run(tmp_path):
    home = Home.open(tmp_path / "home")
    with activate(Run("r", home, Journal(home.journal, "r"), KnownKeys(home.keys, home.store))) as run:
        yield run


def trained(store, rows, **settings):
    documents = write_documents(store, rows)
    return make(store, train_embedding, documents=documents, settings=StaticEmbeddingSettings(**{**SMALL, **settings}))


def test_topics_of_unseen_documents_are_separated_in_every_language(store):
    """test_embed.py compares with what sentence-transformers computes from the same folder."""
    model = StaticModel.load(Path(trained(store, topical(dict.fromkeys(TOPICS, 30))).path))
    unseen = topical(dict.fromkeys(TOPICS, 10), seed=1)
    vectors = model.encode([row["text"] for row in unseen])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.array([row["language"] + row["domain"] for row in unseen])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    assert (labels[cosines.argmax(axis=1)] == labels).mean() > 0.95


def test_is_the_same_twice_and_another_under_another_seed(store):
    rows = topical({"en/sea": 40, "zh/law": 40})
    assert trained(store, rows) == trained(store, rows)
    assert trained(store, rows) != trained(store, rows, seed=1)


def test_contrastive_steps_lower_the_loss(store):
    statistics = trained(store, topical(dict.fromkeys(TOPICS, 30)), embedding_steps=40).statistics
    assert statistics["last_loss"] < statistics["first_loss"]


@pytest.mark.parametrize("setting", [{"embedding_temperature": 1e-38}, {"embedding_learning_rate": 1e38}])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_training_that_diverges_is_an_error_that_names_step_and_settings(store, setting):
    name = next(iter(setting))
    with pytest.raises(EclectusError, match=rf"diverged at step \d+ .*'{name}'"):
        trained(store, topical(dict.fromkeys(TOPICS, 30)), **setting)


def test_held_out_and_excluded_documents_are_not_trained_on(store):
    rows = topical({"en/sea": 30})
    more = [
        {**row, "split": split} for row, split in zip(topical({"en/law": 20}), ["heldout", "apart"] * 10, strict=True)
    ]
    assert trained(store, rows).digest == trained(store, rows + more).digest


def test_a_sample_of_a_large_corpus_is_trained_on(store):
    assert trained(store, topical({"en/sea": 50}), embedding_sample=20).statistics["documents"] == 20


@pytest.mark.parametrize("text", ["", "a", "  \n "])
def test_one_document_even_an_empty_one_gives_a_model(store, text):
    assert trained(store, [{"text": text, "language": "en"}]).statistics["dimension"] == 16


def test_no_document_is_one_clear_line(store):
    with pytest.raises(EclectusError, match="no document in the train split"):
        trained(store, [])


def test_a_growing_corpus_keeps_its_model_until_it_has_grown_too_much(run):
    rows, store = topical({"en/sea": 60, "el/sea": 60}), run.home.store

    def model(count, **settings):
        documents = write_documents(store, rows[:count])
        return train_embedding(documents=documents, settings=StaticEmbeddingSettings(**{**SMALL, **settings}))

    first = model(100)
    assert model(105) == first
    assert model(105, embedding_growth=0) != first
    assert model(120) != first
    assert model(105, embedding_steps=19) != first
    assert len(np.load(first.file(SEEN))) == 100
