"""Jobs that the tests of `eclectus.tasks.training.workers` send to Ray Train workers."""

import os
import signal
from pathlib import Path

import torch

from eclectus.storage.errors import EclectusError


def total(place, tell, value):
    tell("progress", done=1, total=1)
    return place.sum(torch.tensor(float(value + place.rank))).item(), os.getpid()


def complain(place, tell):
    if place.rank == 1:
        raise EclectusError("instances 3 and 4 are damaged; pack them again")
    place.barrier()


def die_once(place, tell, folder):
    """Rank 1 is killed the first time; what was reached before is on disk, and the second try goes on from there."""
    begun = Path(folder) / f"begun-{place.rank}"
    again = begun.exists()
    begun.touch()
    place.barrier()
    if not again and place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return place.sum(torch.tensor(1.0)).item(), again


def find_damage(place, tell):
    tell("damaged", step=0, text="latest is damaged; training begins again at step 0")
    place.barrier()
