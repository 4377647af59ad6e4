"""Compilation of the few loops over documents and edges that NumPy has no word for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles at the first call; the machine code is kept beside the source or, where that is read-only, in the user's cache."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # Neither place can be written, so each process compiles for itself.
        return numba.njit(nogil=True)(function)
