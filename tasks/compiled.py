"""Compilation of the few loops over documents and edges that NumPy has no operation for."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` at its first call; later processes load the machine code from numba's cache.

    numba is imported then, not before: it takes 0.2 s, which `eclectus run --help` must not wait for. It may call
    compiled functions of its own module: numba's cache notices changes of that file, not of others.
    """

    @functools.cache
    def machine_code() -> Callable[..., Any]:
        import numba

        names = {**function.__globals__}
        for name in function.__code__.co_names:
            if callee := getattr(names.get(name), "machine_code", None):
                names[name] = callee()
        whole = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        functools.update_wrapper(whole, function)
        try:
            return numba.njit(cache=True, nogil=True)(whole)
        except RuntimeError:
            # Neither the folder of the source nor the user's cache can be written: each process compiles for itself.
            return numba.njit(nogil=True)(whole)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return machine_code()(*arguments)

    call.machine_code = machine_code  # type: ignore[attr-defined]
    return call
