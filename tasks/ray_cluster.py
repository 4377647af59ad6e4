"""Ray for this process: joined when a cluster is configured, else started on this machine, once, when first needed.

A local start costs about 7 s and 0.8 GB, so nothing calls this before there is work for it. On a cluster, set RAY_ADDRESS
(`auto` on a node of the cluster); its workers read the same home, so that must be on storage which all nodes share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from eclectus.tasks.run import current_run

WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}

# Of a Ray started on this machine, for one run or by `eclectus up`.
OBJECT_STORE_BYTES = 256 * 2**20


def local_cpus() -> int:
    """CPUs of a Ray started on this machine: two or more, since a training worker and its coordinator take one each."""
    return max(2, os.cpu_count() or 1)


def ensure_ray() -> None:
    """Makes sure that this process is connected to Ray; does nothing when it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    common = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "eclectus"}
    # Ray Train's clean-up looks for the cluster by itself, and fails where it finds two on a machine and is told of none.
    runtime = {"env_vars": WORKER_ENVIRONMENT | ({"RAY_ADDRESS": address} if address else {})}
    if address:
        with _own_signals():
            dashboard = ray.init(address=address, runtime_env=runtime, **common).dashboard_url
        run, shown = current_run(), os.environ.get("ECLECTUS_RAY_DASHBOARD") or (dashboard and f"http://{dashboard}")
        for display in run.displays if run and shown else ():
            display.linked("Ray dashboard", shown, "Ray's dashboard: nodes, workers and logs of this run")
        return
    with _own_signals():
        ray.init(
            num_cpus=local_cpus(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env=runtime,
            **common,
        )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps who handles SIGTERM: Ray puts itself there, and Prefect would take a cancelled run for a crashed one."""
    before, early = signal.getsignal(signal.SIGTERM), False
    try:
        yield
    except SystemExit as end:
        early = end.code == signal.SIGTERM
        if not early:
            raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    if early:
        # Sent while Ray's own handler was there.
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(signal.SIGTERM)


def shut_ray() -> None:
    """Disconnects from Ray; what this process started, it stops."""
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
