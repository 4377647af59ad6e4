"""What the parameters of a model in its form for training hold, from those of its stock form.

SplitExperts               frozen_* = the first experts of a stack, new_* = the others
SplitEmbedding, SplitHead  frozen_weight = the first rows, new_weight = the others
Lory, extended             original0 = the old experts or router rows, original1 = the new ones
LoRA                       base layers as they were, adapters from memory
LLaMA-Pro                  blocks as those that they are copied from, output projections of new ones zero
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from eclectus.models.extension.split_vocabulary import SplitEmbedding, SplitHead
from eclectus.models.mixture.experts import SplitExperts
from eclectus.models.sharding.live import ADAPTED, WRAPPED
from eclectus.models.sharding.slices import Cut, InMemory, Slices, Zeros

LAYERS = "model.layers."


def values_in_form(model: nn.Module, stock: Mapping[str, Slices]) -> dict[str, Slices]:
    """By parameter of `model`, its values; `stock`: those of the stock model, by its names.

    Parameters that only the form for training has must be in memory.
    """
    values: dict[str, Slices] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        plain = owner.removeprefix(ADAPTED).removesuffix(WRAPPED)
        module, rows = modules[owner], parameter.shape[0]
        if isinstance(module, SplitExperts):
            part, _, matrix = leaf.partition("_")
            values[name] = _side(stock[f"{plain}.{matrix}_proj"], rows, part == "frozen")
        elif isinstance(module, SplitEmbedding | SplitHead):
            values[name] = _side(stock[f"{plain}.weight"], rows, leaf == "frozen_weight")
        elif isinstance(module, ParametrizationList):
            values[name] = _side(stock[plain.replace(".parametrizations", "")], rows, leaf == "original0")
        elif f"{plain}.{leaf}" in stock:
            values[name] = stock[f"{plain}.{leaf}"]
        else:
            values[name] = InMemory(parameter.detach())
    return values


def _side(both: Slices, rows: int, first: bool) -> Slices:
    """The first or the last rows."""
    return Cut(both, 0, rows) if first else Cut(both, both.shape[0] - rows, both.shape[0])


def deeper_values(stock: Mapping[str, Slices], origins: Sequence[tuple[int, bool]]) -> dict[str, Slices]:
    """The values of a model with more blocks.

    origins: for each block, the one that it is copied from, and whether it is new.
    """
    values = {name: value for name, value in stock.items() if not name.startswith(LAYERS)}
    for index, (origin, new) in enumerate(origins):
        prefix = f"{LAYERS}{origin}."
        for name in [name for name in stock if name.startswith(prefix)]:
            zero = new and (".o_proj." in name or ".down_proj." in name)
            values[f"{LAYERS}{index}.{name.removeprefix(prefix)}"] = Zeros(stock[name].shape) if zero else stock[name]
    return values


def hold_no_memory(model: nn.Module) -> None:
    """Moves parameters from the meta device to the CPU without memory: views of one element, for who asks where they
    are and not what they hold; in place."""
    _replace(model, lambda parameter: parameter.new_empty((), device="cpu").expand(parameter.shape))


def hold_nothing(model: nn.Module) -> None:
    """Moves all parameters to the meta device, in place."""
    _replace(model, lambda parameter: torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))


def _replace(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(make(parameter.detach()), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
