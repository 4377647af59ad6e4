"""A mistyped home: whoever asks is told, and none is made; only flows and `up` make one."""

from __future__ import annotations

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect

QUESTIONS = [
    "runs", "sql from_runs", "lineage abcd1234", "trace 12345678", "diff a b", "compare a b", "why a b", "verify",
    "bundle a", "openlineage a", "keep a", "gc", "gc --yes", "compact", "champions", "rollback", "down",
]  # fmt: skip


@pytest.mark.parametrize("words", QUESTIONS)
def test_a_question_names_the_home_that_is_not_there_and_makes_none(tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Home.open(tmp_path / "home-of-team")
    with pytest.raises(SystemExit) as ended:
        main(["--home", "home-of-taem", *words.split()])
    assert ended.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and f"no home at {tmp_path / 'home-of-taem'}" in shown[0]
    assert "did you mean home-of-team?" in shown[0]
    assert [path.name for path in tmp_path.iterdir()] == ["home-of-team"]


def test_so_does_python(tmp_path):
    with pytest.raises(EclectusError, match="there is no home at"):
        connect(tmp_path / "typo")
    assert not any(tmp_path.iterdir())


def test_exporting_a_folder_needs_no_home(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["export", "nowhere", "out"])
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()
