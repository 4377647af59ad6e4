"""Processes for tests, forked from a server that has imported torch and transformers; one starts in 0.1 s."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "transformers.models.auto.modeling_auto", "eclectus.models"])
PATIENCE = 240


def exit_codes(processes: list[BaseProcess]) -> list[int | None]:
    """Starts the processes and waits for them; a process that a signal ended has its negative number."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_process(function: Callable[..., None], *arguments: Any) -> int | None:
    """Calls a module's function in a process of its own; its exit code."""
    return exit_codes([CONTEXT.Process(target=_call, args=({}, function, arguments))])[0]


def run_group(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls a module's function in `count` processes with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    environments = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    codes = exit_codes([CONTEXT.Process(target=_call, args=(each, function, arguments)) for each in environments])
    assert codes == [0] * count, f"the processes ended with {codes}; their tracebacks are in stderr"


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until the condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def _call(environment: dict[str, Any], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
