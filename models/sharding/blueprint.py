"""Models without weights, and what each weight will hold: every process fills its own share, and no more.

    with Blueprint(model on the meta device, {parameter name: Slices}) as blueprint:
        model = blueprint.make(process, sharded=True)

`make` shards the model while it holds nothing (FSDP2), takes memory for this process's shares, and reads into each its
block of the tensor, one parameter after the other. In one process, or unsharded, the share is the whole: the same code,
the same bits. Cost: the shares, and what one block is made from.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from eclectus.models.checkpoints.config_file import CheckpointError
from eclectus.models.checkpoints.door import check_checkpoint, open_model, read_transformers_config
from eclectus.models.checkpoints.families import Family, moe_family_of
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.sharding.slices import InMemory, Joined, Slices, Stacked, Stored, Zeros
from eclectus.models.sharding.training_form import hold_nothing, values_in_form
from eclectus.models.training.parallel import local, local_bounds, shard
from eclectus.models.training.process import Process, give_freed_memory_back


class Blueprint:
    """A model on the meta device, in the form in which it trains, and the values of its parameters by name.

    files: what holds the checkpoint's files open until `close`.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Slices], files: ExitStack) -> None:
        self.model: Any = model
        self.values, self._files = values, files

    @classmethod
    def of(cls, model: nn.Module) -> Blueprint:
        """The blueprint of a model in memory, whose weights it holds."""
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        values = {name: InMemory(parameter.detach()) for name, parameter in model.named_parameters()}
        return cls(copy.deepcopy(model, memo), values, ExitStack())

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> Blueprint:
        """The blueprint of a model of this configuration, all of whose weights are zero: it stands for its shape."""
        model = model_on_meta(config)
        values = {name: Zeros(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
        return cls(model, values, ExitStack())

    def make(
        self,
        process: Process | None = None,
        sharded: bool = False,
        prepare: Callable[[nn.Module], None] | None = None,
        half: bool = False,
    ) -> Any:
        """The model with its weights, on the CPU or, sharded, on the process's device. All processes must call it.

        prepare: called with the model while it is on the meta device; it may change dtypes of parameters. half: of a
        sharded model, as in `shard`; it then computes under autocast to bfloat16 only. Raises CheckpointError, on every
        process, if one of them cannot read its part.
        """
        process = process or Process()
        model = copy.deepcopy(self.model)
        if prepare is not None:
            prepare(model)
        if sharded:
            give_freed_memory_back()
            shard(model, process, half)
        device = process.device if sharded and process.world > 1 else torch.device("cpu")
        _fill(model, self.values, device, process)
        return model

    def formed(self, model: nn.Module) -> Blueprint:
        """The blueprint of `model`, the form for training of this one's model, whose files it takes over."""
        self.values = values_in_form(model, self.values)
        hold_nothing(model)
        self.model = model
        return self

    def close(self) -> None:
        """Closes the checkpoint's files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Slices], device: torch.device, process: Process) -> None:
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            owners[id(parameter)].append((module, leaf))
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    fault: str | None = None
    for name, parameter in list(model.named_parameters()):
        filled = torch.empty_like(parameter, device=device)
        if fault is None:
            try:
                local(filled).copy_(values[name].read(local_bounds(parameter)))
            except (CheckpointError, OSError) as error:
                fault = str(error)
        trained = nn.Parameter(filled, requires_grad=parameter.requires_grad)
        for module, leaf in owners[id(parameter)]:
            module._parameters[leaf] = trained
    if faults := [each for each in process.gather(fault) if each]:
        raise CheckpointError(faults[0])
    for module in model.modules():
        if hasattr(module, "share_storage"):
            cast(Any, module).share_storage()


def stock_blueprint(directory: str | Path) -> Blueprint:
    """The blueprint of a checkpoint's model as transformers builds it, in fp32, in eval mode.

    It is checked as `open_model` checks it, which says what is raised, but for values that are not finite: those are
    found where they are read. A model of a kind that is not made here is read as a whole.
    """
    import eclectus.models  # noqa: F401  (registers our classes with transformers)

    checked = check_checkpoint(Path(directory))
    if checked.kind == "other" or checked.path.is_file():
        return Blueprint.of(open_model(directory))
    config = read_transformers_config(checked.path)
    model = model_on_meta(config)
    model.name_or_path = model.config._name_or_path = str(directory)
    # As open_model, which says why.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    family = moe_family_of(checked.config, checked.path) if checked.kind == "mixture" else None
    files = ExitStack()
    reader = files.enter_context(CheckpointReader(checked.path))
    return Blueprint(model.eval(), stored_values(model, reader, family), files)


def model_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a config in fp32, on the meta device, with what is computed in place."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Rotary frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def stored_values(model: nn.Module, reader: CheckpointReader, family: Family | None) -> dict[str, Slices]:
    """The values of a stock model's parameters in checkpoint files. family: of a mixture."""
    values: dict[str, Slices] = {}
    for name, parameter in model.named_parameters():
        stacked = family.stacked_names(name, parameter.shape[0]) if family else None
        if stacked is None:
            values[name] = Stored(reader, name if name in reader.specs or not family else family.stored_name(name))
        else:
            values[name] = Stacked([Joined([Stored(reader, each) for each in names]) for names in stacked])
    return values
