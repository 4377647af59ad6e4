"""The configuration that each planned checkpoint will have, and the job of each training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.forecast.trainings import Call, Calls
from eclectus.tasks.training.extend_settings import ExtendStageSettings, recipe_of
from eclectus.tasks.training.precision import LARGE, dense_parameters, faster_precision, probe
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings

if TYPE_CHECKING:
    from eclectus.models.forecast.job import Job
    from eclectus.models.sharding.blueprint import Blueprint

DOMAINS = 4


@dataclass(frozen=True)
class Shape:
    """config: of transformers. frozen: leading experts of a mixture that stay frozen; one number, or one per layer."""

    config: Any
    frozen: int | list[int] = 1


class Shapes:
    """The jobs of a flow's trainings. vocabulary: of a tokenizer that is trained. length: tokens of an instance.

    gpu: whether they will train on GPUs.
    """

    def __init__(self, calls: Calls, languages: Sequence[str], vocabulary: int, added: int, length: int) -> None:
        """added: tokens by which the vocabulary is extended."""
        self._calls, self._languages, self._vocabulary = calls, list(languages), vocabulary
        self._added, self._length = added, length
        self._known: dict[str, Shape] = {}

    def jobs(self, gpus: bool) -> list[tuple[str, Job]]:
        """(label, job) of each training, in order."""
        return [
            (call.label, self._pretrain(call, gpus) if call.step == "pretrain" else self._extend(call, gpus))
            for call in self._calls.calls
            if call.step in ("pretrain", "extend")
        ]

    def shape(self, artifact: Artifact) -> Shape:
        """That of a planned checkpoint."""
        if artifact.digest not in self._known:
            self._known[artifact.digest] = self._shape(self._calls.made_by(artifact))
        return self._known[artifact.digest]

    def _shape(self, call: Call) -> Shape:
        given, settings = call.arguments, call.arguments["settings"]
        if call.step == "fetch":
            return Shape(_config_of(settings.base_model))
        if call.step == "pretrain":
            stage = self._stage(call)
            model, stage.blueprint.values = stage.blueprint.model, {}
            return Shape(model.config)
        start = self.shape(given["checkpoint"])
        if call.step == "upcycle":
            return _upcycled(start, settings, self._expert_budget(call))
        if call.step == "extend_vocabulary":
            from eclectus.models.extension.split_vocabulary import BEFORE

            before = start.config.vocab_size
            return Shape(_changed(start.config, vocab_size=before + self._added, **{BEFORE: [before]}), start.frozen)
        if call.step == "add_experts":
            return _with_more_experts(start, settings.extension_experts - 1)
        return start

    def _expert_budget(self, call: Call) -> int:
        similarity = call.arguments.get("similarity")
        if similarity is None:
            return 0
        return int(self._calls.made_by(similarity).arguments["settings"].extension_expert_budget)

    def _dense(self, call: Call) -> Blueprint:
        from eclectus.models.sharding.blueprint import Blueprint
        from eclectus.tasks.training.pretrain import dense_config

        settings, start = call.arguments["settings"], call.arguments.get("start")
        config = self.shape(start).config if start else dense_config(settings, self._vocabulary, self._length)
        return Blueprint.of_config(config)

    def _stage(self, call: Call) -> Any:
        from eclectus.models.losses import objectives
        from eclectus.models.pretraining import stages
        from eclectus.models.sharding.blueprint import Blueprint
        from eclectus.tasks.training.pretrain import stage_of

        settings, dense = call.arguments["settings"], self._dense(call)
        data = SimpleNamespace(domains=[f"domain {n}" for n in range(DOMAINS)], length=self._length)
        if settings.pretrain_stage == "dense_equal_flops":
            routing = dict(segment_length=settings.lory_segment, routing=settings.lory_routing)
            config = stages.equal_flops_config(dense.model.config, settings.lory_experts, self._length, **routing)
            return stages.Stage(Blueprint.of_config(config), {}, objectives.next_token(data.domains))
        return stage_of(settings, dense, {}, data)

    def _pretrain(self, call: Call, gpus: bool) -> Job:
        from eclectus.tasks.training.pretrain import plan_of

        made = self._stage(call)
        settings = _decided(call.arguments["settings"], made.blueprint.model.config, gpus)
        warmup = settings.pretrain_stage == "warmup"
        return self._job(made.blueprint.model, made.objective, plan_of(settings), settings, gpus, keeps_moments=warmup)

    def _extend(self, call: Call, gpus: bool) -> Job:
        from eclectus.models.checkpoints.writing import plain_config
        from eclectus.models.sharding.blueprint import Blueprint
        from eclectus.tasks.training.extend_stage import blueprint_of, mixed_steps, objective_of, plan_of

        start = self.shape(call.arguments["checkpoint"])
        settings: ExtendStageSettings = _decided(call.arguments["settings"], start.config, gpus)
        blueprint = blueprint_of(settings, Blueprint.of_config(start.config), start.frozen)
        objective = objective_of(settings, self._languages, plain_config(start.config), start.frozen)
        mixed = recipe_of(settings.extension_method).mixed
        plan = plan_of(settings, mixed_steps(settings) if mixed else settings.budget.steps)
        return self._job(blueprint.model, objective, plan, settings, gpus, holds_frozen=True, checks_frozen=True)

    def _job(self, model: Any, objective: Any, plan: Any, settings: Any, gpus: bool, **options: bool) -> Job:
        import torch

        from eclectus.models.forecast.job import Job

        device = torch.device("cuda" if gpus else "cpu")
        world, counts = max(1, settings.training_workers), (len(self._languages), DOMAINS)
        return Job(model, objective, plan, world, self._length, *counts, device=device, **options)


def _decided(settings: Any, config: Any, gpus: bool) -> Any:
    """With the precision that the step will choose: its own look at the checkpoint finds a placeholder."""
    from eclectus.models.checkpoints.writing import plain_config

    if settings.training_precision != "auto" or gpus or isinstance(settings, PretrainStageSettings):
        return settings
    if dense_parameters(plain_config(config)) < LARGE:
        return settings
    return settings.model_copy(update={"training_precision": faster_precision(probe())})


def _config_of(name: str) -> Any:
    """The configuration of a base: of a folder, a .gguf file, or a name on the hub, of which only that is read."""
    from transformers import AutoConfig

    from eclectus.models.checkpoints.door import check_checkpoint, read_transformers_config

    path = Path(name)
    try:
        if not path.exists():
            return AutoConfig.from_pretrained(name)
        checked = check_checkpoint(path)
        if checked.path.is_file():
            return AutoConfig.for_model(**checked.config)
        return read_transformers_config(checked.path)
    except (ValueError, OSError) as error:
        raise EclectusError(f"base model {name}: {str(error).strip().splitlines()[0]}") from error


def _changed(config: Any, **fields: Any) -> Any:
    from transformers import AutoConfig

    from eclectus.models.checkpoints.writing import plain_config, with_both_generations

    return AutoConfig.for_model(**with_both_generations({**plain_config(config), **fields}))


def _upcycled(start: Shape, settings: Any, budget: int) -> Shape:
    from transformers import AutoConfig

    from eclectus.models.checkpoints.families import family_of, moe_config
    from eclectus.models.checkpoints.writing import plain_config
    from eclectus.models.mixture.upcycle import expert_counts

    base = plain_config(start.config)
    layers = start.config.num_hidden_layers
    experts: Any = settings.extension_experts_per_layer or settings.extension_experts
    if budget:
        experts = [1 + budget // layers + (layer < budget % layers) for layer in range(layers)]
    try:
        family, counts = family_of(base, "the base"), expert_counts(experts, settings.extension_top_k, layers)
    except ValueError as error:
        raise EclectusError(str(error)) from error
    if len(set(counts)) > 1:
        family = family.layered()
    return Shape(AutoConfig.for_model(**moe_config(base, family, counts, settings.extension_top_k)))


def _with_more_experts(start: Shape, more: int) -> Shape:
    """As the step `add_experts`."""
    config = start.config
    if config.model_type == "lory":
        return Shape(_changed(config, num_experts=2 * config.num_experts, original_experts=config.num_experts))
    layered = getattr(config, "experts_per_layer", None)
    before = cast(list[int], layered or [config.num_local_experts] * config.num_hidden_layers)
    fields: dict[str, Any] = {"num_local_experts": max(before) + more}
    if layered:
        fields["experts_per_layer"] = [count + more for count in before]
    return Shape(_changed(config, **fields), list(before))
