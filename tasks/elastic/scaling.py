"""Ray Train's elastic scaling, of which two things are changed.

**Which numbers.** Ray Train starts as many workers as the cluster has room for, 3 of 4, say. A batch must be shared
evenly, so a group has training_workers or a divisor of it: batches are multiples of training_workers, hence of these.

**When it grows.** Ray Train ends a healthy group as soon as there is room for more, wherever that group is in its work.
Here the workers are first asked to write a checkpoint (`JobQueue.pause`); they are replaced when one of them reports
that, or when they have no job, so that no step is computed twice.

When a node is lost, the group ends in any case, and begins again with what is left.
"""

from __future__ import annotations

import time
from typing import Any, cast

import ray
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

ANSWER_SECONDS = 10
# After a group has ended: until Ray knows of a node that is lost without a word (its health checks take longer by
# default; then the first try to start workers on it fails, after a minute).
SETTLE_SECONDS = 10.0


def group_sizes(workers: int, least: int) -> list[int]:
    """The numbers of workers that a group of `workers` may have, ascending; itself alone if `least` is 0."""
    return [size for size in range(least or workers, workers + 1) if workers % size == 0]


class EvenScaling(ElasticScalingPolicy):
    """Decides on the number of workers. Runs in Ray Train's controller."""

    def __init__(self, scaling_config: ScalingConfig, queue: Any) -> None:
        """queue: the handle of the group's JobQueue."""
        super().__init__(scaling_config)
        self._queue = queue
        self._sizes = group_sizes(scaling_config.max_workers, scaling_config.min_workers)
        self._pausing = False
        self._ended: float | None = None
        self._has_run = False

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= possible), default=0)

    def _get_reserved_resources(self) -> Any:
        """Of the nodes that are there now; what Ray Train asks may count on a node that was lost 20 s ago."""
        try:
            coordinator = self._autoscaling_coordinator
            ray.get(
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=ANSWER_SECONDS
            )
        except ray.exceptions.RayError:
            # The next call reports it.
            pass
        return super()._get_reserved_resources()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self._has_run and self._ended is None:
            self._ended = time.monotonic()
        if self._ended is not None and time.monotonic() < self._ended + SETTLE_SECONDS:
            return NoopDecision()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        self._has_run, self._ended = True, None
        if not self._pausing:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            if getattr(decision, "num_workers", 0) > worker_group_state.num_workers:
                self._pausing = True
            return NoopDecision()
        if not self._ask("pause"):
            return NoopDecision()
        found = self._get_reserved_resources()
        possible = self._count_possible_workers(found) if found else 0
        # Where the node has left meanwhile the group starts again with as many workers as it had.
        return self._get_resize_decision(max(possible, worker_group_state.num_workers))

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> None:
        self._pausing = not self._ask("go_on")

    def _ask(self, what: str) -> bool:
        """The queue's answer; False where none comes in time, and it is asked again."""
        try:
            return bool(ray.get(getattr(self._queue, what).remote(), timeout=ANSWER_SECONDS))
        except ray.exceptions.RayError:
            return False


class ElasticTrainer(TorchTrainer):
    """TorchTrainer with EvenScaling."""

    def __init__(self, *arguments: Any, queue: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._queue = queue

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = EvenScaling(cast(ScalingConfig, self.scaling_config), self._queue)
        return super()._initialize_and_run_controller(**options)
