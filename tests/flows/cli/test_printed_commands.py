"""Every command line that a command prints runs in a shell, from the current folder, whatever the home is called."""

import os
import re
import shlex
import subprocess
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from eclectus.flows.cli.summary import summarize
from eclectus.flows.cli.terminal import Terminal
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.run import Run
from tests.support.command_line import run_command

ROOT = Path(__file__).parents[3]
HOSTILE = "it's $HOME [1] ü"
# As far as the end of the line, or of the parenthesis in which it stands.
PRINTED = re.compile(r"(?:^  |: )(\S*(?:eclectus|python -m eclectus) .*?)(?:\)?$)", re.M)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A home with one run of one step, in a folder whose name is as hostile, and no other home set."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("ECLECTUS_HOME", raising=False)
    return folder


def filled(home):
    with home.store.draft("report") as draft:
        for page in ("report.html", "data.html"):
            draft.file(page).write_text(page)
        report = home.store.commit(draft)
    with Journal(home.journal, "20260101-000000-abcdef", home.mirror) as journal:
        journal.event("run_started", flow="curate", parameters={}, packages={})
        step = {"step": "1", "name": "group", "label": "group"}
        journal.event("step_started", flow="curate", key="k", **step)
        journal.event("step_ended", flow="curate", state="completed", reason="first", seconds=1.0, key="k", **step)
        journal.event("run_ended", state="completed", seconds=1.0)
    return report


def commands_in(text):
    return [each.strip() for each in PRINTED.findall(text)]


def pasted(line):
    """Runs a printed line in a shell, and expects it to know its home and to succeed."""
    kept = {name: value for name, value in os.environ.items() if name != "ECLECTUS_HOME"}
    environment = kept | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, check=True).stdout


def summary_of(home, capsys):
    report = filled(home)
    with Journal(home.journal, "20260101-000000-abcdef", home.mirror) as journal:
        run = Run(
            "20260101-000000-abcdef", home, journal, KnownKeys(home.keys, home.store), states={"group": "completed"}
        )
        terminal = Terminal()
        summarize(run, SimpleNamespace(report=report), terminal)
    return capsys.readouterr().out


def test_what_a_run_says_to_try_next_can_be_pasted(world, capsys):
    text = summary_of(Home.open(HOSTILE), capsys)
    lines = commands_in(text)
    assert len(lines) == 3
    assert [shlex.split(line)[1:3] for line in lines] == [["--home", HOSTILE]] * 3
    assert "completed" in pasted(lines[0]) and "first" in pasted(lines[2])
    report = next(line for line in text.splitlines() if line.startswith("  report"))
    (path,) = shlex.split(report)[1:]
    assert Path(path).read_text() == "report.html"
    assert os.listdir(world) == [HOSTILE]


def test_what_a_run_in_an_object_store_says_to_try_next_names_its_url(world, object_store, capsys, monkeypatch):
    monkeypatch.setenv("ECLECTUS_CACHE", str(world / "cache"))
    url = f"s3://models/{uuid.uuid4().hex}"
    text = summary_of(Home.open(url), capsys)
    lines = commands_in(text)
    assert [shlex.split(line)[1:3] for line in lines] == [["--home", url]] * 3
    assert "completed" in pasted(lines[0])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gc", "--runs", "0"], ["gc", "--runs", "0", "--yes"]),
        (["lineage", "checkpoint-1234"], ["sql", "from artifacts"]),
        (["why", "20250101", "group"], ["runs"]),
        (["verify", "report-ffff"], ["sql", "from artifacts"]),
        (["promote", "report-ffff"], ["sql", "from artifacts"]),
        (["bundle", "last", "-o", "-it's.duckdb"], []),
        (["export", "checkpoint-ffff", "out"], ["sql", "from artifacts"]),
    ],
)
def test_what_a_command_advises_names_its_home_and_can_be_pasted(world, capsys, words, expected):
    filled(Home.open(HOSTILE))
    (world / "configs").mkdir()
    (world / "configs" / "gate.yaml").write_text("lines: {x: {rules: ['retention.en >= 0.5']}}")
    words = [each.replace("-it's", "./-it's") for each in words]
    code, out, err = run_command(capsys, "--home", HOSTILE, *words)
    lines = commands_in(out + err)
    assert code == (0 if words[0] in ("gc", "bundle") else 2), err
    assert [shlex.split(line)[1:] for line in lines] == ([["--home", HOSTILE, *expected]] if expected else [])
    for line in lines:
        pasted(line)
    if words[0] == "bundle":
        place = shlex.split(out.rpartition("open it with ")[2])[-1]
        assert Path(place).exists() and place == "./-it's.duckdb"


def test_no_printed_command_is_written_by_hand():
    """Commands with arguments go through storage/commands.py, which quotes them and names the home."""
    verbs = "sql|runs|lineage|verify|up|down|gc|promote|rollback|evaluate|why|compact|deploy"
    by_hand = []
    for top in ("flows", "tasks", "storage"):
        for path in sorted((ROOT / top).rglob("*.py")):
            by_hand += [
                f"{path.name}: {line.strip()}"
                for line in path.read_text().splitlines()
                if re.search(rf"""(:|see|with|run) eclectus ({verbs})\\b""", line) and '"' in line
            ]
    assert by_hand == []
