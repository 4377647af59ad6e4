"""GPUs by type, as their makers describe them.

dense        peak of dense bf16 products, TFLOP/s
memory       GiB
bandwidth    of the memory, GB/s
link         between GPUs of a machine, in one direction, GB/s: NVLink, or PCIe where there is none
network      between machines, per GPU, GB/s: 400 Gb/s where GPUs are linked, else 100 to 200
names        part of what CUDA calls the device
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """As in the module's docstring. node: GPUs of a machine."""

    dense: float
    memory: float
    bandwidth: float
    link: float
    network: float
    name: str = ""
    node: int = 8


GPUS = {
    "a100-40": Gpu(312, 40, 1555, 300, 200, "A100-SXM4-40GB"),
    "a100-80": Gpu(312, 80, 2039, 300, 200, "A100"),
    "h100": Gpu(989, 80, 3350, 450, 400, "H100"),
    "h100-pcie": Gpu(756, 80, 2039, 64, 50, "H100 PCIe"),
    "h100-nvl": Gpu(835, 94, 3938, 300, 50, "H100 NVL"),
    "h200": Gpu(989, 141, 4800, 450, 400, "H200"),
    "gh200": Gpu(989, 96, 4000, 450, 50, "GH200", node=1),
    "b200": Gpu(2250, 180, 8000, 900, 400, "B200"),
    "l40s": Gpu(362, 48, 864, 32, 50, "L40S"),
    "l4": Gpu(121, 24, 300, 32, 12.5, "L4"),
    "a10g": Gpu(70, 24, 600, 32, 12.5, "A10G"),
    "rtx4090": Gpu(165, 24, 1008, 32, 12.5, "RTX 4090"),
    "rtx5090": Gpu(209, 32, 1792, 64, 12.5, "RTX 5090"),
}


def gpu_named(kind: str) -> Gpu:
    """The GPU of a type. Raises ValueError with the types that are known."""
    found = GPUS.get(kind.lower())
    if found is None:
        raise ValueError(f"GPU type '{kind}' is not in the table; its types are {', '.join(GPUS)}")
    return found


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU that CUDA calls by this name; of several, the one whose name says most."""
    found = [gpu for gpu in GPUS.values() if gpu.name in name]
    return max(found, key=lambda gpu: len(gpu.name), default=None)
