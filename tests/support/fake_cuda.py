"""A CUDA device that is not there, for fake tensors: compiled, and loaded by a process that trains on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__)


LIBRARY = "fake_cuda.so"


def build(out: Path) -> None:
    """Compiles fake_cuda.cpp into a folder (4 CPU s)."""
    place, library = Path(torch.__file__).parent, out / LIBRARY
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{place / 'include'}"]
    command += [str(HERE.with_suffix(".cpp")), "-o", str(library), f"-L{place / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, f"-Wl,-rpath,{place / 'lib'}", "-Wl,--no-as-needed"], check=True)


def found_in(folder: Path, cases: list[str]) -> dict[str, list[str]]:
    """What gpu_watch.py finds in the training steps of each case (gpu_cases.py).

    folder: with the library of `build`, and instances in a folder of this name.
    """
    root = HERE.parents[2]
    command = [
        sys.executable,
        "-m",
        "tests.support.gpu_watch",
        str(folder / LIBRARY),
        str(folder / "instances"),
        *cases,
    ]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found
