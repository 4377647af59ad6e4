import pytest

from eclectus.storage.step_keys import KnownKeys, Record, differences


@pytest.fixture
def known(home):
    return KnownKeys(home.keys, home.store)


@pytest.fixture
def artifact(home):
    with home.store.draft("grouping") as draft:
        draft.file("order").write_text("1 2 3")
        return home.store.commit(draft)


def record(**changes):
    fields = {"step": "group", "version": 1, "settings": {"k": 20}, "inputs": {"documents": "documents-aa"}}
    return Record(**{**fields, **changes})


def test_a_key_depends_on_step_version_settings_and_inputs():
    keys = {
        record().key,
        record(step="other").key,
        record(version=2).key,
        record(settings={"k": 32}).key,
        record(inputs={"documents": "documents-bb"}).key,
    }
    assert len(keys) == 5
    assert record(settings={"a": 1, "k": 2}).key == record(settings={"k": 2, "a": 1}).key


def test_what_was_remembered_is_found_again_under_any_label(known, artifact):
    done = record()
    known.remember(
        Record(done.step, 1, done.settings, done.inputs, {"out": f"{artifact.kind}-{artifact.digest}"}), "group"
    )
    found, _ = known.find(done, "another label")
    assert found == {"out": artifact}


def test_a_damaged_artifact_is_never_reused_and_the_reason_says_so(known, artifact):
    done = record(settings={"k": 20})
    known.remember(Record("group", 1, {"k": 20}, done.inputs, {"out": f"grouping-{artifact.digest}"}), "group")
    artifact.file("order").write_text("3 2 1")
    found, reason = known.find(done, "group")
    assert found is None and "damaged: order changed" in reason


def test_the_reason_names_what_changed_since_the_label_last_ran(known, artifact):
    assert known.find(record(), "group") == (None, "first time")
    known.remember(
        Record("group", 1, {"k": 20}, {"documents": "documents-aa"}, {"out": f"grouping-{artifact.digest}"}), "group"
    )
    wanted = record(version=2, settings={"k": 32}, inputs={"documents": "documents-bb"})
    _, reason = known.find(wanted, "group")
    assert reason == "version 1 -> 2; settings.k 20 -> 32; input documents documents-aa -> documents-bb"


def test_many_differences_are_counted_not_listed():
    words = differences(record(settings={}), record(settings={str(number): number for number in range(20)}))
    assert words[-1] == "and 14 more"


def test_a_last_key_that_cannot_be_noted_ends_no_run_and_the_artifact_is_found(known, artifact, home, caplog):
    labels = home.keys / "labels"
    labels.parent.mkdir(parents=True, exist_ok=True)
    labels.write_text("a file where the folder should be: nothing can be written there")
    done = record()
    known.remember(
        Record("group", 1, done.settings, done.inputs, {"out": f"{artifact.kind}-{artifact.digest}"}), "group"
    )
    assert "the last key of 'group' was not noted" in caplog.text
    labels.unlink()
    assert known.find(done, "group")[0] == {"out": artifact}
