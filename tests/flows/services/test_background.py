"""Background programs are known by boot and start tick: a step of the clock changes nothing, a reused id does."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from eclectus.flows.services import background
from eclectus.flows.services.background import Background, start_of


@pytest.fixture
def sleeper(tmp_path):
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    background = Background.start("the sleeper", program, dict(os.environ), tmp_path / "log")
    yield background
    background.stop()


def test_a_program_lives_until_it_is_stopped(sleeper):
    assert sleeper.is_alive()
    sleeper.stop()
    assert not sleeper.is_alive()
    sleeper.stop()


def test_a_step_of_the_clock_does_not_make_it_another_program(sleeper, monkeypatch):
    """psutil's time of creation is the clock's: a step of it moved every program that `down` looked for."""
    now, create_time = time.time, psutil.Process.create_time
    monkeypatch.setattr(time, "time", lambda: now() + 7_200)
    monkeypatch.setattr(psutil, "boot_time", lambda: now() + 7_200)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 7_200)
    assert sleeper.is_alive()
    sleeper.stop()
    # It may be a zombie for a moment, until this process, its parent, takes its exit status.
    assert not sleeper.is_alive()


def test_another_process_or_another_boot_with_the_same_id_is_not_it(sleeper):
    boot, tick = sleeper.started.split()
    for other in (f"{boot} {int(tick) - 1}", f"0{boot[1:]}1 {tick}", "1764370000.12"):
        assert not replace(sleeper, started=other).is_alive()
    assert sleeper.is_alive(), "and stopping the other one leaves it alone"


def test_names_with_blanks_and_parentheses_do_not_shift_the_tick(tmp_path):
    program = tmp_path / "a) (b 1 2"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            first = start_of(process.pid)
            assert (
                first.split()[1].isdigit()
                and abs(int(first.split()[1]) - int(start_of(os.getpid()).split()[1])) < 10**6
            )
            assert start_of(process.pid) == first != start_of(os.getpid())
        finally:
            process.kill()
    with pytest.raises(psutil.NoSuchProcess):
        start_of(process.pid)


def test_a_program_that_ended_is_not_waited_for_while_its_parent_leaves_it_a_zombie(sleeper, tmp_path):
    """As the command does that started the Prefect server, when a later one ends it."""
    code = (
        "import sys; from eclectus.flows.services.background import Background\n"
        "Background('it', int(sys.argv[1]), sys.argv[2], '').stop()"
    )
    subprocess.run([sys.executable, "-c", code, str(sleeper.pid), sleeper.started], check=True, timeout=12)
    assert not sleeper.is_alive()


def test_a_log_keeps_its_past_up_to_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "LOG_BYTES", 10)
    log = tmp_path / "program.log"
    for word in ("first", "second", "third"):
        with background.open_log(log) as handle:
            handle.write(f"{word}\n".encode())
    assert (log.read_text(), (tmp_path / "program.log.1").read_text()) == ("third\n", "first\nsecond\n")
