"""Training checkpoints: a killed training resumes from the last one and ends with the same bits.

    work/step-400/trained-00001-of-00002.safetensors     rows of every trained parameter that process 1 holds
                  moments-00001-of-00002.safetensors     their AdamW state
                  progress.json                          step, and the SHA-256 of every file
    work/latest -> step-400                              set when all files are on the disk

The metadata of a file says which rows of the whole tensors it holds, so any number of processes can read what any other
number has written, sharded or not. A damaged checkpoint is never used: training restarts at its first step and reports
it. Cost: a copy of parameters and moments, 12 bytes per trained parameter, hashed once when written and once when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from eclectus.models.training.optimizer import STATE, load_moments, read_moments
from eclectus.models.training.parallel import first_row, local, whole
from eclectus.models.training.process import Process


def save_progress(
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    step: int,
    start: int,
    process: Process,
    work: Path,
) -> None:
    """Writes a checkpoint and, when it is complete, removes the previous one. All processes must call it."""
    folder = work / f"step-{step}"
    if process.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    process.barrier()
    sharded = any(local(parameter) is not parameter for parameter in named.values())
    digests: dict[str, str] = {}
    if sharded or process.is_main:
        part = f"{process.rank + 1:05d}-of-{process.world if sharded else 1:05d}"
        stored: dict[str, Mapping[str, torch.Tensor]] = {"trained": named, "moments": read_moments(optimizer, named)}
        for kind, tensors in stored.items():
            digests[f"{kind}-{part}.safetensors"] = _write(folder / f"{kind}-{part}.safetensors", tensors)
    by_rank = process.gather(digests)
    if process.is_main:
        files = {name: digest for each in by_rank for name, digest in each.items()}
        _write_json(folder / "progress.json", {"step": step, "start": start, "files": files})
        pointer = work / ".latest"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(folder.name)
        os.replace(pointer, work / "latest")
        for old in work.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)
    process.barrier()


def resume(
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    start: int,
    process: Process,
    work: Path,
    report: Callable[..., None],
) -> int | None:
    """Loads the last checkpoint under `work` and returns the step to continue with; None without a usable checkpoint.

    start: the first step of this training. report: called as report("damaged", step=start, text=...) if the checkpoint
    is damaged. Raises ValueError if it is of another model or another stage.
    """
    latest = work / "latest"
    fault, about = _faults(latest, process) if latest.exists() else (None, None)
    faults = [each for each in process.gather(fault) if each]
    if faults:
        if process.is_main:
            report("damaged", step=start, text=f"{faults[0]}; training begins again at step {start}")
        return None
    if about is None:
        return None
    if about["start"] != start:
        raise ValueError(
            f"{latest} is of a training that began at step {about['start']}, not {start}; give each its own folder"
        )
    with ExitStack() as stack:
        pieces = _Pieces([stack.enter_context(safe_open(latest / name, framework="pt")) for name in about["files"]])
        with torch.no_grad():
            for name, parameter in named.items():
                local(parameter).copy_(pieces.read(name, parameter, latest))
        state = {f"{name}.{what}" for name in named for what in STATE} & pieces.names
        moments = {key: pieces.moment(key, named[key.rpartition(".")[0]], latest) for key in sorted(state)}
    load_moments(optimizer, named, moments)
    return about["step"]


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes this process's shards of the tensors; returns the file's SHA-256."""
    parts = {name: local(tensor.detach()).contiguous() for name, tensor in tensors.items()}
    rows = {name: [first_row(tensor), *tensor.shape] for name, tensor in tensors.items() if tensor.ndim}
    save_file({name: part for name, part in parts.items() if part.numel()}, path, metadata={"rows": json.dumps(rows)})
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as handle:
        json.dump(value, handle)
        handle.flush()
        os.fsync(handle.fileno())


def _faults(latest: Path, process: Process) -> tuple[str | None, dict[str, Any] | None]:
    """(what is damaged in the checkpoint, content of progress.json); the processes divide the files between them."""
    try:
        about = json.loads((latest / "progress.json").read_text())
        names = sorted(about["files"])
        for name in names[process.rank :: process.world]:
            if _digest(latest / name) != about["files"][name]:
                return f"the checkpoint {latest} is damaged: {name} is not what was written", None
        return None, {"step": int(about["step"]), "start": int(about["start"]), "files": names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the checkpoint {latest} is damaged: {error}", None


class _Pieces:
    """Tensors whose rows are spread over several files."""

    def __init__(self, files: list[Any]) -> None:
        self._where: dict[str, list[tuple[Any, int]]] = {}
        self._shapes: dict[str, list[int]] = {}
        for file in files:
            rows = json.loads(file.metadata()["rows"])
            for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                first, *shape = rows.get(name, [0])
                self._where.setdefault(name, []).append((file, first))
                self._shapes[name] = shape
        self.names = set(self._where)

    def read(self, name: str, parameter: torch.Tensor, latest: Path) -> torch.Tensor:
        """The rows of the stored tensor that this process holds of `parameter`."""
        if self._shapes.get(name) != list(parameter.shape):
            raise ValueError(
                f"the checkpoint {latest} is of another model: it has {name} as {self._shapes.get(name)}, expected "
                f"{list(parameter.shape)}; remove it, or train with the settings that made it"
            )
        part = local(parameter)
        begin, found = first_row(parameter), torch.empty(part.shape, dtype=parameter.dtype)
        for file, first in self._where[name]:
            stored = file.get_slice(name)
            low, high = max(begin, first), min(begin + len(part), first + stored.get_shape()[0])
            if low < high:
                found[low - begin : high - begin] = stored[low - first : high - first]
        return found

    def moment(self, key: str, parameter: torch.Tensor, latest: Path) -> torch.Tensor:
        """One tensor of AdamW's state, sharded as its parameter is."""
        if key.endswith(".step"):
            return self._where[key][0][0].get_tensor(key)
        moment = torch.empty_like(parameter)
        local(moment).copy_(self.read(key, parameter, latest))
        return moment


def whole_tensors(tensors: dict[str, torch.Tensor], process: Process) -> dict[str, torch.Tensor]:
    """The tensors, whole, on the CPU of rank 0; an empty dict on other ranks. All processes must call it."""
    full = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if process.is_main:
            full[name] = value.detach().cpu().contiguous()
    return full
