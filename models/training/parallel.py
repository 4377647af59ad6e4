"""One model over several processes: copied to each (DDP) or sharded over them (FSDP2), or over groups of them (HSDP).

DDP keeps weights, gradients and AdamW's moments in every process: 16 bytes per trained parameter in fp32. FSDP2 keeps
1/world of that and gathers one layer's weights when needed: twice per step, 4 bytes per parameter each time. A sharded
parameter is a DTensor, sharded along its first dimension, or along the rows of its matrices where it stacks more or
fewer of them than the processes can share evenly; the functions below take whole and sharded tensors alike.

With replicas (`Process.replicas`) each group of processes holds the model: weights are gathered within a group, as are
sums of gradients, which are then added up over the groups, once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from eclectus.models.training.process import Process


def shard(model: nn.Module, process: Process, half: bool = False) -> None:
    """Shards `model` in place over all processes, layer by layer; in one process it stays whole.

    Every process must hold the same weights, or none (a model on the meta device, which models/sharding/blueprint.py
    fills afterwards). A model that is sharded stays as it is. Experts that are still views of one FFN get memory of
    their own one layer at a time, so that no process holds E copies of more than one FFN. half: for training in
    bfloat16; the matrices of layers are gathered in it, half the bytes, and autocast need not cast them; gradients are
    summed in float32. Norms, routers and what is outside of layers stay float32. Raises ValueError for a model without
    `_no_split_modules`.
    """
    if process.world == 1 or is_sharded(model):
        return
    layers = list(blocks(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no _no_split_modules, so it cannot be sharded; train it with DDP")
    shares = process.world // process.replicas
    sizes = (shares,) if process.replicas == 1 else (process.replicas, shares)
    mesh = init_device_mesh(process.device.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Experts [E, rows, columns] by rows where E processes would not have one each, or some have one more."""
        uneven = parameter.ndim == 3 and parameter.shape[0] % shares
        return Shard(1) if uneven and parameter.shape[1] % shares == 0 else None

    # Inputs are not cast: autocast decides for each operator, and the residual stream stays float32.
    halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        copy_shared_experts(layer)
        if half and (others := without_matrices(layer)):
            # They are small: gathered once for both passes.
            fully_shard(others, mesh=mesh, shard_placement_fn=placement, reshard_after_forward=False)
        policy = halved if half else MixedPrecisionPolicy()
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
        if process.device.type == "cpu":
            # Gathering the next layer ahead overlaps with nothing there, and takes memory for a second layer.
            cast(FSDPModule, layer).set_modules_to_backward_prefetch([cast(FSDPModule, layer)])
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def is_router(name: str) -> bool:
    """Whether a parameter of this name is a router's, which computes in float32."""
    return ".router." in name or name.endswith(".gate.weight")


def without_matrices(layer: nn.Module) -> list[nn.Module]:
    """The largest modules within a layer whose parameters are vectors or routers: its norms and its router."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, prefix: str) -> None:
        named = list(module.named_parameters(prefix))
        if named and all(parameter.ndim < 2 or is_router(name) for name, parameter in named):
            found.append(module)
            return
        for name, child in module.named_children():
            visit(child, f"{prefix}.{name}")

    visit(layer, "layer")
    return found


def arrange_gathering(model: nn.Module, kept: bool, ahead: int) -> None:
    """How the layers of a sharded model are gathered, in place; a model that is not sharded stays as it is.

    kept: a layer's weights stay whole from its forward pass to its backward pass, instead of being gathered again: one
    gather less, and memory for the whole model. ahead: layers that are gathered before they compute, in both passes, of
    which each takes its memory; 0: what FSDP2 does itself, on a CPU nothing (`shard`).
    """
    layers = [cast(FSDPModule, layer) for layer in blocks(model) if isinstance(layer, FSDPModule)]
    for number, layer in enumerate(layers):
        layer.set_reshard_after_forward(not kept, recurse=False)
        if ahead:
            layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + ahead])
            layer.set_modules_to_backward_prefetch(layers[max(0, number - ahead) : number][::-1])


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes share the model, so that all of them must call it."""
    return isinstance(model, FSDPModule)


def replicate(model: nn.Module, process: Process, summed: bool = False) -> nn.Module:
    """The model in DistributedDataParallel; the model itself in a single process or if it is sharded already.

    summed: gradients are added up elsewhere (models/elastic/fixed_sums.py), so the processes only start equal.
    """
    if process.world == 1 or is_sharded(model):
        return model
    if summed:
        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), 0)
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """torch.compile of every decoder layer, in place: parameters keep their names, layers share one compilation.

    options: of torch.compile. A layer is one graph, also where transformers' hooks collect router logits in it.
    """
    if not isinstance(output_capturing._active_collector, _Collector):
        output_capturing._active_collector = _Collector()  # type: ignore[assignment]
    for layer in blocks(model):
        layer.compile(**options)


class _Collector:
    """What transformers' hooks collect now, in a plain attribute: its own ContextVar cannot be traced."""

    def __init__(self) -> None:
        self._collected: Any = None

    def get(self) -> Any:
        return self._collected

    def set(self, collected: Any) -> Any:
        """Returns what was collected before, for `reset`."""
        before, self._collected = self._collected, collected
        return before

    def reset(self, before: Any) -> None:
        self._collected = before


def recompute_blocks(model: nn.Module, every: int = 1) -> None:
    """Gradient checkpointing of every n-th decoder layer, the first included. Raises ValueError for a model that has
    none."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; train it without recomputation")
    # Reentrant checkpointing needs an input with gradients, which a model with frozen embeddings does not have.
    cast(PreTrainedModel, model).activation_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(blocks(model)):
        cast(Any, layer).gradient_checkpointing = number % every == 0


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The model's decoder layers, by its own `_no_split_modules`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if plain_class(module).__name__ in names)


def synced(model: nn.Module, last: bool, once: bool) -> AbstractContextManager:
    """Exchanges gradients between processes only with the last micro-batch of a step.

    A sharded model reduces those of every micro-batch, so that no process holds more than its share; with `once` at the
    last, too, for which each holds the whole gradient.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not once)
        model.set_requires_all_reduce(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return torch.enable_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every process; for a sharded one all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bounds(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """For each dimension of the whole tensor, the (begin, end) of `local(tensor)`."""
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        dim = shard_dim(tensor)
        bounds[dim] = _bounds_of(tensor, dim)
    return bounds


def shard_dim(tensor: DTensor) -> int:
    """The dimension along which a tensor is sharded."""
    return cast(Shard, tensor.placements[-1]).dim


def _sharing(tensor: DTensor) -> tuple[int, int, dist.ProcessGroup]:
    """(rank, size, group) of the processes that share the tensor: those of this one's replica."""
    mesh, last = tensor.device_mesh, tensor.device_mesh.ndim - 1
    return mesh.get_local_rank(last), mesh.size(last), mesh.get_group(last)


def _bounds_of(tensor: DTensor, dim: int) -> tuple[int, int]:
    # As torch.chunk: parts of equal size, the last ones shorter or empty.
    size, (rank, shares, _) = tensor.shape[dim], _sharing(tensor)
    each = -(-size // shares)
    return min(rank * each, size), min((rank + 1) * each, size)


def item(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """`tensor[number]`, whole, on every process; for a sharded one all processes must call it."""
    value = tensor.detach()
    if not isinstance(value, DTensor):
        return value[number]
    own, dim, (rank, shares, group) = value.to_local(), shard_dim(value), _sharing(value)
    if dim == 0:
        each = -(-len(value) // shares)
        owner, at = divmod(number, each)
        found = own[at].contiguous() if rank == owner else own.new_empty(value.shape[1:])
        dist.broadcast(found, group=group, group_src=owner)
        return found
    parts = [torch.empty_like(own[number]) for _ in range(shares)]
    dist.all_gather(parts, own[number].contiguous(), group=group)
    return torch.cat(parts, dim - 1)


def reshard(model: nn.Module) -> None:
    """Drops gathered weights: after a forward pass without a backward, FSDP keeps the outermost ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of `value`, whole or sharded, with the device, dtype and sharding of `parameter`."""
    value = value.to(device=local(parameter).device, dtype=parameter.dtype, copy=True)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def plain_class(model: nn.Module) -> Any:
    """The class of a model as it was before it was sharded: fully_shard makes it (FSDPModule, plain class)."""
    return type(model).__bases__[1] if is_sharded(model) else type(model)


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
