"""Steps in trouble: a secret in a message, a full disk, two at once, one killed while the other waits."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.tasks.run import MOST_FAULTS, Outcome, undisturbed
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

ROOT = Path(__file__).parents[2]
SECRET = "planted-c0ffee-secret"


class PlaceSettings(Settings):
    sources: list[str] = Field([], description="Where to read.")
    fails: bool = Field(False, description="Whether it fails.")


@step(makes="report", version=1)
def look(settings: PlaceSettings, out):
    """Looks."""
    if settings.fails:
        raise EclectusError(f"cannot read {settings.sources} with {os.environ['MY_API_TOKEN']}")
    out.statistics = {"read": settings.sources, "with": os.environ["MY_API_TOKEN"]}
    out.file("page").write_text("a page")


class Gone:
    """A display whose server is gone."""

    calls = 0

    def __getattr__(self, name):
        def call(*told):
            Gone.calls += 1
            raise ConnectionError("All connection attempts failed")

        return call


def test_no_display_can_end_a_run_or_keep_its_end_out_of_the_lineage(home, monkeypatch, caplog):
    from eclectus.flows import run as runs

    monkeypatch.setenv("MY_API_TOKEN", "x")
    monkeypatch.setattr(runs, "shut_ray", lambda: None)
    shown = Shown()
    with runs.open_run("curate", PlaceSettings(sources=["x"]), home, [Gone(), shown]) as run:
        for number in range(4):
            look(settings=PlaceSettings(sources=[f"x{number}"]))
    assert query("select state from runs", home)[1] == [("completed",)]
    assert query("select count(*) from steps where state = 'completed'", home)[1] == [(4,)]
    assert shown.text and Gone.calls == MOST_FAULTS and "left out from now on" in caplog.text
    assert [type(display) for display in run.displays] == [Shown]


class Server(Gone):
    """A display of a Prefect server that does not answer."""

    needs_prefect = True


def test_a_dead_prefect_server_is_not_asked_and_the_steps_go_on(home, monkeypatch):
    from eclectus.flows import flow
    from eclectus.flows import run as runs

    monkeypatch.setenv("MY_API_TOKEN", "x")
    monkeypatch.setattr(runs, "shut_ray", lambda: None)
    # Bound, and nobody listens.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/api")
        monkeypatch.setattr(flow.Flow, "__call__", lambda *_: pytest.fail("Prefect was asked"))
        before = Gone.calls
        with runs.open_run("curate", PlaceSettings(), home, [Server()]) as run:
            run.in_prefect, run.prefect_answers = True, runs._prefect_answers
            look(settings=PlaceSettings(sources=["y"]))
            assert flow.call_in_run(flow.Flow(lambda parameters: parameters), 3) == 3
    assert Gone.calls == before
    assert query("select label, state, prefect_task_run from steps", home)[1] == [("look", "completed", None)]


def test_a_call_that_prefect_cannot_show_is_made_once_and_keeps_its_result_or_error():
    def calls(before, after, act):
        """As Prefect calls `act`, with what fails before and after it."""
        outcome, made = Outcome(), []

        def acted():
            made.append(1)
            return act()

        def call():
            if before:
                raise before
            outcome.of(acted)
            raise after

        return made, lambda: undisturbed(call, outcome, acted)

    refused = ConnectionError("refused")
    for before, after in ((refused, None), (None, refused)):
        made, call = calls(before, after, lambda: 5)
        assert call() == 5 and made == [1]
    made, call = calls(None, refused, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call()
    assert made == [1]


def test_a_step_that_fails_in_prefect_ends_its_flow_though_the_task_returns_a_state_and_raises_nothing(
    home, monkeypatch
):
    import prefect

    from eclectus.flows import run as runs

    states = []

    def task(**_):
        # Prefect's task engine returns a state that a task returns.
        return lambda function: lambda: (states.append(function()), states[-1])[1]

    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    monkeypatch.setattr(runs, "shut_ray", lambda: None)
    monkeypatch.setattr(prefect, "task", task)
    with pytest.raises(EclectusError, match="cannot read"), runs.open_run("curate", PlaceSettings(), home) as run:
        run.in_prefect, run.prefect_answers = True, lambda: True
        made = look(settings=PlaceSettings(fails=True))
        pytest.fail(f"the step returned {made}")
    (state,) = states
    assert state.is_failed() and state.message.startswith("cannot read [] with") and SECRET not in state.message
    assert query("select state from runs", home)[1] == query("select state from steps", home)[1] == [("failed",)]


def test_the_end_is_in_the_lineage_when_what_comes_after_it_fails(home, monkeypatch):
    from eclectus.flows import run as runs

    def fail():
        raise RuntimeError("Ray does not answer")

    monkeypatch.setattr(runs, "shut_ray", fail)
    with pytest.raises(RuntimeError, match="Ray does not answer"), runs.open_run("curate", PlaceSettings(), home):
        pass
    assert query("select state from runs", home)[1] == [("completed",)]


@pytest.mark.parametrize("reused", [False, True])
def test_a_signal_between_the_two_events_of_a_step_leaves_no_step_without_an_end(home, monkeypatch, reused):
    from eclectus.flows import run as runs
    from eclectus.storage.step_keys import KnownKeys

    monkeypatch.setenv("MY_API_TOKEN", "x")
    monkeypatch.setattr(runs, "shut_ray", lambda: None)
    if reused:
        with runs.open_run("curate", PlaceSettings(), home):
            look(settings=PlaceSettings())

    def stop(*_):
        raise KeyboardInterrupt("asked to stop")

    with pytest.raises(KeyboardInterrupt), runs.open_run("curate", PlaceSettings(), home) as run:
        if reused:
            monkeypatch.setattr(KnownKeys, "note", stop)
        else:
            monkeypatch.setattr(type(look), "_columns", stop)
        look(settings=PlaceSettings())
    ends = f"select state, reason, ended is not null from steps where run = '{run.id}'"
    assert query(ends, home)[1] == [("cancelled", "KeyboardInterrupt: asked to stop", True)]


class Shown:
    def __init__(self):
        self.text = ""

    def step_began(self, label):
        self.text += label

    def step_progressed(self, *told):
        self.text += str(told)

    step_ended = said = linked = step_progressed


def test_a_planted_secret_is_in_no_file_of_the_home_and_on_no_screen(run, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    address = f"https://me:{SECRET[::-1]}@host/x?token={SECRET}"
    run.displays.append(Shown())
    run.journal.event("run_started", flow="main", parameters={"sources": [address]}, packages={}, error=SECRET)
    artifact = look(settings=PlaceSettings(sources=[address]))
    look(settings=PlaceSettings(sources=[address, "another"]))
    with pytest.raises(EclectusError):
        look(settings=PlaceSettings(sources=[address], fails=True))
    monkeypatch.setenv("ECLECTUS_HOME", str(run.home.root))
    monkeypatch.setattr("eclectus.storage.lineage.connection.querying", lambda *_: {}[f"a fault with {SECRET} in it"])
    with pytest.raises(SystemExit):
        main(["sql", "from runs"])
    told = capsys.readouterr().err
    assert "fault.log" in told and "***" in told
    files = [path for path in run.home.root.rglob("*") if path.is_file()]
    assert {"manifest.json", "fault.log"} <= {path.name for path in files}
    assert any(path.suffix == ".ndjson" for path in files) and any("records" in path.parts for path in files)
    for shown in [told, run.displays[0].text, *(path.read_bytes().decode(errors="replace") for path in files)]:
        assert SECRET not in shown and SECRET[::-1] not in shown
    assert artifact.statistics["with"] == "***"


def test_a_changed_setting_next_to_a_secret_is_still_named(run, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    for more in ("one", "two"):
        look(settings=PlaceSettings(sources=[SECRET, more]))
    reasons = [reason for (reason,) in query("select reason from steps order by started", run.home)[1]]
    assert reasons[1] == 'settings.sources ["***", "one"] -> ["***", "two"]'


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out"])
def test_a_name_cannot_lead_out_of_an_artifact(home, name):
    with home.store.draft("report") as draft, pytest.raises(EclectusError, match="leads out of its artifact"):
        draft.file(name)


PROGRAM = """
import sys, time
from pathlib import Path
from pydantic import Field
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.run import Run, activate
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

class HowSettings(Settings):
    size: int = Field(1, description="Bytes to write.")

class Says:
    def step_began(self, label): pass
    def step_progressed(self, label, what, *_): print(what, flush=True)
    def step_ended(self, label, state, reason, *_): print(state, reason, flush=True)

@step(makes="report", version=1)
def work(settings: HowSettings, out):
    print("working", flush=True)
    while len(sys.argv) > 3 and not Path(sys.argv[3]).exists():
        time.sleep(0.02)
    with open(out.file("page"), "wb") as page:
        page.write(b"x" * settings.size)

home = Home.open(sys.argv[1])
with Journal(home.journal, f"run-{time.time_ns()}") as journal:
    journal.event("run_started", flow="main", parameters={}, packages={})
    keys = KnownKeys(home.keys, home.store)
    run = Run(id=journal.run, home=home, journal=journal, known=keys, flow="main", displays=[Says()])
    with activate(run):
        for size in map(int, sys.argv[2].split(",")):
            try:
                work(settings=HowSettings(size=size))
            except EclectusError as error:
                print(error, flush=True)
    journal.event("run_ended", state="completed", seconds=1.0)
"""


def start(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*words], stdout=subprocess.PIPE, text=True, env=environment)


def test_of_two_processes_with_the_same_job_one_works_and_the_other_waits_and_reuses(home, tmp_path):
    job = (sys.executable, "-c", PROGRAM, str(home.root), "10", str(tmp_path / "go"))
    first = start(*job)
    assert first.stdout.readline() == "working\n"
    second = start(*job)
    assert second.stdout.readline().startswith("waiting: another run is making the same thing")
    (tmp_path / "go").touch()
    assert first.communicate()[0].startswith("completed") and second.communicate()[0].startswith("reused")
    states = query("select state, count(*) from steps group by state order by state", home)[1]
    assert states == [("completed", 1), ("reused", 1)] and len(list(home.store.all())) == 1


def test_one_that_waits_takes_over_when_the_other_is_killed(home, tmp_path):
    job = (sys.executable, "-c", PROGRAM, str(home.root), "10", str(tmp_path / "go"))
    first = start(*job)
    assert first.stdout.readline() == "working\n"
    second = start(*job)
    assert second.stdout.readline().startswith("waiting")
    os.kill(first.pid, signal.SIGKILL)
    assert second.stdout.readline() == "working\n"
    (tmp_path / "go").touch()
    assert second.communicate()[0].startswith("completed")
    first.communicate()
    assert query("select state from runs order by run", home)[1] == [("crashed",), ("completed",)]


def test_a_full_disk_is_named_keeps_what_was_done_and_hurts_nothing_else(tmp_path):
    """A real file system of 3 MB, in a mount namespace of its own."""
    place = tmp_path / "small"
    place.mkdir()
    script = (
        'mount -t tmpfs -o size=3m tmpfs "$0" && "$1" -c "$2" "$0/home" 100000,9000000,200000 && '
        '"$1" -m eclectus --home "$0/home" sql --json '
        '"select state, count(*) as n from steps group by state order by state" && '
        '"$1" -m eclectus --home "$0/home" verify'
    )
    process = start("unshare", "--map-root-user", "--mount", "sh", "-c", script, str(place), sys.executable, PROGRAM)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "cannot write to" in said and f"no space left on device: {place}/home on " in said
    assert f"(disk {place}, 0.00 of 0.00 GB free); free some space" in said
    assert '{"state": "completed", "n": 2}\n{"state": "failed", "n": 1}' in said
    assert "2 artifacts and the journals are as they were written" in said


def test_a_prefect_server_that_is_away_keeps_no_run_from_starting_and_too_many_crashes_do(monkeypatch, caplog):
    from eclectus.flows import run as runs
    from eclectus.flows import ui
    from eclectus.flows.services.flow_runs.api import Api

    def away(*_):
        raise ConnectionError("refused")

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(runs, "_starts", lambda: runs.STARTS + 1)
    monkeypatch.setattr(ui, "close_lost_steps", away)
    runs._check_starts("a")
    assert "refused" in caplog.text
    monkeypatch.setattr(ui, "close_lost_steps", lambda _: None)
    monkeypatch.setattr(Api, "states", away)
    runs._check_starts("a")
    crashed = [{"type": kind, "name": kind.title()} for kind in ("RUNNING", "CRASHED") * runs.STARTS]
    monkeypatch.setattr(Api, "states", lambda *_: crashed)
    with pytest.raises(EclectusError, match=f"crashed in each of its {runs.STARTS} starts"):
        runs._check_starts("a")
