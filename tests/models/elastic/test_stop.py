"""A training that is asked to stop writes a checkpoint first, in all processes after the same step."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from eclectus.models.elastic.stop import TrainingStopped, sigterm_stops, stop_asked
from eclectus.models.losses.objectives import next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from tests.support.processes import run_group
from tests.support.tiny_training import plan, tiny_dense, write_instances

STOPPED_AT = 4


class Ended(BaseException):
    pass


@pytest.fixture
def ends():
    """SIGTERM raises Ended, as Prefect's handler raises TerminationSignal."""

    def end(*_):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def run(folder, work, at=None, process=None, **changed):
    """Trains a tiny model; at step `at` this process gets SIGTERM. Returns its weights and the steps it has done."""
    model, steps = tiny_dense(), []

    def report(kind, **values):
        if kind == "progress":
            steps.append(values["done"])
            if values["done"] == at:
                os.kill(os.getpid(), signal.SIGTERM)

    chosen = plan(checkpoint_every=100, **changed)
    try:
        train(model, Instances(folder / "instances"), next_token(), chosen, process or Process(), folder / work, report)
    finally:
        (folder / f"{work} steps").write_text(" ".join(map(str, steps)))
    return model.state_dict()


def steps_of(folder, work):
    return [int(each) for each in (folder / f"{work} steps").read_text().split()]


@pytest.mark.parametrize("at", [STOPPED_AT, 12], ids=["in the middle", "at the last step"])
def test_sigterm_ends_a_training_with_a_checkpoint_from_which_it_goes_on_to_the_same_bits(tmp_path, ends, at):
    write_instances(tmp_path / "instances")
    with pytest.raises(Ended):
        run(tmp_path, "work", at)
    assert not stop_asked()
    done = steps_of(tmp_path, "work")[-1]
    # The signal came after the step whose processes were asked.
    assert done == min(at + 1, 12) and (tmp_path / "work" / "latest").readlink().name == f"step-{done}"
    resumed, expected = run(tmp_path, "work"), run(tmp_path, "undisturbed")
    assert steps_of(tmp_path, "work") == list(range(done + 1, 13))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_second_sigterm_does_not_wait(ends):
    with pytest.raises(Ended), sigterm_stops():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal did not end it")
    assert not stop_asked()


def test_sigterm_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm_stops():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop_asked()
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_one(folder):
    process = Process.current()
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Only rank 1 gets the signal; a handler that does nothing leaves the exception to the caller.
    with pytest.raises(TrainingStopped, match="stopped at training step"):
        run(folder, f"work {process.rank}", STOPPED_AT if process.rank else None, process, sharded=True)


@pytest.mark.slow  # 15 s: two processes
def test_all_processes_stop_after_the_same_step(tmp_path):
    write_instances(tmp_path / "instances")
    # One folder under two names: the checkpoint is shared.
    (tmp_path / "work").mkdir()
    for rank in (0, 1):
        (tmp_path / f"work {rank}").symlink_to("work")
    run_group(2, stop_one, tmp_path)
    first, second = (steps_of(tmp_path, f"work {rank}") for rank in (0, 1))
    assert first == second and STOPPED_AT <= first[-1] <= STOPPED_AT + 1
    stored = load_file(next((tmp_path / "work" / "latest").glob("trained-00001*")))
    assert stored
