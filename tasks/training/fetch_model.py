"""Fetch: copies a checkpoint from a folder, a GGUF file or the hub into an artifact, so that lineage records its bytes.

Copied are safetensors weights, config.json and the side files (models/checkpoints/side_files.py); pickled weights are
refused, and code, optimizer states and weights in other formats are not copied.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import ArtifactStore, Draft, hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.step import step


class FetchSettings(Settings):
    base_model: str = Field(
        "", description="Checkpoint: a folder, a .gguf file, or a model's name on the hub.", json_schema_extra=BASIC
    )


def fingerprint(settings: FetchSettings) -> dict[str, str]:
    """Digests of a local model's files, or the commit that the name on the hub points to now."""
    path = Path(settings.base_model)
    if path.is_file():
        return {"base_model": hash_file(path)}
    if path.is_dir():
        return {f"base_model {each}": hash_file(path / each) for each in listing().checkpoint_files(path)}
    return {"base_model": f"commit-{_hub_commit(settings.base_model)}"}


@step(makes="checkpoint", version=1, fingerprint=fingerprint)
def fetch(settings: FetchSettings, out: Draft) -> None:
    """Copies a checkpoint into the home."""
    base = Path(settings.base_model)
    if base.suffix == ".gguf" and base.is_file():
        _convert_gguf(base, out.path)
    else:
        folder = base if base.is_dir() else _download(settings.base_model)
        files = listing().checkpoint_files(folder)
        if not any(path.suffix == ".safetensors" for path in files):
            raise EclectusError(
                f"base model {settings.base_model} holds no .safetensors weights; convert it with "
                "save_pretrained(..., safe_serialization=True)"
            )
        for path in files:
            shutil.copyfile(folder / path, out.file(str(path)))
    out.statistics = {"base_model": settings.base_model if not base.exists() else base.name}


def find_checkpoint(store: ArtifactStore, name: str) -> Path:
    """The folder or .gguf file of a checkpoint. name: a path, an artifact, or a model on the hub, which is downloaded.

    Raises EclectusError when it is none of these.
    """
    if Path(name).exists():
        return Path(name)
    if name.startswith("checkpoint-"):
        return Path(store.find(name).path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise EclectusError(
            f"{name} does not exist; give a checkpoint's folder, a .gguf file, or a model's name on the hub"
        )
    return _download(name)


@functools.cache
def listing() -> Any:
    """The module models/checkpoints/side_files.py, by its path: importing its package would import PyTorch.

    A run that reuses its base needs the list for the fingerprint alone.
    """
    path = Path(__file__).parents[2] / "models" / "checkpoints" / "side_files.py"
    spec = importlib.util.spec_from_file_location("side_files", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(name).sha)
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    files = listing()
    try:
        return Path(snapshot_download(name, allow_patterns=list(files.WANTED), ignore_patterns=list(files.UNWANTED)))
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _not_found(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return f"base_model '{name}' is not a local folder or file, and it cannot be downloaded from the hub: {first}"


def _convert_gguf(path: Path, out: Path) -> None:
    from eclectus.models.checkpoints.dense_base import DenseBase

    try:
        DenseBase.from_gguf(path).save(out)
    except ValueError as error:
        raise EclectusError(str(error)) from error
