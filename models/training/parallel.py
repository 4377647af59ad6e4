"""One model over several processes: copied to each (DDP) or sharded over them (FSDP2).

DDP keeps weights, gradients and AdamW's moments in every process: 16 bytes a trained parameter in fp32. FSDP2 keeps 1/world
of that and gathers one layer's weights when they are needed: twice a step, 4 bytes a parameter each time. A sharded
parameter is a DTensor, cut along its first dimension; everything below treats whole and sharded tensors alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from eclectus.models.training.process import Process


def shard(model: nn.Module, process: Process) -> None:
    """Shards `model` in place over all processes, layer by layer; in one process it stays whole.

    Every process must hold the same weights; experts that are still views of one FFN are parted a layer at a time, so that
    no process ever holds E copies of more than one. Raises ValueError for a model that does not say what its layers are.
    """
    if process.world == 1:
        return
    layers = list(blocks(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no _no_split_modules, so it cannot be sharded; train it with DDP")
    mesh = init_device_mesh(process.device.type, (process.world,))
    for layer in layers:
        part_experts(layer)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, process: Process) -> nn.Module:
    """DistributedDataParallel over several processes; the model itself in one, or where it is sharded already."""
    if process.world == 1 or isinstance(model, FSDPModule):
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of every decoder layer, in place: names of parameters stay, and all layers share one compilation."""
    for layer in blocks(model):
        layer.compile()


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing of every decoder layer. Raises ValueError for a model that has none."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; train it without recomputation")
    # The other kind of checkpointing needs an input with gradients, which a model with frozen embeddings has not.
    model.activation_checkpointing_enable({"use_reentrant": False})


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The model's decoder layers, by its own `_no_split_modules`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def synced(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients cross between processes only with the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return torch.enable_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every process; of a sharded one, all processes must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: torch.Tensor) -> int:
    """Where `local(tensor)` begins along the first dimension of the whole tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, at = tensor.device_mesh, tensor.device_mesh.get_local_rank()
    # As torch.chunk cuts: parts of equal size, the last ones shorter or empty.
    return min(at * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of `value`, whole or sharded, placed and typed as `parameter` is."""
    value = value.to(device=local(parameter).device, dtype=parameter.dtype, copy=True)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@torch.no_grad()
def gather(model: nn.Module, process: Process) -> None:
    """Makes a sharded model whole on the CPU of the leading process, ready to be saved; elsewhere its weights are given up.

    All processes must call it. What was whole stays as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward pass without a backward leaves the outermost weights gathered, in buffers that FSDP will free.
            module.reshard()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    full = parameter.full_tensor()
                    made[id(parameter)] = nn.Parameter(full.cpu() if process.is_main else full.new_empty(0))
                module._parameters[name] = made[id(parameter)]
        if isinstance(module, FSDPModule):
            # fully_shard put its own class in front of the module's.
            module.__class__ = type(module).__mro__[2]


def part_experts(module: nn.Module) -> None:
    """Gives parameters whose elements share memory, as views of one FFN do, memory of their own, in place."""
    for parameter in module.parameters():
        if 0 in parameter.stride():
            parameter.data = parameter.data.contiguous()
