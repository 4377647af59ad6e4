"""Jobs that the tests of `eclectus.tasks.training.workers` send to Ray Train workers."""

import json
import os
import signal
import time
import uuid
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


def measure_parts(process, report):
    report("metrics", step=5, values={"loss": 1.0, "loss/a/b@c": 2.0, "expert_load@11": 3.0})


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


# Of a training whose workers change: as many micro-batches as there can be workers.
ELASTIC = {"batch": 8, "micro_batch": 2, "stop": 60, "checkpoint_every": 5}


class Noting(Instances):
    """Instances that note which of them were read, for which step."""

    def note_in(self, path, **about):
        self._path, self._about = path, about

    def rows_of_step(self, step, size, seed):
        self._step = step
        return super().rows_of_step(step, size, seed)

    def batch(self, rows):
        with open(self._path, "a") as handle:
            handle.write(json.dumps({**self._about, "step": self._step, "rows": rows.tolist()}) + "\n")
        return super().batch(rows)


def train_elastically(process, report, folder):
    """Trains a tiny model, slowly and then very slowly until there is a file `hurry`; rank 0 saves its weights."""
    folder, group = Path(folder), process.gather(uuid.uuid4().hex)[0]
    data = Noting(folder / "instances")
    data.note_in(folder / f"read-{group}-{process.rank}.ndjson", group=group, rank=process.rank)

    def reported(kind, **values):
        if kind == "progress" and not (folder / "hurry").exists():
            time.sleep(0.2 if values["done"] < ELASTIC["stop"] / 2 else 4)
        report(kind, **values)

    model, chosen = tiny_dense(), plan(**ELASTIC, total=ELASTIC["stop"], fixed_sums=True)
    train(model, data, next_token(), chosen, process, folder / "work", reported)
    if process.is_main:
        save_file({name: each.detach() for name, each in model.named_parameters()}, folder / "end.safetensors")
    process.barrier()


def steps_done(folder):
    """How many steps rank 0 of any group has begun."""
    return sum(path.read_text().count("\n") for path in folder.glob("read-*-0.ndjson"))


def train_as_one(folder):
    """The same training, undisturbed in one process."""
    folder = Path(folder)
    model, chosen = tiny_dense(), plan(**ELASTIC, total=ELASTIC["stop"], fixed_sums=True)
    data = Instances(folder / "instances")
    train(model, data, next_token(), chosen, Process(), folder / "one", lambda kind, **values: None)
    save_file({name: each.detach() for name, each in model.named_parameters()}, folder / "one.safetensors")
