"""Stops a training at the end of a step, with a checkpoint first.

Whoever wants a training of this process to stop calls `ask_to_stop`: on SIGTERM, the process itself (`sigterm_stops`);
on a Ray Train worker, the watch of its job queue (tasks/training/workers.py). The training loop asks all processes at
every step, so all of them stop after the same one, write the checkpoint, and raise TrainingStopped.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_asked = threading.Event()


class TrainingStopped(Exception):
    """Training was asked to stop, and its checkpoint is written; the message names the step."""


def ask_to_stop() -> None:
    """Asks the training of this process to stop; before its first step, or without one, at the first step to come."""
    _asked.set()


def stop_asked() -> bool:
    return _asked.is_set()


def go_on() -> None:
    """Takes back what was asked."""
    _asked.clear()


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM asks the training in the block to stop; the signal then reaches who handled it before. A second one
    reaches them at once.

    Does nothing outside of the main thread, which alone gets signals.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if not stop_asked():
            ask_to_stop()
            return
        go_on()
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if stop_asked():
            go_on()
            os.kill(os.getpid(), signal.SIGTERM)
