import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from pydantic import Field

from eclectus.flows.flow import once
from eclectus.flows.run import current_home, interrupts_noted
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.tasks.promotion.gate import Gate
from eclectus.tasks.promotion.promote import Candidate, decide
from eclectus.tasks.run import metric
from eclectus.tasks.settings import RuntimeSetting, Settings
from eclectus.tasks.step import step


class CountSettings(Settings):
    letters: int = Field(3, ge=1, description="How many letters.")
    workers: int = RuntimeSetting(1, "How many workers.")
    seed: int = Field(0, description="Seed of everything random.")


calls = []


@step(makes="documents", version=1)
def letters(settings: CountSettings, out):
    """Writes letters."""
    calls.append("letters")
    metric("written", settings.letters, language="en")
    out.file("letters").write_text("x" * settings.letters)


@step(makes="report", version=1)
def count(letters: Artifact, settings: CountSettings, out):
    """Counts letters."""
    calls.append("count")
    out.file("count").write_text(str(len(letters.file("letters").read_text())))


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def test_a_step_with_equal_settings_and_inputs_is_reused(run):
    first = letters(settings=CountSettings())
    assert letters(settings=CountSettings(workers=8)) == first
    assert calls == ["letters"]
    assert query("select state from steps order by started", run.home)[1] == [("completed",), ("reused",)]


def test_no_step_begins_after_an_interrupt_that_was_swallowed(run, interrupts):
    interrupts(signal.default_int_handler)
    letters(settings=CountSettings())
    with interrupts_noted(run):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            letters(settings=CountSettings(letters=4))
    assert calls == ["letters"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_was_ignored_before_the_run_is_ignored_in_it(run, interrupts):
    interrupts(signal.SIG_IGN)
    with interrupts_noted(run):
        os.kill(os.getpid(), signal.SIGINT)
        letters(settings=CountSettings())
    assert calls == ["letters"] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_changed_setting_runs_the_step_and_what_follows_and_says_why(run):
    for number in (3, 5):
        count(letters=letters(settings=CountSettings(letters=number)), settings=CountSettings())
    assert calls == ["letters", "count", "letters", "count"]
    reasons = [row[0] for row in query("select reason from steps order by started", run.home)[1]]
    assert reasons[2] == "settings.letters 3 -> 5"
    assert reasons[3].startswith("input letters documents-")


def test_a_damaged_artifact_is_made_again(run):
    artifact = letters(settings=CountSettings())
    artifact.file("letters").write_text("yyy")
    assert letters(settings=CountSettings()) == artifact
    assert calls == ["letters", "letters"] and artifact.file("letters").read_text() == "xxx"
    assert "damaged" in query("select reason from steps order by started desc limit 1", run.home)[1][0][0]


def test_lineage_knows_inputs_outputs_settings_seed_and_metrics(run):
    made = count(letters=letters(settings=CountSettings(letters=4, seed=7)), settings=CountSettings(seed=7))
    upstream = query(
        "select o.artifact, i.kind, i.artifact from step_outputs o join step_inputs i using (step) "
        "where o.kind = 'report'",
        run.home,
    )[1]
    assert upstream[0][:2] == (made.digest, "documents")
    assert query("select distinct seed from steps", run.home)[1] == [(7,)]
    assert query("select value, tags['language'] from metrics where name = 'written'", run.home)[1] == [(4.0, "en")]
    assert ("letters", "4") in query("select name, value from settings", run.home)[1]


def test_a_failed_step_is_recorded_and_leaves_no_artifact(run):
    @step(makes="documents", version=1)
    def broken(settings: CountSettings, out):
        out.file("half").write_text("half")
        raise EclectusError("file a.jsonl is missing")

    with pytest.raises(EclectusError, match=r"a\.jsonl"):
        broken(settings=CountSettings())
    assert query("select state, reason from steps", run.home)[1] == [
        ("failed", "EclectusError: file a.jsonl is missing")
    ]
    assert list(run.home.store.all()) == []


def test_misuse_is_named(run):
    with pytest.raises(EclectusError, match="has no input 'words'"):
        count(words=None, settings=CountSettings())
    with pytest.raises(EclectusError, match="is a str; expected artifacts"):
        count(letters="documents-1", settings=CountSettings())


def test_a_step_outside_a_run_says_what_to_do():
    with pytest.raises(EclectusError, match="outside a run"):
        letters(settings=CountSettings())


def test_two_that_want_the_same_thing_at_once_make_it_once(run):
    record = letters.record({"settings": CountSettings()})
    waited = []

    def hold_for_a_while():
        with run.known.hold(record.key, lambda: None):
            time.sleep(0.5)

    other = threading.Thread(target=hold_for_a_while)
    other.start()
    time.sleep(0.1)
    started = time.monotonic()
    with run.known.hold(record.key, lambda: waited.append(True)):
        assert time.monotonic() - started > 0.2 and waited == [True]
    other.join()


def test_settings_name_the_wrong_one_and_the_nearest_right_one():
    with pytest.raises(EclectusError, match=r"unknown setting 'leters' in my\.yaml; did you mean 'letters'"):
        CountSettings.read({"leters": 3}, "my.yaml")
    with pytest.raises(EclectusError, match=r"setting 'letters' in my\.yaml is 'many'"):
        CountSettings.read({"letters": "many"}, "my.yaml")
    with pytest.raises(EclectusError, match="greater than or equal to 1"):
        CountSettings.read({"letters": 0}, "my.yaml")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: once(SimpleNamespace(name="curate"), CountSettings()), "flow 'curate'"),
        (current_home, "current_home"),
        (
            lambda: decide(Gate("default", "stage 2", "dense", []), Candidate(Artifact("checkpoint", "0", "")), None),
            "promote.decide",
        ),
    ],
)
def test_what_needs_a_run_names_itself_outside_one(call, named):
    with pytest.raises(EclectusError, match=f"{named} was called outside a run; use eclectus.flows.run.open_run"):
        call()
