"""Eclectus: mixture-of-experts language models from a corpus of documents, with the lineage of every model."""

from pathlib import Path

# In a checkout the four packages stand beside this folder; in a wheel they are inside it.
__path__ = [*__path__, *(str(root) for root in [Path(__file__).parent.parent] if (root / "prefect.yaml").exists())]


def __getattr__(name: str) -> str:
    """`__version__`, from the installed package or a bare checkout's pyproject.toml; read when asked for."""
    if name != "__version__":
        raise AttributeError(f"module 'eclectus' has no attribute '{name}'")
    import importlib.metadata
    import tomllib

    try:
        return importlib.metadata.version("eclectus")
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
        return str(project["project"]["version"])
