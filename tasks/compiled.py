"""Compilation of the few loops over documents and edges that NumPy has no operation for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` at its first call; later processes load the machine code from numba's cache.

    numba is imported then, not before: it takes 0.2 s, which `eclectus run --help` must not wait for.
    """

    @functools.cache
    def machine_code() -> Callable[..., Any]:
        import numba

        try:
            return numba.njit(cache=True, nogil=True)(function)
        except RuntimeError:
            # Neither the folder of the source nor the user's cache can be written: each process compiles for itself.
            return numba.njit(nogil=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return machine_code()(*arguments)

    return call
