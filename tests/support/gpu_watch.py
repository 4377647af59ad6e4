"""Training steps on a GPU that is not there: every operator is seen, with shapes, dtypes and device as on CUDA.

    python -m tests.support.gpu_watch LIBRARY INSTANCES CASE ...        prints {case: [what was found, ...]} as JSON

Tensors are fake (torch._subclasses.fake_tensor): they have a shape, a dtype and the device cuda, and no data, so what
needs data (`.item()`, nonzero) cannot run, and what mixes devices fails as on a GPU. Batches come from files and are
real until they are moved. The loop is the real one (models/training/loop.py), with CUDA's autocast. The first step is
not looked at, in which AdamW makes its moments.
"""

from __future__ import annotations

import ctypes
import sys

if __name__ == "__main__":
    # Before PyTorch, which asks once whether there is CUDA.
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import json
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import import_utils

from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from tests.support.gpu_cases import CASES
from tests.support.tiny_training import plan

STEPS = 2


def operators_with_cuda_kernels() -> set[str]:
    """Of PyTorch's own list of operators, `name.overload`, those with a kernel for CUDA or made of others."""
    listed = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text("utf-8")
    names = set()
    for entry in listed.split("\n- func: ")[1:]:
        signature, _, rest = entry.partition("\n")
        keys = rest.partition("dispatch:\n")[2]
        if not keys or "CUDA" in keys or "Composite" in keys or "structured_delegate" in rest:
            names.add(signature.partition("(")[0])
    return names


class Watch(TorchDispatchMode):
    """Moves tensors to the device that is not there, and notes what a GPU would wait for or cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.uploads = self.operators = 0
        self._fakes, self._kernels = FakeTensorMode(allow_non_fake_inputs=True), operators_with_cuda_kernels()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        wanted = kwargs.get("device")
        to_gpu = wanted is not None and torch.device(wanted).type == "cuda"
        if not to_gpu and not any(isinstance(each, FakeTensor) for each in given):
            return function(*args, **kwargs)
        name = function.name().removeprefix("aten::")
        self._look(name, given, wanted, kwargs)
        if function.namespace == "aten" and name not in self._kernels:
            self.note(f"no CUDA kernel: {name}")
        with self._fakes:
            args, kwargs = tree_map(self._fake, (args, kwargs))
            made = function(*args, **kwargs)
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.dtype == torch.float64 and each.device.type == "cuda":
                self.note("float64")
        return made

    def _look(self, name: str, given: list[Tensor], wanted: Any, kwargs: dict[str, Any]) -> None:
        self.operators += 1
        on_gpu = [isinstance(each, FakeTensor) for each in given]
        if given and not any(on_gpu):
            self.uploads += 1
            if not kwargs.get("non_blocking"):
                self.note(f"a copy from the CPU that waits: {name}")
        elif wanted is not None and torch.device(wanted).type != "cuda":
            self.note(f"a copy to the CPU: {name}")
        elif any(each.ndim and not there for each, there in zip(given, on_gpu, strict=True)):
            self.note(f"a tensor on the CPU: {name}")
        if name.startswith("index") and any(each.dtype == torch.bool for each in given[1:]):
            self.note(f"boolean indexing: {name}")

    def _fake(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._fakes.from_tensor(value) if real else value

    def note(self, what: str, error: Exception | None = None) -> None:
        self.found.add(f"{what} in {place_in_code(error)}")


def place_in_code(error: Exception | None) -> str:
    """The innermost function of this repository, or of transformers, that is running, or that raised the error."""
    walked = list(traceback.walk_tb(error.__traceback__))[::-1] if error else traceback.walk_stack(sys._getframe(2))
    for frame, _ in walked:
        path = Path(frame.f_code.co_filename)
        if "transformers" in path.parts:
            return f"transformers {path.name} {frame.f_code.co_name}"
        if path.name == "gpu_cases.py" or ("models" in path.parts and "site-packages" not in path.parts):
            return f"{'/'.join(path.parts[-2:])} {frame.f_code.co_name}"
    return "autograd"


class Enough(Exception):
    """As many steps as wanted."""


def steps_of(case: str, instances: Path) -> list[str]:
    """What is found in the training steps of a case."""
    model, objective, changes = CASES[case]()
    watch = Watch()

    def report(kind: str, **values: Any) -> None:
        if kind == "progress" and values["done"] == 1:
            watch.found.clear()
        if kind == "progress" and values["done"] == STEPS:
            raise Enough

    chosen = plan(stop=100, total=100, checkpoint_every=50, log_every=50, **changes)
    process = Process(device=torch.device("cuda", 0))
    with tempfile.TemporaryDirectory() as work:
        try:
            with watch:
                train(model, Instances(instances), objective, chosen, process, Path(work), report)
        except Enough:
            assert watch.operators > 100 and watch.uploads, "nothing was seen"
        except Exception as error:
            # DataDependentOutputException, DynamicOutputShapeException: the result is waited for. NotImplementedError:
            # Python's own numbers on the device, torch.tensor([...], device="cuda"), which no dispatch mode sees.
            watch.note(f"{type(error).__name__} ({str(error).partition('.')[0]})", error)
    return sorted(watch.found)


def main() -> None:
    _, _, instances, *cases = sys.argv
    # What Python asks before it lets tensors and autocast on to a GPU.
    torch.cuda._lazy_init = lambda: None
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    # Where transformers takes fake tensors for a trace, it leaves out what it would wait for.
    import_utils.is_fake_tensor = lambda _: False
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    print(json.dumps({case: steps_of(case, Path(instances)) for case in cases}))


if __name__ == "__main__":
    main()
