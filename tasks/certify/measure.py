"""Asks one server: its environment, the request, the script that runs in it (tasks/certify/clients), its answer."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclectus.tasks.certify import clients
from eclectus.tasks.certify.environments import (
    UnavailableError,
    clean_variables,
    ensure_environment,
    forget_environment,
    is_importable,
    last_error,
)
from eclectus.tasks.certify.prompts import Prompt
from eclectus.tasks.certify.servers import Server

ANSWER_SECONDS = 3600
# Likeliest tokens of which a server tells the log-probabilities, at every position.
TOP = 20
# No server may look for anything outside, or report its use.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
# Threads that spin while they wait take a busy machine's time from each other.
QUIET |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
QUIET |= {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Question:
    """What all servers are asked. own_code: whether the export brings code. context: tokens to make room for.

    threads: of each server; matrices of small models are too small for several, which then wait for each other.
    """

    prompts: list[Prompt]
    greedy: int
    own_code: bool
    context: int
    threads: int = 1

    def request(self, model: Path, dtype: str) -> dict[str, Any]:
        texts = [prompt.text for prompt in self.prompts]
        return {
            "model": str(model),
            "dtype": dtype,
            "prompts": [prompt.ids for prompt in self.prompts],
            "texts": None if None in texts else texts,
            "greedy": self.greedy,
            "top": TOP,
            "context": self.context,
            "threads": self.threads,
            "own_code": self.own_code,
        }


def ask(
    server: Server, folder: Path, request: dict[str, Any], report: Callable[[str], None]
) -> tuple[dict[str, Any], float]:
    """(the server's answer, seconds it took without installing). folder: of environments.

    An environment that cannot import its server is made again, once. Raises UnavailableError with the reason in one
    line: not installed, refuses the model, ends without an answer.
    """
    for last in (False, True):
        python, started = ensure_environment(server, folder, report), time.monotonic()
        try:
            return _run(server, python, request), time.monotonic() - started
        except _NotImportableError as error:
            if last:
                raise UnavailableError(f"its environment is broken: {error}") from error
            forget_environment(server, folder)
    raise AssertionError("unreachable")


class _NotImportableError(Exception):
    """The environment lacks a package."""


def _run(server: Server, python: Path, request: dict[str, Any]) -> dict[str, Any]:
    script = Path(clients.__file__).with_name(f"{server.client}.py")
    with tempfile.TemporaryDirectory(prefix="eclectus-certify-") as temporary:
        asked, answered = Path(temporary) / "request.json", Path(temporary) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), "-I", str(script), str(asked), str(answered)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=ANSWER_SECONDS,
                check=False,
                env=clean_variables() | QUIET,
                cwd=temporary,
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"gave no answer within {ANSWER_SECONDS} s") from None
        if done.returncode == 0 and answered.is_file():
            return json.loads(answered.read_text(encoding="utf-8"))
    printed = f"{done.stdout}\n{done.stderr}"
    lines = done.stderr.strip().splitlines()
    # Code that an export brings may ask for what this server does not have: then the environment is whole.
    if lines and lines[-1].startswith(("ModuleNotFoundError", "ImportError")) and not is_importable(server, python):
        raise _NotImportableError(lines[-1][:300])
    if done.returncode < 0:
        raise UnavailableError(f"was ended by signal {-done.returncode} (out of memory?)")
    raise UnavailableError(f"refuses the model: {_reason(server, printed)}")


def _reason(server: Server, printed: str) -> str:
    """llama.cpp says why in a line of its log, long before its last one."""
    told = [line for line in printed.splitlines() if "error loading model" in line and server.gguf]
    return last_error(told[-1].partition("error loading model:")[2] if told else printed)
