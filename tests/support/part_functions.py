"""Functions for tests of `over_parts`: at the top level of a module, as Ray's workers import them."""

import os
import signal
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
