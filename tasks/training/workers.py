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
"""

from __future__ import annotations

import importlib
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eclectus.storage.errors import EclectusError
from eclectus.tasks.ray_cluster import ensure_ray

RESTARTS = 3
POLL_SECONDS = 0.25
# Exceptions of jobs that are shown by their message alone; others are raised with their traceback.
EXPECTED_ERRORS = {"EclectusError", "TrainingFailed"}


class JobQueue:
    """The actor between driver and workers: one job at a time, its results by rank, and reports from the workers."""

    def __init__(self) -> None:
        import asyncio

        self._changed = asyncio.Condition()
        self._number = 0
        self._job: dict[str, Any] | None = None
        self._closed = False
        self._workers = 0
        self._results: dict[int, Any] = {}
        self._error: tuple[str, str, str] | None = None
        self._seen: set[tuple[str, str]] = set()
        self._reports: list[tuple[str, dict[str, Any]]] = []

    async def post(self, call: str, arguments: dict[str, Any], workers: int) -> int:
        async with self._changed:
            self._number += 1
            self._job = {"number": self._number, "call": call, "arguments": arguments}
            self._workers, self._results, self._error, self._seen = workers, {}, None, set()
            self._changed.notify_all()
            return self._number

    async def take(self, done: int) -> dict[str, Any] | None:
        """The next job after job number `done`; None when there will be none."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closed or (self._number > done and self._job is not None and self._error is None)
            )
            return None if self._closed else self._job

    async def finish(self, number: int, rank: int, result: Any) -> None:
        if number == self._number:
            self._results[rank] = result
            if len(self._results) == self._workers:
                self._job = None

    async def fail(self, number: int, error: tuple[str, str, str]) -> None:
        """A job's exception ends the job if it is an expected error, or if it was raised again after a restart.

        Any other may follow from a worker that died (a broken connection, for example), so the job is tried again.
        """
        if number != self._number or self._error is not None:
            return
        if error[0] in EXPECTED_ERRORS or error[:2] in self._seen:
            self._error, self._job = error, None
        self._seen.add(error[:2])

    async def report(self, kind: str, values: dict[str, Any]) -> None:
        self._reports.append((kind, values))

    async def poll(self) -> tuple[list[tuple[str, dict[str, Any]]], dict[int, Any] | None, tuple[str, str, str] | None]:
        """(reports since the last poll, results by rank when all are done, the first error)."""
        reports, self._reports = self._reports, []
        return reports, self._results if len(self._results) == self._workers else None, self._error

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
    ) -> None:
        """storage: a directory for Ray Train's own files, on storage that all nodes share. cpus: CPUs per worker."""
        self.workers = workers
        self.use_gpu = use_gpu
        self.storage = storage
        self.restarts = restarts
        self.resources = {"CPU": cpus, **({"GPU": 1.0} if use_gpu else {})}
        self.placement = placement
        self._queue: Any = None
        self._thread: threading.Thread | None = None
        self._fit_error: BaseException | None = None

    def do(
        self, call: Callable[..., Any], arguments: dict[str, Any], on_report: Callable[[str, dict[str, Any]], None]
    ) -> Any:
        """Runs one job on all workers and returns rank 0's result.

        call: a function at the top level of a module that the workers can import. on_report: called in this thread for
        every report of the workers.
        Raises EclectusError when the job raised it; RuntimeError when the workers died too often.
        """
        import ray

        thread = self._ensure_started()
        ray.get(self._queue.post.remote(address_of(call), arguments, self.workers))
        while True:
            thread.join(timeout=POLL_SECONDS)
            reports, results, error = ray.get(self._queue.poll.remote())
            for kind, values in reports:
                on_report(kind, values)
            if error is not None:
                name, message, trace = error
                self._abandon()
                if name in EXPECTED_ERRORS:
                    raise EclectusError(message)
                raise RuntimeError(f"{name}: {message}\n{trace}")
            if results is not None:
                return results[0]
            if not thread.is_alive():
                raise RuntimeError(f"the training workers are lost after {self.restarts} restarts: {self._fit_error}")

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

    def _ensure_started(self) -> threading.Thread:
        if self._thread is not None and self._thread.is_alive():
            return self._thread
        ensure_ray()
        import ray

        self._queue = ray.remote(num_cpus=0)(JobQueue).remote()
        self._thread = threading.Thread(target=self._fit, daemon=True, name="ray-train-fit")
        self._thread.start()
        return self._thread

    def _fit(self) -> None:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            work_through_queue,
            train_loop_config={"queue": self._queue},
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.workers,
                use_gpu=self.use_gpu,
                resources_per_worker=self.resources,
                placement_strategy=self.placement,
            ),
            run_config=ray.train.RunConfig(
                storage_path=str(self.storage), failure_config=ray.train.FailureConfig(max_failures=self.restarts)
            ),
            torch_config=TorchConfig(backend="nccl" if self.use_gpu else "gloo"),
        )
        try:
            trainer.fit()
        except (Exception, SystemExit) as error:
            self._fit_error = error


def work_through_queue(config: dict[str, Any]) -> None:
    """The loop of every Ray Train worker: take a job, run it, take the next."""
    import ray

    from eclectus.models.training.process import Process

    process, queue, done = Process.current(), config["queue"], 0

    def report(kind: str, **values: Any) -> None:
        if process.is_main:
            queue.report.remote(kind, values)

    while (job := ray.get(queue.take.remote(done))) is not None:
        try:
            result = function_at(job["call"])(process, report, **job["arguments"])
        except Exception as error:
            ray.get(queue.fail.remote(job["number"], (type(error).__name__, str(error), traceback.format_exc())))
            raise
        done = job["number"]
        ray.get(queue.finish.remote(done, process.rank, result if process.is_main else None))


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
