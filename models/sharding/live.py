"""The tensors of a live model by their names in checkpoint files, in whatever form it was trained.

    split rows, experts of Lory     the parts, one behind the other
    LoRA                            W + (B A) scale, as peft merges
    stacks of experts               one tensor for each expert and matrix, as transformers writes them
    sharded                         gathered when it is read, one tensor at a time: all processes must read the same

Cost: memory for one tensor beside the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from eclectus.models.checkpoints.tensor_files import TensorSource, TensorSpec
from eclectus.models.extension.split_vocabulary import stored_parameters
from eclectus.models.training.parallel import plain_class, reshard, whole

# What peft adds to names.
ADAPTED, WRAPPED = "base_model.model.", ".base_layer"


class LiveTensors:
    """The tensors of a model (a TensorSource), of LoRA's with the adapters merged; tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self._parts: dict[str, tuple[Tensor, ...]] = {}
        self._adapters: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        reshard(model)
        modules = dict(model.named_modules())
        for name, parts in stored_parameters(model):
            owner, _, leaf = name.rpartition(".")
            if ".lora_" in name or (isinstance(modules.get(owner), ParametrizationList) and leaf != "original0"):
                continue
            plain = f"{owner.removeprefix(ADAPTED).removesuffix(WRAPPED)}.{leaf}"
            module = modules.get(owner)
            if isinstance(module, ParametrizationList):
                plain, parts = owner.replace(".parametrizations", ""), tuple(module.parameters())
            if owner.endswith(WRAPPED) and leaf == "weight":
                self._adapters[plain] = modules[owner.removesuffix(WRAPPED)]
            self._add(plain, parts)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, value in model.state_dict().items():
            if name not in parameters:
                self._add(name.removeprefix(ADAPTED), (value,))

    def _add(self, name: str, parts: tuple[Tensor, ...]) -> None:
        rows = [sum(len(part) for part in parts)] if parts[0].dim() else []
        self._parts[name] = parts
        self.specs[name] = TensorSpec(name, parts[0].dtype, (*rows, *parts[0].shape[1:]))

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU."""
        first, *others = (whole(part.detach()).cpu() for part in self._parts[name])
        value = torch.cat([first, *(part.to(first.dtype) for part in others)]) if others else first
        if name not in self._adapters:
            return value
        layer = self._adapters[name]
        for adapter, scale in layer.scaling.items():
            up, down = (whole(side[adapter].weight.detach()).cpu() for side in (layer.lora_B, layer.lora_A))
            value = value + (up @ down) * scale
        return value


def as_transformers_writes(model: PreTrainedModel, live: LiveTensors) -> TensorSource:
    """The same tensors under the names, and cut into the pieces, of transformers' files. model: its stock class."""
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in live.specs.items()}
    if revert_weight_conversion(model, dict(empty)).keys() == empty.keys():
        return live
    return _Reverted(model, live, empty)


class _Reverted:
    def __init__(self, model: PreTrainedModel, live: LiveTensors, empty: dict[str, Tensor]) -> None:
        self._model, self._live = model, live
        self._made_of: dict[str, str] = {}
        self._last: tuple[str, dict[str, Tensor]] = "", {}
        self.specs: dict[str, TensorSpec] = {}
        for name, value in empty.items():
            for stored, piece in revert_weight_conversion(model, {name: value}).items():
                self._made_of[stored] = name
                self.specs[stored] = TensorSpec(stored, piece.dtype, tuple(piece.shape))

    def tensor(self, name: str) -> Tensor:
        source = self._made_of[name]
        if self._last[0] != source:
            self._last = "", {}
            self._last = source, revert_weight_conversion(self._model, {source: self._live.tensor(source)})
        return self._last[1][name]


def stock_shell(model: nn.Module) -> PreTrainedModel:
    """A model of the plain class and config of a live one, on the meta device: what it is, without what it holds."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    with torch.device("meta"):
        shell: PreTrainedModel = plain_class(inner)(inner.config)
    shell.generation_config = inner.generation_config
    return shell
