"""Eclectus: mixture-of-experts language models from a corpus of documents, with the lineage of every model."""

import importlib
from pathlib import Path
from typing import Any

# In a checkout the four packages stand beside this folder; in a wheel they are inside it.
__path__ = [*__path__, *(str(root) for root in [Path(__file__).parent.parent] if (root / "prefect.yaml").exists())]


# Functions of eclectus/api.py, imported when asked for.
_API = ("run", "curate", "pretrain", "extend", "similarity", "evaluate", "retrain", "sql", "tag")


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__", *_API])


def __getattr__(name: str) -> Any:
    """The functions of the Python API; `__version__`, of the installed package or in a checkout's pyproject.toml."""
    if name in _API:
        return getattr(importlib.import_module("eclectus.api"), name)
    if name != "__version__":
        raise AttributeError(f"module 'eclectus' has no attribute '{name}'")
    import tomllib
    from importlib import metadata

    try:
        return metadata.version("eclectus")
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
        return str(project["project"]["version"])
