"""Rows on a terminal and in a pipe: whole, streamed, in bounded memory."""

import io
import json
import os
import re
import subprocess
import sys
import time

import pytest

from eclectus.flows.cli import rows
from eclectus.flows.cli.rows import FIRST, print_rows
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect, querying
from tests.support.history import write_history


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home.open(tmp_path_factory.mktemp("rows") / "home")
    write_history(home)
    connect(home).close()
    return home


def test_a_pipe_gets_every_cell_whole_and_every_row_on_one_line(capsys):
    print_rows(["name", "n"], [("x" * 300, 1), ("two\nlines", None)], False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["name", "n"], ["x" * 300, "1"], ["two\\nlines"]]
    assert lines[0].index("n", 5) == lines[1].index("1")


def test_rows_are_printed_before_the_last_one_is_known(capsys):
    seen = []

    def endless():
        for number in range(FIRST + 10):
            seen.append(number)
            yield (number,)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        print_rows(["n"], endless(), False)
    assert capsys.readouterr().out.split()[1:] == [str(number) for number in seen]


def test_json_rows_are_printed_as_they_come(capsys):
    print_rows(["a", "b"], iter([(1, "ü"), (None, [2])]), True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"a": 1, "b": "ü"},
        {"a": None, "b": [2]},
    ]


def test_a_short_table_fits_the_terminal_and_a_long_one_is_streamed(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(rows.sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    print_rows(["word"], [("w" * 100,)], False)
    # The styles of the head take no room on the screen.
    assert max(map(len, re.sub(r"\x1b\[\d*m", "", terminal.getvalue()).splitlines())) <= 40
    print_rows(["word"], [("w" * 100,)] * FIRST, False)
    assert max(map(len, terminal.getvalue().splitlines())) == 100


def test_no_row_and_no_result_print_a_head_or_nothing(capsys):
    print_rows(["a", "b"], [], False)
    assert capsys.readouterr().out.split() == ["a", "b"]
    print_rows([], [], False)
    assert not capsys.readouterr().out.strip()


def test_a_query_of_a_billion_rows_answers_at_once_and_an_error_on_the_way_is_ours(home):
    started = time.process_time()
    with querying("from range(1_000_000_000)", home) as (names, answer):
        assert names == ["range"]
        assert next(answer) == (0,)
    assert time.process_time() - started < 2
    failing = "select case when range = 300000 then error('spoiled') else range end as n from range(300_001)"
    with pytest.raises(EclectusError, match="spoiled"), querying(failing, home) as (_, answer):
        list(answer)


def test_head_ends_a_long_query_without_a_word(home):
    command = [sys.executable, "-m", "eclectus", "--home", str(home.root), "sql", "from range(1_000_000_000)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as process:
        assert [process.stdout.readline().split() for _ in range(2)] == [[b"range"], [b"0"]]
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
