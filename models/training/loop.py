"""The training loop: one page, the same in a plain process, under torchrun and under Ray Train.

    for step in range(start, stop):
        rows = a pure function of (step, seed)             every process takes its share of them
        the number of items of each loss                   over all micro-batches and processes
        its part of the objective, backward                for each micro-batch; gradients are averaged over processes
        clip, AdamW, schedule
        at intervals: metrics; a checkpoint of weights, AdamW moments and step, also when it is asked to stop

The data order is a function of the step and there is no other randomness, so a run that was killed and resumes from its
last checkpoint ends with bit-identical weights on CPU, and another number of processes reads the same instances in the
same steps; with `fixed_sums` it ends with the same bits, too. The plan's precision decides between fp32 and bf16
autocast (models/training/precision.py). Several processes each hold the model (DDP) or share it (FSDP2). Cost: forward
and backward, and 8 bytes per trained parameter for AdamW; parameters without gradients cost nothing here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from eclectus.models.attention.choice import choose_attention
from eclectus.models.elastic.fixed_sums import FixedGradients
from eclectus.models.elastic.stop import TrainingStopped, sigterm_stops, stop_asked
from eclectus.models.losses.step import Objective, Step
from eclectus.models.sharding.slices import Slices
from eclectus.models.training.first_losses import FirstLosses
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.metrics import FixedSum, RunningSum, Window
from eclectus.models.training.optimizer import load_moments, make_optimizer, read_moments, set_rate
from eclectus.models.training.parallel import (
    arrange_gathering,
    compile_blocks,
    copy_shared_experts,
    recompute_blocks,
    replicate,
    shard,
    synced,
    whole,
)
from eclectus.models.training.plan import Plan
from eclectus.models.training.precision import autocast, is_half, keep_routers_fp32
from eclectus.models.training.process import Process
from eclectus.models.training.repeatable import switch_off_randomness
from eclectus.models.training.resume import TrainingFailed, resume, save_progress

Report = Callable[..., None]


@sigterm_stops()
def train(
    model: nn.Module,
    instances: Instances,
    objective: Objective,
    plan: Plan,
    process: Process,
    work: Path,
    report: Report,
    moments: Mapping[str, torch.Tensor | Slices] | None = None,
    check: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Trains `model` in place from plan.start (or its last checkpoint under `work`) to plan.stop; returns AdamW's
    state.

    A sharded plan leaves model and state sharded. Dropout and other randomness of the model's configuration is switched
    off, with a warning.
    moments: AdamW's state to start from, as this function returns it ({parameter name}.exp_avg and so on), or to be
    read in blocks; None for zeros. report: called as report("metrics", ...), report("progress", ...),
    report("damaged", ...) and report("warning", ...).
    check: called with the step before every checkpoint is written; an exception from it ends the training.
    Raises TrainingStopped, with a checkpoint written, when it is asked to stop (models/elastic/stop.py), TrainingFailed
    if the loss or a gradient is not finite, ValueError if the batch cannot be divided evenly or the checkpoint under
    `work` is of another training.
    """
    plan.check_sharing(process.world)
    in_step = -(-plan.batch // plan.micro_batch)
    make_repeatable(model, process, report)
    model.train()
    tokens, metrics = plan.batch * instances.length, FixedSum(in_step) if plan.fixed_sums else RunningSum()
    window = Window(model, objective.weights(model), tokens, instances.length, process, metrics)
    prepare(model, plan, process)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(named, plan)
    load_moments(optimizer, named, moments or {})
    begin = resume(optimizer, named, plan.start, process, work, report) or plan.start
    wrapped, guard = replicate(model, process, plan.fixed_sums), GradientGuard(instances, plan, process, work)
    fixed = FixedGradients(named.values(), in_step, process) if plan.fixed_sums else None
    objective = replace(objective, document_mask=plan.document_mask)
    firsts = FirstLosses(instances, plan, process, work)
    for step in range(begin, plan.stop):
        set_rate(optimizer, plan.rate(step))
        batches = micro_batches(instances, step, plan, process)
        parts = Step(objective, batches, process, averaged=fixed is None, stopping=stop_asked())
        with autocast(process.device, plan.precision):
            parts.survey(wrapped)
        for number in range(len(batches)):
            last = number + 1 == len(batches)
            with synced(wrapped, last, plan.reduced_once), autocast(process.device, plan.precision):
                loss, terms = parts.measure(wrapped, number)
            loss.backward()
            window.add(terms)
            firsts.note(step, number, parts.latest)
            if fixed:
                fixed.add()
        if fixed:
            fixed.finish()
        norm = whole(nn.utils.clip_grad_norm_(named.values(), plan.clip))
        window.end_step(norm)
        guard.check(step, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended = step + 1
        keeps, stops = ended % plan.checkpoint_every == 0 and ended < plan.stop, False
        if ended % plan.log_every == 0 or ended == plan.stop or keeps or process.device.type == "cpu":
            # Both wait for a GPU.
            guard.stop_if_bad()
            stops = parts.asks_to_stop()
        if ended % plan.log_every == 0 or ended == plan.stop:
            report("metrics", step=ended, values=window.read(process, plan.rate(step)))
            firsts.write()
        report("progress", done=ended - plan.start, total=plan.stop - plan.start)
        if ended == plan.stop and not stops:
            # A signal may have come since the step began, and what follows is not the training's.
            stops = process.any(stop_asked())
        if keeps or stops:
            if check:
                check(ended)
            firsts.write(sync=True)
            save_progress(optimizer, named, ended, plan.start, process, work)
        if stops:
            raise TrainingStopped(f"stopped at training step {ended}, whose checkpoint is in {work}")
    process.barrier()
    return read_moments(optimizer, named)


def prepare(model: nn.Module, plan: Plan, process: Process) -> None:
    """The model as the plan trains it, in place: attention, layers, shards, device."""
    choose_attention(model, plan.attention, process.device)
    if plan.recomputed:
        recompute_blocks(model, plan.recomputed)
    if plan.compiled:
        compile_blocks(model)
    if plan.sharded:
        # Moves and shards layer by layer: no device ever holds the whole model.
        shard(model, process, half=is_half(plan.precision, process.device))
        arrange_gathering(model, plan.kept, plan.ahead)
    model.to(process.device)
    copy_shared_experts(model)
    keep_routers_fp32(model)


def make_repeatable(model: nn.Module, process: Process, report: Report) -> None:
    """Switches off what would make training random, and warns of it."""
    if (found := switch_off_randomness(model)) and process.is_main:
        fields = ", ".join(f"{name} {value}" for name, value in found.items())
        text = (
            f"the model's configuration has {fields}: trained with 0 instead, so that training can be repeated and "
            "resumed to the bit; its checkpoint says 0"
        )
        logging.getLogger("eclectus").warning(text)
        report("warning", text=text)


def micro_batches(instances: Instances, step: int, plan: Plan, process: Process) -> list[Batch]:
    """The micro-batches of this process's share of a step, on the CPU; every process has the same number of them."""
    share = plan.batch // process.world
    rows = instances.rows_of_step(step, plan.batch, plan.seed)[process.rank * share : (process.rank + 1) * share]
    batches = [instances.batch(rows[first : first + plan.micro_batch]) for first in range(0, share, plan.micro_batch)]
    return [batch.without_borders() for batch in batches] if plan.document_mask else batches


class GradientGuard:
    """Stops training at a gradient that is not finite, without waiting for the device at every step.

    On CPU it stops before the weights change; on CUDA at the next row of metrics or checkpoint, whichever comes first,
    so that no bad weight is stored. The gradient is that of all processes, so all of them stop.
    """

    def __init__(self, instances: Instances, plan: Plan, process: Process, work: Path) -> None:
        self._instances, self._plan, self._process, self._work = instances, plan, process, work
        self._first_bad = torch.full((), -1, device=process.device)

    def check(self, step: int, norm: torch.Tensor) -> None:
        """norm: that of this step's gradient."""
        bad = ~torch.isfinite(norm.detach()) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, step, self._first_bad)
        if self._process.device.type == "cpu":
            self.stop_if_bad()

    def stop_if_bad(self) -> None:
        """Raises TrainingFailed, naming step and instances, if the gradient of any step so far was not finite."""
        step = int(self._first_bad)
        if step < 0:
            return
        rows = self._instances.rows_of_step(step, self._plan.batch, self._plan.seed).tolist()
        latest = self._work / "latest"
        kept = f"the last good checkpoint is kept in {latest}; " if latest.exists() else ""
        raise TrainingFailed(
            f"the loss or its gradient is not finite at training step {step} (instances {rows}); {kept}"
            "lower the learning rate or lengthen the warm-up"
        )
