"""Ends for runs whose process was killed: SQL then tells a dead run (`crashed`) from a running one (`unfinished`).

A process holds a lock on its journal for as long as it lives, and the system releases it however it ends. So a journal
of this machine that nobody holds, and whose run or steps have no end, gets these ends, as the next command on the home
finds it. Journals of other machines are left alone. Cost: one lock and the last 10 kB of each journal that is not
compacted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
from typing import Any, BinaryIO

import psutil

from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS, cut_short, now, seconds_between
from eclectus.storage.lineage.live_journals import LAST_BYTES, journals

CRASHED = "crashed"
WHY = "its process ended without a word: killed, out of memory, or its machine went down"


def end_dead_runs(home: Home) -> list[str]:
    """Writes the ends of runs and steps that died on this machine; returns the runs. Nothing in a read-only home."""
    ended = []
    for path in journals(home, EVENTS):
        mine = re.search(rf"\.{re.escape(socket.gethostname())}-(\d+)-", path.name)
        # Of an object store's journals this machine has copies, which nobody locks.
        if not mine or (home.mirror and psutil.pid_exists(int(mine[1]))):
            continue
        with contextlib.suppress(OSError), open(path, "r+b") as handle:
            if not _has_no_end(handle):
                continue
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if run := _write_ends(handle):
                ended.append(run)
                if home.mirror:
                    home.mirror.push(path)
    return ended


def _has_no_end(handle: BinaryIO) -> bool:
    size = os.fstat(handle.fileno()).st_size
    handle.seek(-min(size, LAST_BYTES), os.SEEK_END)
    tail = handle.read()
    return b'"run_ended"' not in tail or not tail.endswith(b"\n")


def _write_ends(handle: BinaryIO) -> str | None:
    handle.seek(0)
    started: dict[str, Any] | None = None
    steps: dict[str, dict[str, Any]] = {}
    last, end = "", 0
    for line in handle:
        end += len(line) if line.endswith(b"\n") else 0
        try:
            row = json.loads(line)
            kind, last = row["event"], row["logged"]
        except (ValueError, KeyError, TypeError):
            continue
        if kind == "run_started":
            started = row
        elif kind == "run_ended" and line.endswith(b"\n"):
            handle.truncate(end)
            return None
        elif kind == "step_started":
            steps[row["step"]] = row
        elif kind == "step_ended":
            steps.pop(row["step"], None)
    # A line that was cut short says nothing.
    handle.truncate(end)
    if started is None:
        return None
    about = {"logged": now(), "run": started["run"], "state": CRASHED}
    lines = []
    for step in steps.values():
        lines.append({"event": "step_ended", **about, **cut_short(step, CRASHED, WHY, last)})
    lines.append({"event": "run_ended", **about, "seconds": seconds_between(started["logged"], last), "error": WHY})
    text = "".join(json.dumps(each) + "\n" for each in lines).encode()
    # Not through the handle's buffer, which would write the rest at close.
    if os.pwrite(handle.fileno(), text, end) < len(text):
        # A full disk took only a part; the next command tries again.
        handle.truncate(end)
        return None
    os.fsync(handle.fileno())
    return str(started["run"])
