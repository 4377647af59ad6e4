"""Functions for tests of `over_parts`: at the top level of a module, as Ray's workers import them."""

import errno
import os
import signal
import time
from pathlib import Path

from eclectus.storage.errors import EclectusError


def square(out, number, calls):
    """Writes number squared; leaves a file in `calls` per call."""
    Path(calls, f"{number}-{os.getpid()}-{len(os.listdir(calls))}").touch()
    (out / "square").write_text(str(number**2))
    return {"square": number**2, "process": os.getpid()}


def square_or_fail(out, number, calls, fails):
    """As `square`, but the number `fails` raises, is refused or kills its process, as many times as `calls` shows."""
    about = square(out, number, calls)
    tries = len([name for name in os.listdir(calls) if name.startswith(f"{number}-")])
    how, times = fails.get(str(number), ("", 0))
    if tries <= times:
        if how == "refuse":
            raise EclectusError(f"part {number} is refused")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"no luck with {number}")
    return about


def read(out, path):
    """What is in a file."""
    return {"text": path.read_text(), "root": str(path)}


def square_on_full_disk(out, number, full):
    """As `square`, but the disk is full while the file `full` is there; on some nodes, if it names them."""
    (out / "square").write_text(str(number**2))
    if full.exists():
        import ray

        nodes = full.read_text().split()
        if not nodes or ray.get_runtime_context().get_node_id() in nodes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "square"))
    return {"square": number**2}


def square_slowly(out, number, calls, seconds):
    """As `square`, after some time; says where it was computed."""
    import ray

    about = square(out, number, calls)
    time.sleep(seconds)
    return about | {"node": ray.get_runtime_context().get_node_id()}
