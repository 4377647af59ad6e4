"""What all training steps share: settings, where training runs, and how it reports progress.

Training runs on the run's Ray Train workers (tasks/training/workers.py) or, with `training_workers = 0`, in this
process. Both call the same function with a `Process`. Unfinished training is kept in the home's `work/` under a hash of
inputs and settings, so that the next run of the same step resumes from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.run import current_run, metric, notify, progress, require_run
from eclectus.tasks.settings import BASIC, SEED, LaterSetting, RuntimeSetting, Settings
from eclectus.tasks.training.precision import LARGE, faster_precision, known_probe, probe
from eclectus.tasks.training.workers import TrainWorkers

if TYPE_CHECKING:
    from eclectus.models.training.loop import Plan
    from eclectus.models.training.process import Process

MOMENTS = ("moments.safetensors", "moments.safetensors.index.json")
WORKERS = "Ray Train workers that share each batch; 0 trains in the calling process, without Ray."


class WorkerSettings(Settings):
    """The workers that train and evaluate: number, resources, placement and restarts."""

    training_workers: int = Field(
        2,
        ge=0,
        description=WORKERS,
        json_schema_extra=BASIC,
    )
    training_workers_min: int = RuntimeSetting(
        0,
        ge=0,
        description="Fewest workers with which the run goes on while nodes are missing: with the largest divisor of "
        "training_workers for which there is room, and with more when there is room again. Batches stay as large: each "
        "worker computes more micro-batches. 0: it waits for all of training_workers.",
    )
    training_gpus: bool = RuntimeSetting(
        False,
        description="Give every training worker a GPU (bf16, NCCL) instead of computing on CPU cores.",
        basic=True,
    )
    training_worker_cpus: float = RuntimeSetting(
        0.0,
        ge=0,
        description="CPU cores that Ray reserves for each training worker, which computes with as many threads; 0: 2 "
        "for a single worker, 1 for each of several.",
    )
    training_placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = RuntimeSetting(
        "PACK",
        description="Training workers on as few Ray nodes as possible (PACK) or on as many (SPREAD); STRICT waits "
        "until that is possible.",
    )
    training_restarts: int = RuntimeSetting(
        3,
        ge=0,
        description="How often the training workers of a run are restarted from their last checkpoint when one dies.",
    )

    @property
    def worker_cpus(self) -> float:
        """CPU cores of each training worker."""
        return self.training_worker_cpus or (2.0 if self.training_workers == 1 else 1.0)

    def check_together(self) -> None:
        super().check_together()
        if self.training_workers_min > self.training_workers:
            raise EclectusError(
                f"training_workers_min {self.training_workers_min} is more than training_workers "
                f"{self.training_workers}; lower it, or choose 0 to wait for all workers"
            )


class DocumentMaskSettings(Settings):
    """Whether documents of a packed instance see each other."""

    pack_document_mask: bool = LaterSetting(
        False,
        description="Let a token of a packed instance or of held-out text attend to its own document only, in training "
        "and evaluation; Lory's segments then begin anew with every document. No token is predicted from another "
        "document. False: documents follow each other as one text, as in the papers.",
    )


class TrainingSettings(DocumentMaskSettings, WorkerSettings):
    """Settings that every training stage of a run shares."""

    training_sharded: bool = Field(
        False,
        description="Shard weights and optimizer state over the training workers (FSDP2) instead of copying them to "
        "each (DDP).",
    )
    training_shard_keep: bool = RuntimeSetting(
        False,
        description="Sharded: keep the gathered weights of a layer from the forward to the backward pass: one gather "
        "less, memory for the whole model (FSDP2's reshard_after_forward).",
    )
    training_shard_ahead: int = RuntimeSetting(
        0,
        ge=0,
        description="Sharded: gather the weights of so many layers before they compute, each of which takes memory; 0 "
        "leaves it to FSDP2, which on GPUs gathers the next layer.",
    )
    training_shard_reduce: Literal["micro_batch", "step"] = RuntimeSetting(
        "micro_batch",
        description="Sharded: share out gradients after every micro-batch, so that no worker holds more than its part, "
        "or once a step, for which every worker holds the whole gradient.",
    )
    training_shard_replicas: int = RuntimeSetting(
        1,
        ge=1,
        description="Sharded: groups of neighbouring workers that each hold the model between them (HSDP), such as one "
        "per node: weights are gathered within a group, gradients cross groups once a step; memory as of a group's "
        "workers alone. 1: all workers share one model.",
    )
    training_recompute: bool = RuntimeSetting(
        False,
        description="Recompute activations in the backward pass instead of keeping them (gradient checkpointing): less "
        "memory, about a third more time, same results.",
    )
    training_recompute_every: int = RuntimeSetting(
        1, ge=1, description="With training_recompute: of every n-th layer alone; more keep more and repeat less."
    )
    training_compiled: bool = Field(
        False,
        description="Compile the layers with torch.compile: takes minutes at the start, same results; for long "
        "trainings on GPUs.",
    )
    training_attention: Literal["auto", "sdpa", "eager", "flex", "flash"] = RuntimeSetting(
        "auto",
        description="Implementation of attention: auto (on CPUs causal attention in blocks, else sdpa), sdpa (torch's "
        "own), eager (as the formula), flex (GPUs; masks in blocks) or flash (GPUs; FlashAttention 2 if it is "
        "installed, without pack_document_mask). Same results but for rounding.",
    )
    # Undecided it is float32 on every CPU, as it always was.
    training_precision: Literal["auto", "float32", "bfloat16"] = LaterSetting(
        "auto",
        description="Matrix products of training in float32 or in bfloat16 (weights that train, their moments, routers "
        "and losses stay float32; frozen weights are held in bfloat16 and written as they were). auto: bfloat16 on "
        "GPUs; on CPUs float32 for models below 30M parameters, above what a measurement of a second says is faster.",
    )
    training_fixed_sums: bool = LaterSetting(
        False,
        description="Add up gradients and metrics in an order that does not depend on the number of workers: 1, 2, 4, "
        "... workers end with the same bits on CPUs of one kind, also when the number changes. Needs powers of two, "
        "and a micro-batch for each worker. Not with training_sharded; takes more memory and time than DDP.",
    )
    micro_batch: int = Field(4, ge=1, description="Instances that a worker computes at once; more need more memory.")
    weight_decay: float = Field(
        0.1, ge=0, description="AdamW's weight decay, on matrices only (not embeddings, not norms)."
    )
    gradient_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient; larger ones are scaled down.")
    learning_rate_floor: float = Field(
        0.1, ge=0, le=1, description="Final learning rate as a fraction of the peak learning rate."
    )
    training_forecast: Literal["auto", "always", "never"] = RuntimeSetting(
        "auto",
        description="Forecast of seconds and memory before the first training step, from a probe of some seconds; a "
        "training that does not fit in memory then ends at once. auto: not for trainings of less than about a minute.",
    )
    checkpoint_every: int = RuntimeSetting(
        100, ge=1, description="Training steps between checkpoints for resuming after a crash."
    )
    log_every: int = RuntimeSetting(10, ge=1, description="Training steps between logged metrics.")
    seed: int = SEED

    def key_values(self) -> dict[str, Any]:
        """With sums in a fixed order, without the number of workers, which does not change a bit then."""
        values = super().key_values()
        if self.training_fixed_sums and self.training_workers:
            values.pop("training_workers")
        return values

    def check_together(self) -> None:
        super().check_together()
        replicas, workers = self.training_shard_replicas, self.training_workers
        if replicas > 1 and (not self.training_sharded or workers % replicas or workers <= replicas):
            raise EclectusError(
                f"training_shard_replicas {replicas} needs training_sharded, and training_workers that are a multiple "
                f"of it and more, not {workers}"
            )
        if self.training_workers_min and replicas > 1:
            raise EclectusError(
                "training_workers_min changes the number of workers, which training_shard_replicas divides; choose one"
            )
        if self.training_fixed_sums and self.training_sharded:
            raise EclectusError(
                "training_fixed_sums adds up whole gradients, of which training_sharded has parts; choose one"
            )
        if self.training_attention == "flash" and self.pack_document_mask:
            raise EclectusError(
                "training_attention flash takes no mask, which pack_document_mask needs; choose flex or sdpa"
            )
        if self.training_attention in ("flex", "flash") and self.training_workers and not self.training_gpus:
            raise EclectusError(
                f"training_attention {self.training_attention} computes on GPUs only; set training_gpus, or choose sdpa"
            )

    def decided(self, inputs: Mapping[str, Any]) -> Self:
        """With the precision that suits the model and, for a large one on CPUs, this machine."""
        if self.training_precision != "auto" or self.training_gpus:
            return self
        if self.parameters_of_model(inputs) < LARGE:
            return self
        found = probe()
        if found.cuda and self.training_workers == 0:
            # It trains in this process, on the GPU.
            return self
        return self.model_copy(update={"training_precision": faster_precision(found)})

    def parameters_of_model(self, inputs: Mapping[str, Any]) -> int:
        """Parameters of the dense model that is trained or extended; 0 if they are not known yet."""
        return 0

    def note_precision(self) -> None:
        """Reports the precision of this step where a measurement of the machine decided it."""
        if (found := known_probe()) and self.training_precision != "auto" and not self.training_gpus:
            metric("bfloat16_gain", found.gain)
            notify("precision", f"training in {self.training_precision}: {found.words}")

    def check_batch(self, name: str) -> None:
        """Raises EclectusError if the workers cannot share a stage's batches. name: of the setting of its batch."""
        batch, workers, each = getattr(self, name), self.training_workers, self.micro_batch
        if workers and batch % workers:
            raise EclectusError(f"{name} {batch} cannot be shared by training_workers {workers}; make it a multiple")
        if not self.training_fixed_sums:
            return
        if workers & (workers - 1):
            raise EclectusError(
                f"training_fixed_sums needs training_workers 1, 2, 4, 8, ..., not {workers}; choose one of them"
            )
        if batch % each or (batch // each) % max(1, workers):
            raise EclectusError(
                f"training_fixed_sums needs equal micro-batches, as many for each of training_workers {workers}, which "
                f"{name} {batch} and micro_batch {each} do not give; choose another micro_batch"
            )

    def topology(self, process: Process) -> Process:
        """The process in its group of training_shard_replicas."""
        return replace(process, replicas=self.training_shard_replicas)

    def plan(self, **stage: Any) -> Plan:
        """The plan of one stage. stage: its own fields (start, stop, total, batch, learning_rate, warmup)."""
        from eclectus.models.training.loop import Plan

        return Plan(
            micro_batch=self.micro_batch,
            sharded=self.training_sharded,
            kept=self.training_shard_keep,
            ahead=self.training_shard_ahead,
            reduced_once=self.training_shard_reduce == "step",
            recomputed=self.training_recompute_every if self.training_recompute else 0,
            compiled=self.training_compiled,
            attention=self.training_attention,
            precision=self.training_precision,
            document_mask=self.pack_document_mask,
            fixed_sums=self.training_fixed_sums,
            weight_decay=self.weight_decay,
            clip=self.gradient_clip,
            floor=self.learning_rate_floor,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            seed=self.seed,
            **stage,
        )


def run_training(settings: WorkerSettings, call: Callable[..., Any], arguments: dict[str, Any], what: str) -> Any:
    """Calls f(process, report, **arguments) on every worker and returns what rank 0 returned.

    call: a function at the top level of a module. what: label of the progress display.
    Raises EclectusError when training fails, and outside a run unless training_workers is 0.
    """
    report_progress, workers = None, settings.training_workers

    def on_report(kind: str, values: dict[str, Any]) -> None:
        nonlocal report_progress, workers
        if kind == "metrics":
            for name, value in values["values"].items():
                measure, tags = tagged(name)
                metric(measure, value, values["step"], **tags)
        elif kind == "progress":
            report_progress = report_progress or progress(values["total"], what, "steps")
            report_progress(values["done"])
        elif kind == "damaged":
            metric("damaged_checkpoints", 1, values["step"])
            notify("warning", values["text"])
        elif kind == "warning":
            notify("warning", values["text"])
        elif kind == "workers" and values["workers"] != workers:
            workers = values["workers"]
            notify("workers", f"{what} goes on with {workers} of {settings.training_workers} workers")
        elif kind == "stopped":
            notify("stopped", f"{values['text']}; the same command goes on from there")
        elif kind in ("forecast", "came_true"):
            note_forecast(kind, values)

    if settings.training_workers == 0:
        from eclectus.models.elastic.stop import TrainingStopped
        from eclectus.models.training.loop import TrainingFailed
        from eclectus.models.training.process import Process

        try:
            return call(Process.current(), lambda kind, **values: on_report(kind, values), **arguments)
        except (TrainingFailed, TrainingStopped) as error:
            raise EclectusError(str(error)) from error
    return _workers(settings).do(call, arguments, on_report)


def tagged(name: str) -> tuple[str, dict[str, str]]:
    """Name and tags of a training's metric, from `loss/DOMAIN` or `expert_load@LAYER`."""
    measure, _, domain = name.partition("/")
    measure, _, layer = measure.partition("@")
    found = {"domain": domain, "layer": layer}
    return measure, {tag: value for tag, value in found.items() if value}


def note_forecast(kind: str, values: dict[str, Any]) -> None:
    """Journals the forecast of the running step, or what came true of it."""
    if words := values.pop("words", None):
        notify("forecast", f"the training will take about {words}")
    run = current_run()
    if run is not None and run.step is not None:
        run.journal.event(kind, step=run.step, label=run.label, forecast=values.get("values", values))


def _workers(settings: WorkerSettings) -> TrainWorkers:
    """The run's group of workers, started by its first training step and closed with the run."""
    chosen = WorkerSettings.of(settings)
    run = require_run(
        f"training on {chosen.training_workers} workers", ", or training_workers 0, which trains in this process"
    )
    return run.keep(
        f"train workers {chosen.model_dump_json()}",
        lambda: TrainWorkers(
            chosen.training_workers,
            chosen.training_gpus,
            run.home.work / "ray",
            restarts=chosen.training_restarts,
            cpus=chosen.worker_cpus,
            placement=chosen.training_placement,
            least=chosen.training_workers_min,
        ),
    )


@contextmanager
def resume_directory(*parts: Any) -> Iterator[Path]:
    """A directory for unfinished work, keyed by a hash of inputs and settings; removed when the block succeeds.

    Outside a run: a temporary directory.
    """
    run = current_run()
    if run is None:
        with tempfile.TemporaryDirectory(prefix="training-") as folder:
            yield Path(folder)
        return
    content = [part.digest if isinstance(part, Artifact) else part for part in parts]
    name = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = run.home.work / name
    path.mkdir(parents=True, exist_ok=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def check_tokens(data: Any, model: Any, checkpoint: str) -> None:
    """Raises EclectusError for instances with token ids beyond the model's embeddings."""
    known = model.config.vocab_size
    # A vocabulary may hold tokens that no text yields, such as a [PAD] that was added without an embedding.
    if data.vocabulary > known and (largest := data.largest_token()) >= known:
        raise EclectusError(
            f"the instances hold token ids up to {largest}, but the model in {checkpoint} has {known} tokens: pack "
            "them with the model's own tokenizer"
        )


def initial_moments(start: Artifact | None) -> str | None:
    """The folder of a checkpoint that kept its AdamW moments, in one file or several."""
    if start is None or not any(start.file(name).is_file() for name in MOMENTS):
        return None
    return str(start.path)
