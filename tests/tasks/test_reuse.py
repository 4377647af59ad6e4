"""Where a step goes on from what was made before, in this home or on the object store behind it."""

import uuid

import pytest

from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import Run, activate


def made(home, text, **statistics):
    with home.store.draft("embeddings") as out:
        out.file("ids.npy").write_text(text)
        out.statistics = statistics
        return home.store.commit(out)


def running(home):
    return activate(Run("run", home, Journal(home.journal, "run"), KnownKeys(home.keys, home.store)))


def test_only_what_fits_is_found_and_a_damaged_one_is_not_whole(run):
    assert list(earlier("embeddings", embedding_key="a")) == []
    one, _ = made(run.home, "one", embedding_key="a"), made(run.home, "two", embedding_key="b")
    (run.home.store.root / "embeddings" / "half").mkdir()
    (found,) = earlier("embeddings", embedding_key="a")
    assert found == one and is_whole(found)
    one.file("ids.npy").write_text("other")
    (found,) = earlier("embeddings", embedding_key="a")
    assert not is_whole(found)


def test_outside_a_run_nothing_is_taken_over(home):
    artifact = made(home, "one")
    assert list(earlier("embeddings")) == [] and not is_whole(artifact)


@pytest.mark.usefixtures("object_store")
def test_a_machine_that_has_none_brings_one_that_fits_from_the_object_store(tmp_path, monkeypatch):
    url = f"s3://models/{uuid.uuid4().hex}"
    monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / "one"))
    one = Home.open(url)
    wanted = made(one, "one", embedding_key="a")
    made(one, "two", embedding_key="b")
    monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / "two"))
    two = Home.open(url)
    with running(two):
        (found,) = earlier("embeddings", embedding_key="a")
        assert found.digest == wanted.digest and is_whole(found)
        assert found.file("ids.npy").read_text() == "one" and str(tmp_path / "two") in found.path
    assert len(list((two.store.root / "embeddings").iterdir())) == 1
