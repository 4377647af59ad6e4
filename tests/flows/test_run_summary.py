"""The summary of a run on its page, and the column `why`, in words."""

from __future__ import annotations

import re
import shlex
from types import SimpleNamespace

import pytest

from eclectus.flows.run_summary import Link, Row, questions, summary, why
from eclectus.storage.home import Home
from eclectus.storage.step_keys import Record, differences

RUN = "20261129-031147-798e32"


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("completed", "first time", "it was never made before"),
        ("reused", "same settings and inputs; every file is as it was written", "nothing changed since it was made"),
        ("completed", "settings.k 20 -> 32", "setting k changed from 20 to 32"),
        ("completed", 'settings.sources ["a; b"] -> ["c"]; settings.k 1 -> 2',
         'setting sources changed from ["a; b"] to ["c"]; setting k changed from 1 to 2'),
        ("completed", 'settings.texts "aaa... -> "bbb...', "setting texts changed"),
        ("completed", "input documents documents-1a2b3c4d5e6f -> documents-6f5e4d3c2b1a", "documents changed"),
        ("completed", "input review none -> instances-1a2b3c4d5e6f; and 3 more", "review is a new input; and 3 more"),
        ("completed", "input review instances-1a2b3c4d5e6f -> none", "review is no longer an input"),
        ("completed", "version 1 -> 2", "the step's code has a new version (1 to 2)"),
        ("completed", "checkpoint-1a2b3c4d5e6f is gone", "its result was deleted"),
        ("completed", "checkpoint-1a2b3c4d5e6f is damaged: a.bin changed", "its result was damaged (a.bin changed)"),
        ("failed", "EclectusError: source 'x' is gone; check it", "source 'x' is gone; check it"),
        ("failed", "ValueError: boom", "ValueError: boom"),
    ],
)  # fmt: skip
def test_why_is_in_words_without_digests(state, reason, words):
    assert why(state, reason) == words


def test_the_lineages_own_reasons_become_words():
    before = Record("group", 1, {"k": 20, "long": "x" * 90, "gone": None}, {"documents": f"documents-{'1a' * 32}"})
    after = Record("group", 2, {"k": 32, "long": "y" * 90, "new": [1]}, {"documents": f"documents-{'2b' * 32}"})
    words = why("completed", "; ".join(differences(before, after)))
    assert not re.search(r"[0-9a-f]{12}|->|settings\.|\.\.\.", words)
    assert words.startswith("the step's code has a new version (1 to 2); setting k changed from 20 to 32")


def test_the_summary_has_the_run_its_commands_and_a_line_per_step_with_its_page(tmp_path):
    run = SimpleNamespace(id=RUN, home=Home.open(tmp_path / "a home"))
    rows = [
        Row("train stage 1", "completed", 12.34, 'settings.lr "a|b" -> "<b>*x*"', "checkpoint-1a2b", "/artifacts/1"),
        Row("data_report", "reused", 0.0, "same settings and inputs", "report-3c4d"),
        Row("pack [new]", "failed", 1.0, "EclectusError: no `text`; check it"),
    ]
    text = summary(run, rows, [Link("open report", "http://127.0.0.1/r.html", "the page")], ended=False)
    assert f"Run `{RUN}`: so far 3 steps (1 made, 1 reused, 1 failed)." in text
    assert "[open report](http://127.0.0.1/r.html): the page" in text
    assert "| [train stage 1](/artifacts/1) | made | 12.3 | setting lr changed from" in text
    assert "| data_report | reused | 0.0 | nothing changed since it was made | report-3c4d |" in text
    assert "Step **pack [new]** failed: no &#96;text&#96;; check it" in text
    # Nothing of a user's text is markup.
    assert "<b>" not in text and "*x*" not in text and '"a|b"' not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [6] * 5
    assert "so far" not in summary(run, rows, [], ended=True)


def test_the_commands_of_the_summary_can_be_pasted(tmp_path):
    run = SimpleNamespace(id=RUN, home=Home.open(tmp_path / "a home's"))
    words = [shlex.split(command) for command in questions(run, [Row("train stage 1", "completed", 1.0)])]
    assert [each[:3] for each in words] == [["eclectus", "--home", str(tmp_path / "a home's")]] * 3
    assert [each[3:] for each in words] == [
        ["sql", f"from steps where run = '{RUN}'"],
        ["why", RUN, "train stage 1"],
        ["bundle", RUN],
    ]
