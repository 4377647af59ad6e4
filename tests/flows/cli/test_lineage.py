"""Every command that takes a run takes the same names for it, and refuses the same ones."""

import json

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.home import Home
from tests.support.history import RUNS, write_history

OLD, NEW = RUNS
COMMANDS = {
    "diff": ["diff", "RUN", NEW],
    "why": ["why", "RUN", "make checkpoint"],
    "bundle": ["bundle", "RUN", "-o", "OUT"],
    "openlineage": ["openlineage", "RUN", "-o", "OUT"],
    "keep": ["keep", "RUN"],
    "compare": ["compare", "RUN", "-o", "OUT"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home.open(tmp_path_factory.mktemp("runs") / "home")
    write_history(home)
    return home


@pytest.fixture
def answer(home, tmp_path, capsys, monkeypatch):
    """Runs a command for a run, as JSON where that succeeds: (exit code, stdout, stderr, its rows)."""
    monkeypatch.setenv("ECLECTUS_HOME", str(home.root))

    def run(command, name):
        words = [{"RUN": name, "OUT": str(tmp_path / command)}.get(word, word) for word in COMMANDS[command]]
        try:
            main(["--home", str(home.root), *words, "--json"])
            code = 0
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.err, [json.loads(line) for line in said.out.splitlines()]

    return run


def run_of(command, rows):
    """The run that a command's answer is about."""
    if command == "diff":
        (k,) = [row for row in rows if row["what"] == "setting" and row["label"] == "make checkpoint"]
        return OLD if (k["name"], k["a"]) == ("k", "20") else NEW
    if command == "why":
        assert [row["label"] for row in rows] == ["make checkpoint"]
        return None
    return next(row["run"] if "run" in row else row["runs"][0] for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [OLD, OLD[:8], "last~1"])
def test_an_id_a_unique_start_and_last_mean_the_same_run(answer, command, name):
    code, _, rows = answer(command, name)
    assert code == 0 and run_of(command, rows) in (OLD, None)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "diff"])
def test_last_is_the_newest_run(answer, command):
    code, _, rows = answer(command, "last")
    assert code == 0 and run_of(command, rows) in (NEW, None)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{OLD[:-1]}b", f"there is no run '{OLD[:-1]}b'; did you mean {OLD}"),
        ("nonsense", f"there is no run 'nonsense'; the latest are {NEW}, {OLD}; see: "),
        ("2026", f"'2026' is the start of 2 runs, such as {NEW}, {OLD}; write more of it"),
        ("last~2", "there is no run 'last~2'; there are 2 runs, the first one is last~1"),
        ("last~x", "there is no run 'last~x'; expected last or last~N, as in last~1"),
    ],
)
def test_an_unknown_or_ambiguous_run_is_one_line_with_the_nearest(answer, command, name, message):
    code, error, rows = answer(command, name)
    assert code == 2 and rows == [] and error.startswith(f"eclectus: {message}") and error.count("\n") == 1


def test_a_home_without_runs_says_so(tmp_path, capsys):
    Home.open(tmp_path / "empty")
    for command in COMMANDS:
        words = [{"RUN": "last", "OUT": str(tmp_path / command)}.get(word, word) for word in COMMANDS[command]]
        with pytest.raises(SystemExit):
            main(["--home", str(tmp_path / "empty"), *words])
        assert "there is no run 'last': this home has no runs yet" in capsys.readouterr().err
