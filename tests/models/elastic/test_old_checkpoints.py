"""A process whose node has an old checkpoint, or none: named, or harmless where only the pointer is old."""

import shutil

import pytest

from eclectus.models.losses.objectives import next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from eclectus.models.training.resume import TrainingFailed
from tests.support.processes import run_group
from tests.support.tiny_training import plan, tiny_dense, write_instances

STOP = 12


def run(folder, work, process, stop=STOP):
    steps = []

    def report(kind, **values):
        if kind == "progress":
            steps.append(values["done"])

    chosen = plan(stop=stop, checkpoint_every=5)
    train(tiny_dense(), Instances(folder / "instances"), next_token(), chosen, process, folder / work, report)
    return steps


@pytest.fixture
def folder(tmp_path):
    """`new` with the checkpoint of step 10, `old` with that of step 5."""
    write_instances(tmp_path / "instances")
    run(tmp_path, "old", Process(), stop=6)
    run(tmp_path, "new", Process())
    assert [(tmp_path / name / "latest").readlink().name for name in ("old", "new")] == ["step-5", "step-10"]
    return tmp_path


def on_two_nodes(folder, works, words):
    process = Process.current()
    if words is None:
        assert run(folder, works[process.rank], process) == [11, 12]
        return
    with pytest.raises(TrainingFailed, match=words):
        run(folder, works[process.rank], process)


@pytest.mark.parametrize("works", [("new", "old"), ("old", "new")], ids=["on rank 1", "on rank 0"])
def test_a_node_that_comes_back_with_an_old_checkpoint_is_named_in_all_processes(folder, works):
    run_group(2, on_two_nodes, folder, works, "has no checkpoint step-10 in .*, which .* has: .* all nodes share")


def test_a_node_without_the_folder_is_named(folder):
    run_group(2, on_two_nodes, folder, ("new", "none"), "has no checkpoint step-10")


def test_another_checkpoint_of_the_same_step_is_named(folder):
    shutil.copytree(folder / "new", folder / "other", symlinks=True)
    about = folder / "other" / "step-10" / "progress.json"
    about.write_text(about.read_text().replace('"start": 0', '"start":  0'))
    run_group(2, on_two_nodes, folder, ("new", "other"), "different checkpoints step-10")


def test_a_pointer_that_is_old_does_no_harm(folder):
    (folder / "old" / "step-10").symlink_to(folder / "new" / "step-10")
    run_group(2, on_two_nodes, folder, ("new", "old"), None)
