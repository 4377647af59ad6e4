"""Jobs that the tests of `eclectus.tasks.training.workers` send to Ray Train workers."""

import os
import signal
from pathlib import Path

import torch

from eclectus.storage.errors import EclectusError


def total(process, report, value):
    report("progress", done=1, total=1)
    return process.sum(torch.tensor(float(value + process.rank))).item(), os.getpid()


def complain(process, report):
    if process.rank == 1:
        raise EclectusError("instances 3 and 4 are damaged; pack them again")
    process.barrier()


def die_once(process, report, folder):
    """Rank 1 is killed the first time; what was reached before is on disk, and the second try goes on from there."""
    begun = Path(folder) / f"begun-{process.rank}"
    again = begun.exists()
    begun.touch()
    process.barrier()
    if not again and process.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return process.sum(torch.tensor(1.0)).item(), again


def find_damage(process, report):
    report("damaged", step=0, text="latest is damaged; training begins again at step 0")
    process.barrier()
