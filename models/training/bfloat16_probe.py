"""Whether this machine multiplies bfloat16 matrices faster than float32 ones, found by multiplying some.

    python -m eclectus.models.training.bfloat16_probe          prints {"gain": 2.1, ...}

Flags of the CPU alone do not tell: a virtual machine may show AVX512-BF16 and lack AMX, a library may not use either,
and without units for it bfloat16 is hundreds of times slower. Cost: a second, after the import of PyTorch.
"""

from __future__ import annotations

import json
import sys
import time

import torch

SECONDS = 1.0
ROWS, WIDTH = 256, 512


def bfloat16_gain(seconds: float = SECONDS) -> float:
    """Time of a float32 matrix product over that of the same product in bfloat16, the fastest of each.

    On the CPU. The two take turns, so that both meet the same load of the machine.
    """
    pairs = []
    for dtype in (torch.float32, torch.bfloat16):
        pairs.append((torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)))
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
