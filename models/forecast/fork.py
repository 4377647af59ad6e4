"""A probe of this machine in processes of its own, as many as will train: for a forecast before there are any workers.

They are forks of this process, which has imported all that they need; this one must not have computed with several
threads before. Their memory is given back with them, and what a kernel does to one of them does not reach this process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from eclectus.models.forecast.job import Job
from eclectus.models.forecast.memory import program_bytes
from eclectus.models.forecast.probe import Measured, measure
from eclectus.models.training.process import Process


class ProbeFailed(Exception):
    """A probe ended with an error, or was killed."""


def measure_here(job: Job, threads: int | None) -> tuple[Measured, int]:
    """(what a probe in job.world processes measured, bytes of one of them without its model).

    threads: of each process; None: as many as PyTorch takes. Of more processes than this machine has cores, as many as
    it has are measured, and the time of the others is added. Raises ProbeFailed.
    """
    world = max(1, min(job.world, os.cpu_count() or 1))
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        receiving, sending = context.Pipe(duplex=False)
        arguments = (world, Path(folder), job, threads, sending)
        running = [context.Process(target=_run, args=(rank, *arguments)) for rank in range(world)]
        for process in running:
            process.start()
        sending.close()
        try:
            found = receiving.recv()
        except EOFError:
            found = "it was killed"
        for process in running:
            if isinstance(found, str):
                process.terminate()
            process.join()
    if isinstance(found, str):
        raise ProbeFailed(f"the probe of this machine failed: {found}")
    measured, program = found
    # Processes that share a core wait for each other; the shares of more processes are smaller.
    crowd = max(1.0, job.world / world)
    waits = ("micro", "survey") if job.sharded else ("micro", "survey", "update")
    slower = {name: crowd * getattr(measured, name) for name in waits}
    return dataclasses.replace(measured, **slower), program


def _run(rank: int, world: int, folder: Path, job: Job, threads: int | None, answer: Connection) -> None:
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
        process = Process(rank, world)
        measured = measure(job, process, folder)
        if process.is_main:
            answer.send((measured, program_bytes()))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        answer.close()
        # What the parent has registered for its own end is not this process's.
        os._exit(0)
