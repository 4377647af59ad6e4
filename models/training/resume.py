"""Training checkpoints: a killed training resumes from the last one and ends with the same bits.

    work/step-400/trained-00001-of-00002.safetensors     blocks of trained parameters that process 1 holds
                  moments-00001-of-00002.safetensors     their AdamW state
                  progress.json                          step, and the SHA-256 of every file
    work/latest -> step-400                              set when all files are on the disk

The metadata of a file says which block of each whole tensor it holds, so any number of processes can read what any
other number has written, sharded or not. A damaged checkpoint is never used: training restarts at its first step and
reports it. Cost: a copy of parameters and moments, 12 bytes per trained parameter, hashed once when written and once
when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from eclectus.models.training.optimizer import STATE, load_moments, read_moments
from eclectus.models.training.parallel import local, local_bounds
from eclectus.models.training.process import Process

# Of the files of a checkpoint.
FORMAT = 2


class TrainingFailed(Exception):
    """Training cannot continue; the message names the step and the reason, and the last good checkpoint is kept."""


def save_progress(
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    step: int,
    start: int,
    process: Process,
    work: Path,
) -> None:
    """Writes a checkpoint and, when it is complete, removes the previous one. All processes must call it.

    Raises TrainingFailed in all of them if one cannot write its part.
    """
    folder = work / f"step-{step}"
    if process.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    process.barrier()
    sharded = any(local(parameter) is not parameter for parameter in named.values())
    digests: dict[str, str] = {}
    fault: str | None = None
    holders = process.world // process.replicas if sharded else 1
    if process.rank < holders:
        part = f"{process.rank + 1:05d}-of-{holders:05d}"
        stored: dict[str, Mapping[str, torch.Tensor]] = {"trained": named, "moments": read_moments(optimizer, named)}
        try:
            for kind, tensors in stored.items():
                digests[f"{kind}-{part}.safetensors"] = _write(folder / f"{kind}-{part}.safetensors", tensors)
        except (OSError, SafetensorError) as error:
            fault = f"the checkpoint {folder} cannot be written by process {process.rank}: {error}"
    by_rank = process.gather((digests, fault))
    if faults := [each for _, each in by_rank if each]:
        if process.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise TrainingFailed(f"{faults[0]}; the one before is kept, and the next run goes on from it: free some space")
    if process.is_main:
        files = {name: digest for each, _ in by_rank for name, digest in each.items()}
        _write_json(folder / "progress.json", {"format": FORMAT, "step": step, "start": start, "files": files})
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
    is damaged. Raises ValueError if it is of another model or another stage, TrainingFailed in all processes if one of
    them does not see the newest checkpoint.
    """
    latest = _newest(work, process)
    fault, about = _faults(latest, process) if latest else (None, None)
    faults = [each for each in process.gather(fault) if each]
    if faults:
        if process.is_main:
            report("damaged", step=start, text=f"{faults[0]}; training begins again at step {start}")
        return None
    if latest is None or about is None:
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
        for name, parameter in named.items():
            keys = [key for what in STATE if (key := f"{name}.{what}") in pieces.names]
            # One parameter at a time: they are copied.
            load_moments(optimizer, {name: parameter}, {key: pieces.moment(key, parameter, latest) for key in keys})
    return about["step"]


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes this process's shards of the tensors; returns the file's SHA-256."""
    parts = {name: local(tensor.detach()).contiguous() for name, tensor in tensors.items()}
    # Where a block begins, and the shape of the whole.
    blocks = {
        name: [[begin for begin, _ in local_bounds(tensor)], list(tensor.shape)] for name, tensor in tensors.items()
    }
    kept = {name: part for name, part in parts.items() if part.numel()}
    save_file(kept, path, metadata={"blocks": json.dumps(blocks)})
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


def _newest(work: Path, process: Process) -> Path | None:
    """The newest checkpoint that any process knows; all of them must see it, and the same.

    A pointer that is old (a node that was away, a cache of a network file system) does no harm; a folder that is each
    node's own does.
    """
    pointer = work / "latest"
    known = [each for each in process.gather(pointer.readlink().name if pointer.is_symlink() else None) if each]
    if not known:
        return None
    folder = work / max(known, key=lambda name: int(name.rpartition("-")[2]))
    try:
        about = (folder / "progress.json").read_bytes()
    except OSError:
        about = None
    seen = process.gather((socket.gethostname(), about))
    having = [host for host, each in seen if each is not None]
    if lacking := [host for host, each in seen if each is None and having]:
        raise TrainingFailed(
            f"{lacking[0]} has no checkpoint {folder.name} in {work}, which {having[0]} has: this folder must be on "
            f"storage that all nodes share (ECLECTUS_HOME, ECLECTUS_CACHE); mount it on {lacking[0]}"
        )
    if differing := [host for host, each in seen if each != seen[0][1]]:
        raise TrainingFailed(
            f"{differing[0]} and {seen[0][0]} have different checkpoints {folder.name} in {work}: this folder must be "
            f"on storage that all nodes share (ECLECTUS_HOME, ECLECTUS_CACHE); remove the one on {differing[0]}, which "
            "may be old"
        )
    return folder


def _faults(latest: Path, process: Process) -> tuple[str | None, dict[str, Any] | None]:
    """(what is damaged in the checkpoint, content of progress.json); the processes divide the files between them."""
    try:
        about = json.loads((latest / "progress.json").read_text())
        if about.get("format") != FORMAT:
            return f"the checkpoint {latest} was written by another version", None
        names = sorted(about["files"])
        for name in names[process.rank :: process.world]:
            if _digest(latest / name) != about["files"][name]:
                return f"the checkpoint {latest} is damaged: {name} is not what was written", None
        return None, {"step": int(about["step"]), "start": int(about["start"]), "files": names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the checkpoint {latest} is damaged: {error}", None


class _Pieces:
    """Tensors whose blocks are spread over several files."""

    def __init__(self, files: list[Any]) -> None:
        self._where: dict[str, list[tuple[Any, list[int]]]] = {}
        self._shapes: dict[str, list[int]] = {}
        for file in files:
            blocks = json.loads(file.metadata()["blocks"])
            for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                begins, self._shapes[name] = blocks[name]
                self._where.setdefault(name, []).append((file, begins))
        self.names = set(self._where)

    def read(self, name: str, parameter: torch.Tensor, latest: Path) -> torch.Tensor:
        """The block of the stored tensor that this process holds of `parameter`."""
        if self._shapes.get(name) != list(parameter.shape):
            raise ValueError(
                f"the checkpoint {latest} is of another model: it has {name} as {self._shapes.get(name)}, expected "
                f"{list(parameter.shape)}; remove it, or train with the settings that made it"
            )
        bounds = local_bounds(parameter)
        found, missing = torch.empty(local(parameter).shape, dtype=parameter.dtype), local(parameter).numel()
        for file, begins in self._where[name]:
            stored = file.get_slice(name)
            ends = [begin + size for begin, size in zip(begins, stored.get_shape(), strict=True)]
            both = [(max(ours[0], b), min(ours[1], e)) for ours, b, e in zip(bounds, begins, ends, strict=True)]
            if all(begin < end for begin, end in both):
                block = stored[tuple(slice(low - b, high - b) for (low, high), b in zip(both, begins, strict=True))]
                found[tuple(slice(lo - o, hi - o) for (lo, hi), (o, _) in zip(both, bounds, strict=True))] = block
                missing -= block.numel()
        if missing:
            raise ValueError(f"the checkpoint {latest} lacks a part of {name}; remove it to train from the start")
        return found

    def moment(self, key: str, parameter: torch.Tensor, latest: Path) -> torch.Tensor:
        """One tensor of AdamW's state, sharded as its parameter is."""
        if key.endswith(".step"):
            return self._where[key][0][0].get_tensor(key)
        moment = torch.empty_like(parameter)
        local(moment).copy_(self.read(key, parameter, latest))
        return moment
