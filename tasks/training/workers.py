"""A group of Ray Train workers that outlives one stage.

A Ray Train `fit` costs half a minute beyond its steps (processes, imports, process group), so one fit serves all
training and evaluation stages of a run: its workers take jobs from a queue (an actor), run them, and wait for the next.
Ray Train places the workers, sets up `torch.distributed`, and restarts the group when a worker dies; the workers then
take the unfinished job again, which resumes from its own last checkpoint. A job is a function and its arguments:

    with TrainWorkers(workers=2, use_gpu=False, storage=home.work / "ray") as group:
        # On every worker: train_stage(process, report, **arguments)
        result = group.do(train_stage, arguments, on_report)

`process` is an `eclectus.models.training.process.Process`; `report(kind, **values)` sends progress and metrics to the
driver, which calls `on_report(kind, values)`.

With `least`, the group goes on with fewer workers when a node is lost, and with more when there is room again
(tasks/elastic/scaling.py); rank 0 reports "workers" with their number at the start of a job. When the driver is ended
by SIGTERM in the middle of a training, it asks the workers for a checkpoint and waits for it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eclectus.storage.errors import EclectusError
from eclectus.tasks.ray_cluster import ensure_ray

RESTARTS = 3
POLL_SECONDS = 0.25
# Seconds between looks for room for more workers.
RESIZE_SECONDS = 60.0
# Seconds that a driver which got SIGTERM waits for the checkpoint of a training.
STOP_SECONDS = float(os.environ.get("ECLECTUS_STOP_SECONDS") or 15)
# Exceptions of jobs that are shown by their message alone; others are raised with their traceback.
EXPECTED_ERRORS = {"EclectusError", "TrainingFailed"}
STOPPED = "TrainingStopped"


class JobQueue:
    """The actor between driver and workers: one job at a time, its results by rank, and reports from the workers."""

    def __init__(self) -> None:
        import asyncio

        self._changed = asyncio.Condition()
        self._number = 0
        self._job: dict[str, Any] | None = None
        self._closed = False
        # Of the group that is running the job: its name, and its workers.
        self._attempt, self._world = "", 0
        self._results: dict[int, Any] = {}
        self._error: tuple[str, str, str] | None = None
        # By error and how far the job was: the group that raised it.
        self._seen: dict[tuple[str, str, Any], str] = {}
        # Steps that are done; None: the job does not train, or not yet.
        self._done: Any = None
        self._stopping = False
        # By the scaling policy: nobody begins a job; whether a worker has stopped for it.
        self._pausing, self._paused = False, False
        self._reports: list[tuple[str, dict[str, Any]]] = []

    async def post(self, call: str, arguments: dict[str, Any]) -> int:
        async with self._changed:
            self._number += 1
            self._job = {"number": self._number, "call": call, "arguments": arguments}
            self._attempt, self._world, self._results = "", 0, {}
            self._error, self._seen, self._done = None, {}, None
            self._changed.notify_all()
            return self._number

    async def take(self, done: int) -> dict[str, Any] | None:
        """The next job after job number `done`; None when there will be none."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._closed
                    or (self._number > done and self._job is not None and self._error is None and not self._pausing)
                )
            )
            return None if self._closed else self._job

    async def finish(self, number: int, attempt: str, rank: int, world: int, result: Any) -> None:
        if number == self._number:
            if attempt != self._attempt:
                # What a group had finished before it was replaced does not count.
                self._attempt, self._world, self._results = attempt, world, {}
            self._results[rank] = result
            if self._is_done():
                self._job = None

    def _is_done(self) -> bool:
        return 0 < self._world == len(self._results)

    async def stopped(self, number: int, message: str) -> bool:
        """A worker has stopped its training, whose checkpoint is written. Returns whether the job will go on."""
        if self._stopping:
            await self.fail(number, "", (STOPPED, message, ""))
            return False
        self._paused = True
        return True

    async def ask_to_stop(self) -> bool:
        """Asks the workers to stop the training that they are in; False if they are in none."""
        async with self._changed:
            if self._job is None or self._done is None:
                return False
            self._stopping = True
            self._changed.notify_all()
            return True

    async def pause(self) -> bool:
        """Asks the workers to stop at the next step, until `go_on`; whether they can be replaced without a loss."""
        async with self._changed:
            self._pausing = True
            self._changed.notify_all()
            return self._paused or self._job is None

    async def go_on(self) -> bool:
        """Lets the next group take the job. Returns True."""
        async with self._changed:
            self._pausing, self._paused = False, False
            self._changed.notify_all()
            return True

    async def wait_for_stop(self) -> bool:
        """Returns True when a training is to stop, False at the end of the group."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self._stopping or self._pausing)
            return not self._closed

    async def fail(self, number: int, attempt: str, error: tuple[str, str, str]) -> None:
        """A job's exception ends the job if it is expected, or if another group of workers raised it at the same step.

        Any other may follow from a worker that died (a broken connection, for example), so the job is tried again.
        """
        if number != self._number or self._error is not None:
            return
        seen = (error[0], error[1], self._done)
        if error[0] in {*EXPECTED_ERRORS, STOPPED} or self._seen.setdefault(seen, attempt) != attempt:
            self._error, self._job = error, None

    async def report(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "progress":
            self._done = values["done"]
        self._reports.append((kind, values))

    async def poll(self) -> tuple[list[tuple[str, dict[str, Any]]], dict[int, Any] | None, tuple[str, str, str] | None]:
        """(reports since the last poll, results by rank when all are done, the first error)."""
        reports, self._reports = self._reports, []
        return reports, self._results if self._is_done() else None, self._error

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()


class TrainWorkers:
    """The group. Starts with the first job; `close` (or the end of the `with` block) ends it."""

    def __init__(
        self,
        workers: int,
        use_gpu: bool,
        storage: Path,
        restarts: int = RESTARTS,
        cpus: float = 1.0,
        placement: str = "PACK",
        least: int = 0,
        resize_seconds: float = RESIZE_SECONDS,
    ) -> None:
        """storage: a directory for Ray Train's own files, on storage that all nodes share. cpus: CPUs per worker.

        least: the group goes on with as few workers as that, and always with a divisor of `workers`; 0: with `workers`
        only. resize_seconds: between looks for room for more of them.
        """
        self.workers = workers
        self.use_gpu = use_gpu
        self.storage = storage
        self.restarts = restarts
        self.resources = {"CPU": cpus, **({"GPU": 1.0} if use_gpu else {})}
        self.placement = placement
        self.least, self.resize_seconds = least, resize_seconds
        self._queue: Any = None
        self._thread: threading.Thread | None = None
        # Not `Thread.join(timeout)`: a signal in it makes a thread that runs look ended (CPython 3.11).
        self._ended = threading.Event()
        self._fit_error: BaseException | None = None

    def do(
        self, call: Callable[..., Any], arguments: dict[str, Any], on_report: Callable[[str, dict[str, Any]], None]
    ) -> Any:
        """Runs one job on all workers and returns rank 0's result.

        call: a function at the top level of a module that the workers can import. on_report: called in this thread for
        every report of the workers.
        Raises EclectusError when the job raised it; RuntimeError when the workers died too often, or this node did.
        """
        import ray

        self._ensure_started()
        try:
            ray.get(self._queue.post.remote(address_of(call), arguments))
            results, error = self._outcome(on_report)
        except ray.exceptions.RayActorError as lost:
            raise RuntimeError(
                "Ray's node on this machine was lost (killed, or out of memory); start the same run again, and it goes"
                f" on from its last checkpoint ({type(lost).__name__})"
            ) from lost
        except BaseException as end:
            # Ctrl-C is somebody who waits; a stop from outside (SIGTERM) leaves time for a checkpoint.
            if not isinstance(end, (Exception, KeyboardInterrupt)):
                self._stop(on_report)
            raise
        if error is not None:
            name, message, trace = error
            self._abandon()
            if name in EXPECTED_ERRORS:
                raise EclectusError(message)
            raise RuntimeError(f"{name}: {message}\n{trace}")
        if results is None:
            raise RuntimeError(f"the training workers are lost after {self.restarts} restarts: {self._fit_error}")
        return results[0]

    def _outcome(
        self, on_report: Callable[[str, dict[str, Any]], None], longest: float = math.inf
    ) -> tuple[dict[int, Any] | None, tuple[str, str, str] | None]:
        """Waits for the end of the job: (results by rank, error); neither when the group ends or time is up."""
        import ray

        end = time.monotonic() + longest
        while time.monotonic() < end:
            ended = self._ended.wait(POLL_SECONDS)
            reports, results, error = ray.get(self._queue.poll.remote())
            for kind, values in reports:
                on_report(kind, values)
            if results is not None or error is not None or ended:
                return results, error
        return None, None

    def _stop(self, on_report: Callable[[str, dict[str, Any]], None]) -> None:
        """Waits until a training that is running has written a checkpoint, for STOP_SECONDS at most."""
        import ray

        try:
            if not ray.get(self._queue.ask_to_stop.remote(), timeout=STOP_SECONDS):
                return
            results, error = self._outcome(on_report, STOP_SECONDS)
        except ray.exceptions.RayError as fault:
            results, error = None, (type(fault).__name__, str(fault), "")
        if results is None and (error is None or error[0] != STOPPED):
            lost = error[1] if error else f"no answer in {STOP_SECONDS:g} s (ECLECTUS_STOP_SECONDS)"
            on_report("warning", {"text": f"the training stopped without a new checkpoint: {lost}"})
        elif error:
            on_report("stopped", {"text": error[1]})

    def close(self) -> None:
        """Ends the workers; safe to call twice."""
        if self._thread is None:
            return
        import ray

        if ray.is_initialized():
            ray.get(self._queue.close.remote())
            self._thread.join(timeout=20)
        self._thread = None

    def _abandon(self) -> None:
        """Closes the queue without waiting: a worker may hang in a collective until Ray has ended the group."""
        self._queue.close.remote()
        self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error whoever started Ray shuts it down with its workers; waiting here would only delay that.
        if kind is None:
            self.close()

    def _ensure_started(self) -> None:
        if self._thread is not None and not self._ended.is_set():
            return
        ensure_ray()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # With the driver: on another node it could be lost with that.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue = ray.remote(num_cpus=0)(JobQueue).options(scheduling_strategy=here).remote()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._fit, args=(self._ended,), daemon=True, name="ray-train-fit")
        self._thread.start()

    def _fit(self, ended: threading.Event) -> None:
        try:
            self._trainer().fit()
        except (Exception, SystemExit) as error:
            self._fit_error = error
        finally:
            ended.set()

    def _trainer(self) -> Any:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        kind: Any = TorchTrainer
        if self.least:
            from eclectus.tasks.elastic.scaling import ElasticTrainer

            kind = partial(ElasticTrainer, queue=self._queue)
        # Known to type checkers as Ray Train's first version.
        scaling: Any = ray.train.ScalingConfig
        return kind(
            work_through_queue,
            train_loop_config={"queue": self._queue},
            scaling_config=scaling(
                num_workers=(self.least, self.workers) if self.least else self.workers,
                use_gpu=self.use_gpu,
                resources_per_worker=self.resources,
                placement_strategy=self.placement,
                elastic_resize_monitor_interval_s=self.resize_seconds,
            ),
            run_config=ray.train.RunConfig(
                storage_path=str(self.storage), failure_config=ray.train.FailureConfig(max_failures=self.restarts)
            ),
            torch_config=TorchConfig(backend="nccl" if self.use_gpu else "gloo"),
        )


def work_through_queue(config: dict[str, Any]) -> None:
    """The loop of every Ray Train worker: take a job, run it, take the next."""
    import ray

    from eclectus.models.elastic.stop import TrainingStopped, go_on
    from eclectus.models.training.process import Process

    process, queue, done = Process.current(), config["queue"], 0
    attempt = process.gather(uuid.uuid4().hex)[0]

    def report(kind: str, **values: Any) -> None:
        if process.is_main:
            queue.report.remote(kind, values)

    go_on()
    threading.Thread(target=_watch, args=(queue,), daemon=True, name="stop-watch").start()
    while (job := ray.get(queue.take.remote(done))) is not None:
        report("workers", workers=process.world)
        try:
            result = function_at(job["call"])(process, report, **job["arguments"])
        except TrainingStopped as stopped:
            if ray.get(queue.stopped.remote(job["number"], str(stopped))):
                # The next group takes this job; this one is about to be ended, and takes no other.
                done = job["number"]
            continue
        except Exception as error:
            what = type(error).__name__, str(error), traceback.format_exc()
            ray.get(queue.fail.remote(job["number"], attempt, what))
            raise
        done = job["number"]
        returned = result if process.is_main else None
        ray.get(queue.finish.remote(done, attempt, process.rank, process.world, returned))


def _watch(queue: Any) -> None:
    """Asks the training of this process to stop when the queue says so."""
    import ray

    from eclectus.models.elastic.stop import ask_to_stop

    # A group that is ended takes its queue, or this process, with it.
    with contextlib.suppress(ray.exceptions.RayError):
        if ray.get(queue.wait_for_stop.remote()):
            ask_to_stop()


def address_of(call: Callable[..., Any]) -> str:
    """`package.module:function`, by which another process imports it. Raises ValueError if it is not importable."""
    module, name = call.__module__, call.__qualname__
    if module == "__main__" or not name.isidentifier():
        raise ValueError(f"{module}.{name} is not at the top level of a module, so no worker can import it")
    return f"{module}:{name}"


def function_at(address: str) -> Callable[..., Any]:
    """The function at `package.module:function`."""
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)
