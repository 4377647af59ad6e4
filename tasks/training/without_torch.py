"""Modules of `models` that import no PyTorch, opened by their path: importing their package would import it.

A run that reuses everything needs the list of a checkpoint's files and the table of methods, and no model.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any


@functools.cache
def without_torch(path: str) -> Any:
    """The module at this path below `models`, which must import the standard library alone."""
    file = Path(__file__).parents[2] / "models" / path
    name = f"eclectus_without_torch_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
