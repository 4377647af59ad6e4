"""Jobs that the tests of `eclectus.tasks.training.workers` send to Ray Train workers."""

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file

from eclectus.models.losses.objectives import next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.parallel import whole
from eclectus.models.training.process import Process
from eclectus.storage.errors import EclectusError
from tests.support.tiny_training import plan, tiny_dense

KILLED_AT = 7


def total(process, report, value):
    report("progress", done=1, total=1)
    return process.sum(torch.tensor(float(value + process.rank))).item(), os.getpid()


def foretell(process, report):
    report("forecast", values={"seconds": 2.0, "steps": 4, "memory": 9}, words="2 s")
    report("came_true", seconds=4.0, steps=4, memory=10, host=0)


def complain(process, report):
    if process.rank == 1:
        raise EclectusError("instances 3 and 4 are damaged; pack them again")
    process.barrier()


def train_killed_once(process, report, folder, sharded, kill):
    """Trains a tiny model, whose weights rank 0 saves.

    kill: rank 1 kills itself in the middle of the first attempt; the group goes on from its last checkpoint.
    Returns the steps that were trained in this attempt.
    """
    folder, steps = Path(folder), []
    begun = folder / f"begun-{process.rank}"
    again = begun.exists()
    begun.touch()
    process.barrier()

    def reported(kind, **values):
        if kind == "progress":
            steps.append(values["done"])
            if kill and not again and process.rank == 1 and values["done"] == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)

    model, chosen = tiny_dense(), plan(sharded=sharded)
    train(model, Instances(folder.parent / "instances"), next_token(), chosen, process, folder / "work", reported)
    end = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    if process.is_main:
        save_file(end, folder / "end.safetensors")
    process.barrier()
    return steps


def train_in_a_group(folder, sharded):
    """The same training, undisturbed and without Ray."""
    train_killed_once(Process.current(), None, folder, sharded, kill=False)


def find_damage(process, report):
    report("damaged", step=0, text="latest is damaged; training begins again at step 0")
    process.barrier()
