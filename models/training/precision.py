"""The arithmetic of training: float32, or bfloat16 where the machine multiplies it faster.

    matrix products                         bfloat16 (autocast): half the bytes, on matrix units twice the speed or more
    frozen matrices                         held in bfloat16, 2 bytes a weight, so that no step casts them
    trained weights, gradients, moments     float32
    norms, residual stream, router, losses  float32

A frozen matrix that bfloat16 does not hold exactly is rounded for the training alone: its values are read again from
the checkpoint before the model is written, so what did not train leaves a training with the bits that it had.

    python -m eclectus.models.training.precision          prints {"gain": 2.1, ...}: what bfloat16 brings on this CPU

is found by multiplying, for a second. Flags of the CPU alone do not tell: a virtual machine may show AVX512-BF16 and
lack AMX, a library may not use either, and without units for it bfloat16 is hundreds of times slower.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from eclectus.models.sharding.slices import Slices, whole_of
from eclectus.models.training.parallel import is_router

Precision = Literal["auto", "float32", "bfloat16"]
PROBE_SECONDS = 1.0
PROBE_ROWS, PROBE_WIDTH = 256, 512


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. "auto" is the device's own: bfloat16 on CUDA, float32 on a CPU.

    Raises ValueError for an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}: choose {', '.join(get_args(Precision))}")
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def is_half(precision: Precision, device: torch.device) -> bool:
    """Whether matrix products are in bfloat16."""
    return compute_dtype(precision, device) == torch.bfloat16


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """Matrix products in the dtype of `compute_dtype`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_half(precision, device))


def keep_routers_fp32(model: nn.Module) -> None:
    """From now on the routers of transformers' mixtures compute in float32 under autocast, as our own do; in place."""
    for module in model.modules():
        router = getattr(module, "gate", None)
        if isinstance(router, nn.Module) and hasattr(module, "experts"):
            # An attribute of the module: class, parameters and hooks stay as they are.
            router.forward = _InFloat32.of(router.forward)  # type: ignore[method-assign]


class _InFloat32:
    """A router's forward pass without autocast."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    @classmethod
    def of(cls, forward: Any) -> _InFloat32:
        return forward if isinstance(forward, cls) else cls(forward)

    def __call__(self, hidden: Tensor, *rest: Any, **named: Any) -> Any:
        if not torch.is_autocast_enabled(hidden.device.type):
            return self._forward(hidden, *rest, **named)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._forward(hidden.float(), *rest, **named)


class FrozenWeights:
    """The frozen matrices of a model, held in bfloat16 while it trains. Create it before the model is sharded.

        held = FrozenWeights(model, blueprint.values)
        train(...)
        held.restore()

    Cost: 2 bytes of memory per frozen weight instead of 4; what was rounded is read again at the end.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Slices]) -> None:
        """model: with its weights, or on the meta device, and then given them. values: what its parameters held."""
        self._model, self._values = model, values
        parameters = dict(model.named_parameters())
        self.names = [name for name, parameter in parameters.items() if _can_be_held(name, parameter)]
        for name in self.names:
            parameters[name].data = parameters[name].detach().to(torch.bfloat16)
        tables: set[nn.Module] = {module for module in model.modules() if isinstance(module, nn.Embedding)}
        if hasattr(model, "get_input_embeddings"):
            tables.add(cast(Any, model).get_input_embeddings())
        self._hooks = [module.register_forward_hook(_widened) for module in tables]
        _share_storage(model)

    def restore(self) -> None:
        """Puts the values from before back, in float32; the model must be whole."""
        parameters = dict(self._model.named_parameters())
        for hook in self._hooks:
            hook.remove()
        for name in self.names:
            value = whole_of(self._values[name])
            parameters[name].data = torch.empty(value.shape, device=parameters[name].device).copy_(value)
        _share_storage(self._model)


def _can_be_held(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a frozen fp32 matrix and no router's."""
    matrix = parameter.ndim >= 2 and not is_router(name)
    return matrix and not parameter.requires_grad and parameter.dtype == torch.float32


def _widened(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """Embeddings in fp32, in which the residual stream adds up, also from a table in bfloat16."""
    return output.float()


def _share_storage(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "share_storage"):
            cast(Any, module).share_storage()


def bfloat16_gain(seconds: float = PROBE_SECONDS) -> float:
    """Time of a float32 matrix product over that of the same product in bfloat16, the fastest of each.

    On the CPU. The two take turns, so that both meet the same load of the machine.
    """
    pairs = []
    for dtype in (torch.float32, torch.bfloat16):
        pairs.append(
            (torch.ones(PROBE_ROWS, PROBE_WIDTH, dtype=dtype), torch.ones(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype))
        )
    best, turns = [float("inf"), float("inf")], 0
    end = time.perf_counter() + seconds
    # In the first turn the library chooses its kernels; it does not count.
    while turns < 2 or time.perf_counter() < end:
        for which, (left, right) in enumerate(pairs):
            started = time.perf_counter()
            torch.mm(left, right)
            taken = time.perf_counter() - started
            best[which] = taken if turns == 1 else min(best[which], taken)
        turns += 1
    return best[0] / best[1]


def main() -> None:
    found = {"gain": round(bfloat16_gain(), 2), "cuda": torch.cuda.is_available(), "torch": torch.__version__}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
