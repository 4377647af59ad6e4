"""One model over several processes: copied to each (DDP) or sharded over them (FSDP2).

DDP keeps weights, gradients and AdamW's moments in every process: 16 bytes per trained parameter in fp32. FSDP2 keeps
1/world of that and gathers one layer's weights when needed: twice per step, 4 bytes per parameter each time. A sharded
parameter is a DTensor, sharded along its first dimension; the functions below take whole and sharded tensors alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from eclectus.models.training.process import Process


def shard(model: nn.Module, process: Process) -> None:
    """Shards `model` in place over all processes, layer by layer; in one process it stays whole.

    Every process must hold the same weights. Experts that are still views of one FFN get memory of their own one layer
    at a time, so that no process holds E copies of more than one FFN. Raises ValueError for a model without
    `_no_split_modules`.
    """
    if process.world == 1:
        return
    layers = list(blocks(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no _no_split_modules, so it cannot be sharded; train it with DDP")
    mesh = init_device_mesh(process.device.type, (process.world,))
    for layer in layers:
        copy_shared_experts(layer)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, process: Process) -> nn.Module:
    """The model in DistributedDataParallel; the model itself in a single process or if it is sharded already."""
    if process.world == 1 or isinstance(model, FSDPModule):
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of every decoder layer, in place: parameters keep their names, layers share one compilation."""
    for layer in blocks(model):
        layer.compile()


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing of every decoder layer. Raises ValueError for a model that has none."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; train it without recomputation")
    # Reentrant checkpointing needs an input with gradients, which a model with frozen embeddings does not have.
    cast(PreTrainedModel, model).activation_checkpointing_enable({"use_reentrant": False})


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The model's decoder layers, by its own `_no_split_modules`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def synced(model: nn.Module, last: bool) -> AbstractContextManager:
    """Exchanges gradients between processes only with the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return torch.enable_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every process; for a sharded one all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: torch.Tensor) -> int:
    """The row of the whole tensor at which `local(tensor)` begins."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, rank = tensor.device_mesh, tensor.device_mesh.get_local_rank()
    # As torch.chunk: parts of equal size, the last ones shorter or empty.
    return min(rank * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of `value`, whole or sharded, with the device, dtype and sharding of `parameter`."""
    value = value.to(device=local(parameter).device, dtype=parameter.dtype, copy=True)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@torch.no_grad()
def gather_model(model: nn.Module, process: Process) -> None:
    """Collects a sharded model on the CPU of rank 0, ready to compute and be saved; the other ranks lose its weights.

    All processes must call it. A model that is not sharded stays as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass without a backward the outermost weights are still gathered, in buffers of FSDP.
            module.reshard()
    gathered: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in gathered:
                    full = parameter.full_tensor()
                    value = full.cpu() if process.is_main else full.new_empty(0)
                    gathered[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                module._parameters[name] = gathered[id(parameter)]
        if isinstance(module, FSDPModule):
            # fully_shard made the module's class a subclass (FSDPModule, plain class); torch offers no way to undo it,
            # and save_pretrained writes the class's name into config.json.
            # Nor does it for the hooks, in which a forward pass of rank 0 would wait for the other ranks.
            state = module._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            _, plain_class = type(module).__bases__
            module.__class__ = plain_class


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def config_of(model: nn.Module) -> Any:
    """The transformers configuration of a model, also inside DistributedDataParallel."""
    return unwrapped(model).config


def copy_shared_experts(module: nn.Module) -> None:
    """Copies parameters whose elements share memory, as experts that are views of one FFN do, in place."""
    for parameter in module.parameters():
        if 0 in parameter.stride():
            parameter.data = parameter.data.contiguous()
