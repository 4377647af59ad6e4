"""Decisions on checkpoints: recorded by any process, read in order, and the champion they lead to."""

import pytest

from eclectus.flows.cli.champions import champion_rows, rollback
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage import champions
from eclectus.storage.lineage.champions import PROMOTED, REFUSED, Decision, champion, decisions, record, user_name
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import query


def decide(home, checkpoint, verdict=PROMOTED, line="lory", **more):
    record(home, Decision(line, verdict, checkpoint, f"reason of {checkpoint}", **more))


def checkpoint(home, text):
    """The digest of a whole checkpoint."""
    with home.store.draft("checkpoint") as draft:
        draft.file("weights.txt").write_text(text)
        return home.store.commit(draft).digest


def test_the_champion_of_a_line_is_the_last_promoted_whatever_was_refused_since(home):
    assert champion(home, "lory") is None and decisions(home) == []
    decide(home, "a1")
    decide(home, "b2", REFUSED)
    decide(home, "c3", line="extended")
    assert champion(home, "lory").checkpoint == "a1" and champion(home, "extended").checkpoint == "c3"
    decide(home, "d4")
    assert champion(home, "lory").checkpoint == "d4"
    assert [each.checkpoint for each in decisions(home, "lory")] == ["a1", "b2", "d4"]
    assert query("select line, checkpoint from champions order by line", home)[1] == [
        ("extended", "c3"),
        ("lory", "d4"),
    ]


def test_a_decision_is_read_as_it_was_recorded_before_and_after_compaction(home):
    rules = [{"rule": "bits_per_byte", "passed": True, "reason": "1.5 < 2"}]
    record(home, Decision("lory", PROMOTED, "a1", "better", {"text": "e5"}, "f6", rules, "gate"), run="r1")
    for _ in range(2):
        (found,) = decisions(home)
        assert (found.evaluations, found.gate, found.rules, found.by, found.run) == (
            {"text": "e5"}, "f6", rules, "gate", "r1"
        )  # fmt: skip
        assert found.logged[:2] == "20"
        compact(home)


def test_a_decision_outside_a_run_has_an_id_of_its_own_and_the_users_name(home, monkeypatch):
    decide(home, "a1", by=user_name())
    (found,) = decisions(home)
    assert found.run.startswith("decision-") and found.by == user_name() and found.gate is None

    def no_user():
        raise KeyError("uid not found")

    monkeypatch.setattr(champions.getpass, "getuser", no_user)
    assert user_name() == "unknown user"


def test_rollbacks_go_back_one_champion_each(home, monkeypatch):
    monkeypatch.setenv("ECLECTUS_HOME", str(home.root))
    first, second, third = (checkpoint(home, text) for text in "abc")
    for each in (first, second, second, third):
        decide(home, each)
    assert rollback("lory").checkpoint == second
    assert rollback().checkpoint == first
    with pytest.raises(EclectusError, match="never had another champion"):
        rollback("lory")
    decide(home, third)
    assert rollback("lory").checkpoint == first
    assert champion(home, "lory").checkpoint == first
    assert "rolled back from checkpoint-" in champion(home, "lory").reason


def test_a_rollback_to_a_damaged_checkpoint_or_of_an_unknown_line_is_refused(home, monkeypatch):
    monkeypatch.setenv("ECLECTUS_HOME", str(home.root))
    with pytest.raises(EclectusError, match=r"which line\? no line has one yet"):
        rollback()
    first, second = (checkpoint(home, text) for text in "ab")
    for each in (first, second):
        decide(home, each)
    decide(home, second, line="extended")
    with pytest.raises(EclectusError, match="lines with a champion are lory, extended: choose one with --line"):
        rollback()
    with pytest.raises(EclectusError, match="line 'dense' has no champion"):
        rollback("dense")
    home.store.find(f"checkpoint-{first}").file("weights.txt").write_text("x")
    with pytest.raises(EclectusError, match=r"the previous champion cannot be restored: checkpoint-.* is damaged"):
        rollback("lory")
    assert champion(home, "lory").checkpoint == second


def test_the_command_lists_the_last_decision_of_each_checkpoint_or_all(home, monkeypatch):
    monkeypatch.setenv("ECLECTUS_HOME", str(home.root))
    for each, verdict in (("a1", PROMOTED), ("b2", REFUSED), ("b2", REFUSED), ("c3", PROMOTED)):
        decide(home, each, verdict)
    columns, rows = champion_rows(everything=False)
    assert columns[:3] == ["line", "is", "checkpoint"]
    assert [row[1:3] for row in rows] == [
        ("champion", "checkpoint-c3"), ("refused", "checkpoint-b2"), ("former champion", "checkpoint-a1")
    ]  # fmt: skip
    assert len(champion_rows(everything=True)[1]) == 4
