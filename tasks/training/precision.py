"""What `training_precision: auto` means here: decided in the run's own process, before the key of a step is made.

    GPUs                     bfloat16 autocast
    CPU, a small model       float32: its products are too small to gain, and it has the same bits on every machine
    CPU, a large model       bfloat16 if a matrix product is at least GAIN times as fast in it, else float32

The decision is part of the step's key and handed to all workers, so that they agree: on a cluster whose training
workers have other CPUs than the machine that starts the run, choose a precision. The product is measured once for a
kind of CPU and release of PyTorch, in a process of its own, and remembered in the home's `work/`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eclectus.storage.atomic_write import write_atomically
from eclectus.tasks.run import current_run

# Parameters of the dense model from which on `auto` measures.
LARGE = 30_000_000
# At this ratio of single products a whole training step gains too: norms, losses and the optimizer stay in float32.
GAIN = 1.3
PROBE = "eclectus.models.training.precision"
PROBE_SECONDS = 120


@dataclass(frozen=True)
class Probe:
    """What was measured. gain: time of a float32 product over that of a bfloat16 one; 0 if it cannot be computed.

    words: about the gain, for a report. cuda: whether this machine has a GPU.
    """

    gain: float
    words: str
    cuda: bool = False


def faster_precision(found: Probe) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if found.gain >= GAIN else "float32"


def probe() -> Probe:
    """The measurement of this machine, made if there is none yet: 4 seconds."""
    return _probe_in(_file())


def known_probe() -> Probe | None:
    """The measurement of this machine, if there is one."""
    path = _file()
    return _read(path) if path else None


@functools.cache
def _probe_in(path: Path | None) -> Probe:
    if path and (known := _read(path)):
        return known
    found = _measured()
    if path:
        # A home that is only read is measured for again.
        with contextlib.suppress(OSError):
            write_atomically(path, json.dumps(asdict(found)))
    return found


def _measured() -> Probe:
    """Multiplies in another process: a CPU may end it at an instruction that it does not have."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
        found = json.loads(done.stdout)
        gain, cuda = float(found["gain"]), bool(found["cuda"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        return Probe(0.0, f"bfloat16 cannot be measured on this machine ({type(error).__name__})")
    return Probe(gain, f"a matrix product in bfloat16 is {gain:.2g} times as fast as in float32 on this CPU", cuda)


def _file() -> Path | None:
    """Where the measurement of this kind of machine is kept; None outside a run."""
    run = current_run()
    if run is None:
        return None
    machine = json.dumps([_cpu(), importlib.metadata.version("torch")])
    return run.home.work / f"bfloat16-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


@functools.cache
def _cpu() -> str:
    """Name and features of the CPU, as the system describes them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    about = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(about))) or f"{platform.machine()} {platform.processor()}"


def _read(path: Path) -> Probe | None:
    try:
        return Probe(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def dense_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the dense model of a config.json, a mixture's with one expert: matrices, without norms and biases.

    0 if it does not say enough.
    """
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        inner = config.get("moe_intermediate_size") or config["intermediate_size"]
        head = config.get("head_dim") or width // heads
        attention = 2 * width * head * (heads + (config.get("num_key_value_heads") or heads))
        embeddings = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)
        return embeddings + config["num_hidden_layers"] * (attention + 3 * width * inner)
    except (KeyError, TypeError, ZeroDivisionError):
        return 0


def parameters_in(path: str | Path) -> int:
    """`dense_parameters` of a checkpoint directory; 0 if it is not there (yet)."""
    return dense_parameters(_json(Path(path) / "config.json"))


def vocabulary_in(path: str | Path) -> int:
    """Size of the vocabulary of packed instances; 0 if they are not there (yet)."""
    return int(_json(Path(path) / "instances.json").get("vocabulary", 0))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
