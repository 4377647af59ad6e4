"""Ray for this process: connects to a cluster if one is configured, else starts Ray on this machine on first use.

A local start costs about 7 s and 0.8 GB, so it is delayed until there is work for it. On a cluster, set RAY_ADDRESS
(`auto` on a node of the cluster); its workers read the same home, which must be on storage that all nodes share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from eclectus.storage.errors import EclectusError
from eclectus.tasks.run import current_run

WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}

# Of a Ray started on this machine, for one run or by `eclectus up`.
OBJECT_STORE_BYTES = 256 * 2**20
# It listens on every interface unless it is told that this machine is in no cluster, as on a Mac or Windows.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def local_cpus() -> int:
    """CPUs of a Ray started on this machine: two or more, since a training worker and its coordinator take one each."""
    return max(2, os.cpu_count() or 1)


def ensure_ray() -> None:
    """Connects this process to Ray unless it is connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        for name, value in LOOPBACK.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "eclectus"}
    # Ray Train's clean-up looks for a cluster by itself; without RAY_ADDRESS it fails on a machine with two of them.
    runtime = {"env_vars": WORKER_ENVIRONMENT | ({"RAY_ADDRESS": address} if address else {})}
    if address:
        with _sigterm_restored():
            dashboard = ray.init(address=address, runtime_env=runtime, **common).dashboard_url
        run, shown = current_run(), os.environ.get("ECLECTUS_RAY_DASHBOARD") or (dashboard and f"http://{dashboard}")
        if run and shown:
            what = "Ray's dashboard: nodes, workers and logs of this run"
            run.show(lambda display: display.linked("Ray dashboard", shown, what))
        return
    # Without "local" Ray joins a cluster that anybody started on this machine, or fails on what one left in /tmp.
    common |= {"address": "local", "num_cpus": local_cpus(), "include_dashboard": False}
    _start_ray(object_store_memory=OBJECT_STORE_BYTES, runtime_env=runtime, **common)


def _start_ray(attempts: int = 3, **settings: Any) -> None:
    """Starts Ray here. It gives up a start that takes longer than 30 s, which a busy machine may need: tried again."""
    import ray

    for left in range(attempts)[::-1]:
        try:
            with _sigterm_restored():
                ray.init(**settings)
            return
        except Exception as error:
            # Ray has no class for it.
            if "timed out during startup" not in str(error):
                raise
            if not left:
                why = f"Ray did not start within 30 s, {attempts} times: this machine is too busy; run it again"
                raise EclectusError(why) from error


@contextlib.contextmanager
def _sigterm_restored() -> Iterator[None]:
    """Restores our SIGTERM handler after ray.init replaces it; else Prefect marks a cancelled run as crashed."""
    handler, early = signal.getsignal(signal.SIGTERM), False
    try:
        yield
    except SystemExit as end:
        early = end.code == signal.SIGTERM
        if not early:
            raise
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if early:
        # SIGTERM came while Ray's handler was installed: send it again.
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(signal.SIGTERM)


def shut_ray() -> None:
    """Disconnects from Ray, and stops it if this process started it."""
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def require_gpu(setting: str) -> None:
    """Raises EclectusError where the cluster has no GPU: a call that asks for one would wait for ever.

    setting: the name of that which is 'cuda'.
    """
    import ray

    ensure_ray()
    if not ray.cluster_resources().get("GPU", 0):
        raise EclectusError(f"{setting} is 'cuda', but Ray has no GPU; set it to 'cpu' or add a node with one")


def workers_see_files() -> bool:
    """Whether Ray's workers see the files of this machine: not where the home is on an object store, through which the
    machines of a cluster exchange what they need of it."""
    run = current_run()
    return run is None or run.home.mirror is None or not os.environ.get("RAY_ADDRESS")
