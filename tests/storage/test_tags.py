"""Tags: names for artifacts, which never move, and are found wherever an artifact is."""

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query, walk
from eclectus.storage.lineage.garbage import plan
from eclectus.tasks.adoption import tag, untag
from tests.support.history import RUNS, write_history

FIRST, SECOND = (f"checkpoint-{digit * 64}" for digit in "ab")


def test_a_name_without_a_version_takes_the_next_one(store):
    assert store.tags.add("greek", FIRST) == "greek@1"
    assert store.tags.add("greek", SECOND) == "greek@2"
    assert store.tags.add("greek", SECOND) == "greek@2", "it has that tag already"
    assert store.tags.find("greek@1") == FIRST
    assert store.tags.find("greek@latest") == SECOND
    assert store.tags.all() == {"greek@1": FIRST, "greek@2": SECOND}


def test_a_version_never_moves(store):
    store.tags.add("greek@7", FIRST)
    assert store.tags.add("greek@7", FIRST) == "greek@7"
    with pytest.raises(EclectusError, match=r"greek@7 is checkpoint-a{12}, and a version never moves; .*greek@8"):
        store.tags.add("greek@7", SECOND)
    assert store.tags.remove("greek@7") == FIRST
    assert store.tags.add("greek@7", SECOND) == "greek@7"


@pytest.mark.parametrize("name", ["", "@1", "greek@0", "greek@x", "../up", "a/b@1", "gr eek", "greek@1@2", "x" * 65])
def test_what_cannot_be_a_tag_is_said_with_an_example(store, name):
    with pytest.raises(EclectusError, match="cannot be a tag; expected NAME or NAME@VERSION, such as greek@2"):
        store.tags.add(name, FIRST)


def test_an_unknown_tag_names_those_that_are_known(store):
    store.tags.add("greek", FIRST)
    with pytest.raises(EclectusError, match="no tag 'greek@3'; known tags: greek@1"):
        store.find("greek@3")
    with pytest.raises(EclectusError, match="no tag 'turkish@latest'; known tags: none of that name"):
        store.find("turkish@latest")
    for wrong in ("greek", "greek@latest"):
        with pytest.raises(EclectusError, match="no tag with a version"):
            store.tags.remove(wrong)


def test_a_tagged_artifact_is_found_shown_and_kept(home):
    write_history(home)
    old = query(f"select artifact from step_outputs where run = '{min(RUNS)}' and kind = 'checkpoint'", home)[1][0][0]
    for line in query("select distinct line from decisions", home)[1]:
        assert line
    name, artifact = tag(home, f"checkpoint-{old[:12]}", "greek", "for the paper", by="ana")
    assert (name, artifact.digest) == ("greek@1", old)
    assert home.store.find("greek@latest").digest == old
    assert query('select tag, artifact, "by", reason from tags', home)[1] == [("greek@1", old, "ana", "for the paper")]
    assert [row["note"] for row in walk("checkpoint-" + old[:12], home) if row["direction"] == "this"] == ["greek@1"]
    assert untag(home, "greek@1", by="ana") == artifact.name
    assert query("from tags", home)[1] == []
    with pytest.raises(EclectusError, match="no tag 'greek@1'"):
        home.store.find("greek@1")


def test_gc_leaves_what_has_a_tag_and_what_it_was_made_from(home):
    write_history(home, promote=max(RUNS))
    old = query(f"select artifact from step_outputs where run = '{min(RUNS)}' and kind = 'checkpoint'", home)[1][0][0]

    def unneeded():
        return {each.name.split("-")[0] for each in plan(home, 1).unneeded}

    assert "checkpoint" in unneeded()
    tag(home, old, "greek")
    assert unneeded() == {"evaluation"}
    untag(home, "greek@1")
    assert "checkpoint" in unneeded()
