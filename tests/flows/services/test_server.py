"""All commands of a home share one Prefect server: it starts once, outlives its starter and ends with its last user."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from eclectus.flows.services import server as services
from eclectus.flows.services.background import Background, start_of
from eclectus.flows.services.ports import free_port, home_port, keep_port, listening
from eclectus.flows.services.server import AUTH, auth_string, join, leave, prefect_folder
from eclectus.flows.services.server_note import NOTE, identity, is_up, port_of, read_note
from eclectus.flows.services.users import add_user, server_lock, users
from eclectus.storage.errors import EclectusError
from tests.support import server_user
from tests.support.processes import until

ROOT = Path(__file__).parents[3]
PATIENCE = 60


@pytest.fixture
def folder(home, monkeypatch):
    monkeypatch.setattr(services, "SERVER", server_user.FAKE_SERVER)
    monkeypatch.setattr(services, "WATCH_SECONDS", 0.2)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    folder = prefect_folder(home)
    yield folder
    if noted := read_note(folder):
        noted.keeper.stop()


@pytest.fixture
def command(home):
    """Starts commands that use the server; each returns (process, address) when it does."""
    started = []

    def begin():
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment["PYTHONPATH"] = str(ROOT)
        program = [sys.executable, "-m", "tests.support.server_user", str(home.root)]
        process = subprocess.Popen(
            program, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        if not process.stdin.closed:
            process.stdin.close()


def address_of(process):
    return process.stdout.readline().strip()


def end(process):
    process.stdin.close()
    assert process.wait(PATIENCE) == 0


def starts(folder):
    lines = (folder / "starts.log").read_text().split("\n")[:-1]
    assert not [line for line in lines if "collision" in line], lines
    return len(lines)


def processes_of(folder):
    """Processes that work in the folder: keeper and server."""
    found = []
    for each in psutil.process_iter():
        try:
            if each.cwd() == str(folder) and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each.pid)
        except psutil.Error:
            continue
    return found


def test_two_first_commands_of_a_home_share_one_server_which_outlives_its_starter_and_ends_with_the_last(
    folder, command
):
    first, second = command(), command()
    address = address_of(first)
    assert address_of(second) == address and starts(folder) == 1
    end(first)
    third = command()
    assert address_of(third) == address and is_up(address)
    end(second)
    assert is_up(address) and starts(folder) == 1
    end(third)
    assert processes_of(folder) == [] and not (folder / NOTE).exists() and users(folder) == {}


def test_prefect_uses_the_server_of_the_home_even_when_it_was_imported_before(home, folder):
    from prefect.settings import get_current_settings

    before = get_current_settings().api.url
    with services.prefect_server(home) as address:
        assert get_current_settings().api.url == address != before
        assert get_current_settings().api.auth_string.get_secret_value() == auth_string(folder)
    assert get_current_settings().api.url == before


def test_the_server_survives_a_kill_of_its_starter_and_ends_after_a_kill_of_all(folder, command):
    first, second = command(), command()
    address = address_of(first)
    address_of(second)
    first.kill()
    time.sleep(0.5)
    assert is_up(address)
    second.kill()
    until(lambda: not processes_of(folder))
    assert starts(folder) == 1 and read_note(folder) is None


def test_a_killed_server_and_a_killed_keeper_are_started_again_at_the_same_address(folder, command):
    user = command()
    address = address_of(user)
    before = read_note(folder)
    os.kill(before.server.pid, signal.SIGKILL)
    # Meanwhile connections wait.
    assert is_up(address, PATIENCE)
    until(lambda: read_note(folder).server != before.server)
    between = read_note(folder)
    assert between.keeper == before.keeper
    os.kill(between.keeper.pid, signal.SIGKILL)
    until(lambda: (noted := read_note(folder)) and noted.keeper != before.keeper)
    assert read_note(folder).address == address and is_up(address)
    assert not between.server.is_alive() and starts(folder) == 3
    end(user)
    assert processes_of(folder) == []


def test_after_a_kill_of_everything_the_next_command_starts_anew(folder, command):
    user = command()
    address_of(user)
    noted = read_note(folder)
    for pid in (user.pid, noted.keeper.pid, noted.server.pid):
        os.kill(pid, signal.SIGKILL)
    again = command()
    assert is_up(address_of(again)) and starts(folder) == 2
    end(again)
    assert processes_of(folder) == []


def test_a_command_that_starts_while_the_last_ends_waits_for_the_end_and_starts_another(folder, command):
    for _ in range(3):
        user = command()
        address_of(user)
        user.stdin.close()
        with ExitStack() as stack:
            stack.callback(leave, folder)
            assert is_up(join(folder))
        assert user.wait(PATIENCE) == 0
    assert processes_of(folder) == [] and starts(folder) >= 3


def test_services_of_up_keep_the_server_over_the_ends_of_runs_and_down_leaves_it_to_runs(folder, command, tmp_path):
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    worker = Background.start("the worker", program, dict(os.environ), tmp_path / "worker.log")
    try:
        address = join(folder, worker)
        assert join(folder, worker) == address and len(users(folder)) == 1
        user = command()
        assert address_of(user) == address
        end(user)
        assert is_up(address)
        user = command()
        assert address_of(user) == address
        worker.stop()
        assert not leave(folder), "a run uses it"
        assert is_up(address)
        end(user)
        assert processes_of(folder) == [] and starts(folder) == 1
    finally:
        worker.stop()


def test_a_step_of_the_clock_changes_nothing(folder, monkeypatch):
    address, now, create_time = join(folder), time.time, psutil.Process.create_time
    try:
        for step in (7_200, -7_200):
            monkeypatch.setattr(time, "time", lambda step=step: now() + step)
            monkeypatch.setattr(psutil, "boot_time", lambda step=step: now() + step)
            monkeypatch.setattr(psutil.Process, "create_time", lambda process, step=step: create_time(process) + step)
            assert join(folder) == address and len(users(folder)) == 1
    finally:
        assert leave(folder)
    assert starts(folder) == 1 and processes_of(folder) == []


def test_a_port_that_is_taken_is_not_waited_for_and_the_homes_own_is_preferred(folder):
    with listening() as taken:
        port = taken.getsockname()[1]
        keep_port(folder, "server", port)
        address = join(folder)
        assert port_of(address) != port
        assert leave(folder)
    assert home_port(folder, "server", 1) == port == port_of(join(folder))
    assert leave(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"server": "4200"}', '{"server": 70000}', '{"server": -1}', "null"])
def test_damaged_ports_are_none(tmp_path, text):
    (tmp_path / "ports.json").write_text(text)
    assert home_port(tmp_path, "server") > 0
    keep_port(tmp_path, "server", free_port())


def test_a_server_that_does_not_start_is_reported_with_its_log_and_leaves_nothing(folder):
    (folder / "fails").touch()
    with pytest.raises(EclectusError, match=r"the Prefect server did not start; its log is .*server\.log"):
        join(folder)
    assert "asked to fail" in (folder / "server.log").read_text()
    assert processes_of(folder) == [] and users(folder) == {}


def test_homes_with_strange_names_and_copies_of_a_home_have_servers_of_their_own(folder, tmp_path):
    other = tmp_path / "n[1] a*b?#%20é"
    address = join(folder)
    copy = folder.parent.with_name("copy") / "prefect"
    other.mkdir()
    copy.mkdir(parents=True)
    for name in (NOTE, AUTH):
        (copy / name).write_bytes((folder / name).read_bytes())
    (copy / "users").mkdir()
    for path in users(folder):
        (copy / "users" / path.name).write_bytes(path.read_bytes())
    try:
        assert users(copy) == {}
        assert len({address, join(other), join(copy)}) == 3
        assert (starts(other), starts(copy), starts(folder)) == (1, 1, 1)
    finally:
        assert leave(other) and leave(copy) and leave(folder)


def test_a_home_that_moves_while_it_is_used_keeps_its_server(folder):
    address = join(folder)
    moved = folder.parent.rename(folder.parent.with_name("moved")) / "prefect"
    assert join(moved) == address
    assert leave(moved) and processes_of(moved) == []


def test_a_deleted_home_ends_its_server(folder):
    import shutil

    join(folder)
    noted = read_note(folder)
    shutil.rmtree(folder)
    until(lambda: not noted.keeper.is_alive() and not noted.server.is_alive())


def test_the_lock_is_free_after_any_end_of_its_holder_and_names_one_that_holds_it_too_long(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path; from eclectus.flows.services.users import server_lock\n"
         "with server_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    with pytest.raises(EclectusError, match=f"process {holder.pid} has been starting"), server_lock(tmp_path, 0.1):
        pass
    holder.kill()
    holder.communicate()
    with server_lock(tmp_path, PATIENCE):
        pass


def me():
    return Background("test", os.getpid(), start_of(os.getpid()), "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "name": "", "started": ""}', "null"])
def test_damaged_notes_and_marks_name_nobody_and_marks_go(tmp_path, text):
    (tmp_path / NOTE).write_text(text)
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / f"{os.getpid()}-1").write_text(text)
    add_user(tmp_path, me())
    assert read_note(tmp_path) is None and list(users(tmp_path).values()) == [me_marked()]
    assert len(list((tmp_path / "users").iterdir())) == 1


def me_marked():
    return replace(me(), log="")


def test_a_process_that_has_the_id_of_a_dead_one_is_not_it(tmp_path):
    reused = replace(me(), started="another-boot 1")
    add_user(tmp_path, reused)
    assert users(tmp_path) == {}
    note = {"address": "http://127.0.0.1:1/api", "server": asdict(reused), "keeper": asdict(reused)}
    (tmp_path / NOTE).write_text(json.dumps(note | {"folder": identity(tmp_path)}))
    assert not read_note(tmp_path).keeper.is_alive()


def test_the_auth_string_is_stable_and_only_its_owner_can_read_it(tmp_path):
    made = auth_string(tmp_path)
    path = tmp_path / AUTH
    assert auth_string(tmp_path) == made == path.read_text().strip() and len(made) > 30
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert auth_string(tmp_path) == made and path.stat().st_mode & 0o777 == 0o600
    for damaged in (b"", b"no colon\n", b"\xff\xfe:\n"):
        path.write_bytes(damaged)
        assert ":" in auth_string(tmp_path) and path.stat().st_mode & 0o777 == 0o600


def test_all_who_ask_first_at_once_get_the_same_auth_string(tmp_path):
    """The threads of a supervisor do: one starts the server with it, the other the services that talk to the server."""

    def ask(folder, together):
        together.wait()
        return auth_string(folder)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            for number in range(20):
                folder = tmp_path / str(number)
                folder.mkdir()
                together = threading.Barrier(4)
                asked = [threads.submit(ask, folder, together) for _ in range(4)]
                assert {each.result() for each in asked} == {(folder / AUTH).read_text().strip()}
    finally:
        sys.setswitchinterval(before)
