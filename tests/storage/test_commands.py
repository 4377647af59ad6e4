"""Printed commands and paths can be pasted: a shell takes them apart into the words that were meant."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from eclectus.storage import commands
from eclectus.storage.commands import command, near, quoted, quoted_word
from eclectus.storage.home import Home

HOSTILE = [
    "plain", "two words", "it's $HOME [1] ü", 'a"b', "$(touch pwned)", "`touch pwned`", "a;touch pwned", "a&b|c",
    "*?{a,b}",
    "-rf", "--home", "~", "!history", "#comment", "a\tb", "a>b<c", "(x)", "%s%n", "日本語", "a=b", "🙂", "^$", "a\nb",
    "...", ":smile:", "[red]x[/red]",
]  # fmt: skip


def words_of(line, folder):
    """The words that a shell makes of a command line."""
    shell = ["sh", "-c", f'set -- {line}\nfor each; do printf "%s\\0" "$each"; done']
    return subprocess.run(shell, cwd=folder, capture_output=True, check=True).stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shell_reads_the_home_and_every_word_as_they_were_meant(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "_program", lambda: ["eclectus"])
    for home in (tmp_path / name, Path(name)):
        line = command("sql", name, home=home)
        program, option, named, verb, last = words_of(line, tmp_path)
        assert (program, option, verb, last) == ("eclectus", "--home", "sql", name)
        assert Path(named).absolute() == tmp_path / name and not named.startswith("-")
    assert words_of(quoted(tmp_path / name), tmp_path) == [near(name)]
    assert os.listdir(tmp_path) == []


def test_a_home_elsewhere_keeps_its_whole_path_and_one_inside_is_relative(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("ECLECTUS_HOME", raising=False)
    assert near(tmp_path / "there") == str(tmp_path / "there")
    assert near(here / "..there") == "..there"
    assert "--home" not in shlex.split(command("runs")) and "--home" not in command("runs", home=here / "home")
    # Where the variable is set, the default must be named too.
    monkeypatch.setenv("ECLECTUS_HOME", str(tmp_path / "there"))
    assert shlex.split(command("runs"))[-3:] == ["--home", str(tmp_path / "there"), "runs"]
    assert shlex.split(command("runs", home=here / "home"))[-3:] == ["--home", "home", "runs"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://models/a b/$x", "s3://models/a b/$x"),
        ("s3://me:hunter2hunter2@models/x", "s3://me:***@models/x"),
        ("s3://models/x?endpoint=http://e:9000&region=r", "s3://models/x?endpoint=http://e:9000&region=r"),
    ],
)
def test_a_store_is_named_by_its_url_and_not_by_its_cache_or_its_password(tmp_path, url, shown):
    assert words_of(command("runs", home=url), tmp_path)[-3:] == ["--home", shown, "runs"]


def test_the_program_is_named_so_that_the_shell_finds_the_same_one(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("python", "eclectus"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert command("runs", home="s3://a/b").startswith("eclectus --home")
    monkeypatch.setenv("PATH", "/nowhere")
    assert command("runs", home="s3://a/b").startswith("bin/eclectus --home")
    (tmp_path / "bin" / "eclectus").unlink()
    assert shlex.split(command("runs", home="s3://a/b"))[:3] == [str(tmp_path / "bin" / "python"), "-m", "eclectus"]


def test_a_home_is_shown_as_it_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Home.open("it's $HOME [1] ü").shown == shlex.quote("it's $HOME [1] ü")
    assert Home.open(tmp_path / "-x").shown == "./-x"


@pytest.mark.parametrize(
    "word", ["select 'a'", "it's $HOME", "a'\"b", "'`ls`'", "'\\'", "'!'", "'a\nb'", "", "~", "a b", "'*'"]
)
def test_a_word_is_the_same_after_the_shell_and_sql_stays_readable(word):
    shell = ["bash", "-c", f"printf '%s\\0' {quoted_word(word)}"]
    assert subprocess.run(shell, capture_output=True, check=True).stdout.decode() == f"{word}\0"
    assert quoted_word("select 'a'") == "\"select 'a'\""
