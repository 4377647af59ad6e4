"""The training loop: one page, the same in a plain process, under torchrun and under Ray Train.

    for step in range(start, stop):
        rows = a pure function of (step, seed)             every process takes its share of them
        loss = objective(model, batch), backward           accumulated over micro-batches, averaged over processes
        clip, AdamW, schedule
        every so often: metrics; a checkpoint of weights, AdamW moments and step

Because the data order is a function of the step and there is no other randomness, a run that was killed and goes on from its
last checkpoint ends with bit-identical weights on CPU. fp32 on CPU; bf16 autocast on CUDA. Price: forward + backward, and
8 bytes a trained parameter for AdamW; parameters without gradients cost nothing here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.instances import Batch, Instances
from models.place import Place

Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
Tell = Callable[..., None]


class TrainingFailed(Exception):
    """Training cannot go on; the message names the step and the batch, and the last good checkpoint is kept."""


@dataclass(frozen=True)
class Plan:
    """What one stage of training does.

    start, stop: training steps, [start, stop). total: steps that the cosine is laid over. batch: instances a step over all
    processes. micro_batch: instances at once in one process. warmup: steps of linear warm-up from step 0. rewarm: (first
    step, steps) of a second warm-up, after a switch of the model, or None. floor: final learning rate over the peak one.
    """

    start: int
    stop: int
    total: int
    batch: int
    micro_batch: int
    learning_rate: float
    warmup: int
    rewarm: tuple[int, int] | None = None
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 10

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, cosine to floor * peak, and the second warm-up as a factor on top."""
        if step < self.warmup:
            rate = (step + 1) / self.warmup
        else:
            part = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
            rate = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * part))
        if self.rewarm and self.rewarm[0] <= step < sum(self.rewarm):
            rate *= (step - self.rewarm[0] + 1) / self.rewarm[1]
        return self.learning_rate * rate


def train(
    model: nn.Module,
    instances: Instances,
    objective: Objective,
    plan: Plan,
    place: Place,
    work: Path,
    tell: Tell,
    moments: dict[str, torch.Tensor] | None = None,
    checked: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Trains `model` in place from plan.start (or its last checkpoint under `work`) to plan.stop.

    moments: AdamW's state to start from, as this function returns it ({parameter name}.exp_avg and so on), or None for zeros.
    tell: called on rank 0 as tell("metrics", ...) and tell("progress", ...). checked: called with the step before every
    checkpoint is written; what it raises ends the training. Raises TrainingFailed on a loss or a gradient
    that is not finite, and ValueError when the batch cannot be shared evenly.
    """
    if plan.batch % place.world:
        raise ValueError(
            f"batch of {plan.batch} instances cannot be shared by {place.world} processes; make it a multiple"
        )
    model.to(place.device).train()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(named, plan)
    load_moments(optimizer, named, moments or {})
    begin = resume(model, optimizer, named, work, plan) or plan.start
    wrapped = wrap(model, place)
    share = plan.batch // place.world
    window = Window(plan, instances.length)
    for step in range(begin, plan.stop):
        rows = instances.rows_of_step(step, plan.batch, plan.seed)[place.rank * share : (place.rank + 1) * share]
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        for last, micro, weight in micro_batches(rows, plan.micro_batch):
            batch = instances.batch(micro).to(place.device)
            with synced(wrapped, last), autocast(place.device):
                loss, extra = objective(wrapped, batch)
            (loss * weight).backward()
            window.add(loss, extra, weight)
        norm = nn.utils.clip_grad_norm_(named.values(), plan.clip)
        window.norm = norm
        if place.device.type == "cpu" and not torch.isfinite(norm):
            raise TrainingFailed(not_finite(step, rows, work))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended = step + 1
        keeps = ended % plan.checkpoint_every == 0 and ended < plan.stop
        if keeps and not torch.isfinite(norm):
            raise TrainingFailed(not_finite(step, rows, work))
        if ended % plan.log_every == 0 or ended == plan.stop:
            metrics = window.read(place, plan.rate(step))
            if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["gradient_norm"]):
                raise TrainingFailed(not_finite(step, rows, work))
            tell("metrics", step=ended, values=metrics)
        tell("progress", done=ended - plan.start, total=plan.stop - plan.start)
        if keeps:
            if checked:
                checked(ended)
            save_progress(model, optimizer, named, ended, plan, place, work)
    place.barrier()
    return read_moments(optimizer, named)


def make_optimizer(named: dict[str, nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of attention and experts.

    Norms have none, nor have embeddings, whose unseen rows it would shrink to zero, nor routers, whose certainty it would
    take away: in a review at a high rate it is what kept them from being sure of the original expert.
    """
    spared = ("embed_tokens", "lm_head", ".router.", ".mlp.gate.weight", "block_sparse_moe.gate.weight")
    decayed = [p for name, p in named.items() if p.ndim >= 2 and not any(part in name for part in spared)]
    rest = [p for name, p in named.items() if not any(p is each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=plan.betas, fused=True)


def wrap(model: nn.Module, place: Place) -> nn.Module:
    """DistributedDataParallel over several processes, the model itself in one."""
    if place.world == 1:
        return model
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def synced(model: nn.Module, last: bool) -> Any:
    """Gradients cross between processes only with the last micro-batch of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else torch.enable_grad()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on CUDA; on CPU plain fp32, which is hundreds of times faster there than bf16 without matrix units."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def micro_batches(rows: np.ndarray, size: int) -> Iterator[tuple[bool, np.ndarray, float]]:
    """(is it the last, its rows, its share of the step) for each micro-batch of a process's rows."""
    for first in range(0, len(rows), size):
        micro = rows[first : first + size]
        yield first + size >= len(rows), micro, len(micro) / len(rows)


def not_finite(step: int, rows: np.ndarray, work: Path) -> str:
    kept = "the last good checkpoint is kept; " if (work / "latest").exists() else ""
    return (
        f"the loss is not finite at training step {step} (instances {rows.tolist()}); {kept}"
        "lower the learning rate or lengthen the warm-up"
    )


class Window:
    """Sums of what is logged, kept on the device until they are read, so that no step waits for the accelerator.

    A number is averaged over the window; a pair [2] is a sum and a count, and is logged as their ratio where there is any count.
    """

    def __init__(self, plan: Plan, length: int) -> None:
        self._tokens_a_step = plan.batch * length
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0.0
        self._since = time.monotonic()
        self.norm = torch.tensor(0.0)

    def add(self, loss: torch.Tensor, extra: dict[str, torch.Tensor], weight: float) -> None:
        for name, value in {"loss": loss, **extra}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * weight
        self._steps += weight

    def read(self, place: Place, rate: float) -> dict[str, float]:
        """Means over the window and all processes, and the rates; starts a new window."""
        pairs = torch.stack([F.pad(total.view(-1), (0, 2 - total.numel())) for total in self._sums.values()])
        means = place.mean(pairs / self._steps).tolist()
        seconds = time.monotonic() - self._since
        values = {}
        for (name, total), (mean, count) in zip(self._sums.items(), means, strict=True):
            if total.ndim == 0 or count > 0:
                values[name] = mean if total.ndim == 0 else mean / count
        values |= {
            "gradient_norm": float(self.norm),
            "learning_rate": rate,
            "tokens_per_second": self._tokens_a_step * self._steps / seconds,
        }
        self._sums, self._steps, self._since = {}, 0.0, time.monotonic()
        return values


def read_moments(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state as a flat dict of tensors: `{parameter}.exp_avg`, `.exp_avg_sq`, `.step`."""
    return {
        f"{name}.{what}": value.detach()
        for name, parameter in named.items()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], moments: dict[str, torch.Tensor]
) -> None:
    """Puts back what `read_moments` gave; parameters without an entry start from zero."""
    for name, parameter in named.items():
        state = {what: moments.get(f"{name}.{what}") for what in ("exp_avg", "exp_avg_sq", "step")}
        if all(value is not None for value in state.values()):
            # Fused AdamW reads its step counter where the parameter is.
            optimizer.state[parameter] = {
                what: value.to(parameter.device if what == "step" else parameter, copy=True)
                for what, value in state.items()
            }


def save_progress(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    step: int,
    plan: Plan,
    place: Place,
    work: Path,
) -> None:
    """Writes a checkpoint to go on from: beside the last one, renamed into its place when whole."""
    if place.leads:
        beside, latest = work / f"step-{step}", work / "latest"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        trained = {name: parameter.detach().contiguous() for name, parameter in named.items()}
        save_file(trained, beside / "trained.safetensors")
        save_file(
            {name: value.contiguous() for name, value in read_moments(optimizer, named).items()},
            beside / "moments.safetensors",
        )
        (beside / "progress.json").write_text(json.dumps({"step": step, "start": plan.start}))
        for path in beside.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        pointer = work / ".latest"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(beside.name)
        os.replace(pointer, latest)
        for old in work.glob("step-*"):
            if old != beside:
                shutil.rmtree(old)
    place.barrier()


def resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], work: Path, plan: Plan
) -> int | None:
    """Loads the last checkpoint under `work`, if there is one, and returns the step to go on with."""
    latest = work / "latest"
    if not latest.exists():
        return None
    state = json.loads((latest / "progress.json").read_text())
    trained = load_file(latest / "trained.safetensors")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(trained[name])
    load_moments(optimizer, named, load_file(latest / "moments.safetensors"))
    return state["step"]
