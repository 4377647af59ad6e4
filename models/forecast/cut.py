"""A model with fewer layers, by which the seconds of the whole are found: layers of one kind take equal time.

Two layers are of one kind if their parameters have the same shapes and the same of them train, and if the gradient
passes through both or through neither. So the layers of most models are of one kind, of LLaMA-Pro's of four.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eclectus.models.checkpoints.tensor_files import Bounds
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.training.parallel import blocks

SPREAD = 0.02
# Fields of configurations that have an entry for each layer.
BY_LAYER = ("layer_types", "experts_per_layer")


@dataclass(frozen=True)
class Drawn:
    """Random values in place of a stored tensor (models/sharding/slices.py): norms are 1."""

    shape: tuple[int, ...]
    seed: int

    def read(self, bounds: Bounds) -> Tensor:
        shape = [end - begin for begin, end in bounds]
        if len(shape) < 2:
            return torch.ones(shape)
        return torch.empty(shape).normal_(0, SPREAD, generator=torch.Generator().manual_seed(self.seed))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of the model's decoder layers. Raises ValueError for a model without one."""
    found = {id(each) for each in blocks(model)}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(id(each) in found for each in module):
            return module
    raise ValueError(f"{type(model).__name__} has no list of decoder layers, by which its time could be forecast")


def kinds_of(model: nn.Module) -> list[Any]:
    """The kind of each layer, in order."""
    layers = layers_of(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding)]
    gradient = any(each.requires_grad for table in tables for each in table.parameters() if id(each) not in inside)
    kinds = []
    for layer in layers:
        shapes = tuple((name, tuple(each.shape), each.requires_grad) for name, each in layer.named_parameters())
        kinds.append((gradient, shapes))
        gradient = gradient or any(each.requires_grad for each in layer.parameters())
    return kinds


def cut(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of a model on the meta device that has the layers with these numbers alone."""
    shorter: Any = copy.deepcopy(model)
    layers = layers_of(shorter)
    chosen = [layers[number] for number in kept]
    for config in {id(each.config): each.config for each in shorter.modules() if hasattr(each, "config")}.values():
        if not hasattr(config, "num_hidden_layers"):
            continue
        for name in BY_LAYER:
            if len(values := getattr(config, name, None) or ()) == len(layers):
                setattr(config, name, [values[number] for number in kept])
        config.num_hidden_layers = len(kept)
    del layers[len(kept) :]
    for number, layer in enumerate(chosen):
        layers[number] = layer
    return shorter


def drawn(model: nn.Module) -> Blueprint:
    """The blueprint of a model on the meta device with random weights; the global random state is not used."""
    values = {name: Drawn(tuple(each.shape), at) for at, (name, each) in enumerate(model.named_parameters())}
    return Blueprint(model, values, ExitStack())


@dataclass(frozen=True)
class Cuts:
    """Which layers are kept to measure: `one` of each kind, and, by kind, `more` of that one. counts: in the model."""

    one: list[int]
    more: dict[Any, list[int]]
    counts: Counter[Any]

    @classmethod
    def of(cls, model: nn.Module, more: int) -> Cuts:
        """more: layers of a kind that are kept besides the first, where the model has so many."""
        kinds = kinds_of(model)
        first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        repeated = {kind: [at for at, each in enumerate(kinds) if each == kind][1 : 1 + more] for kind in kinds}
        longer = {kind: sorted([*first, *others]) for kind, others in repeated.items() if others}
        return cls(first, longer, Counter(kinds))

    def whole(self, one: float, more: dict[Any, float]) -> float:
        """What the whole model takes, from what the cuts took."""
        each = {kind: (more[kind] - one) / (len(kept) - len(self.one)) for kind, kept in self.more.items()}
        return one + sum((self.counts[kind] - 1) * max(0.0, per_layer) for kind, per_layer in each.items())
