"""Fetch: a dense checkpoint from a folder, a GGUF file or the hub becomes an artifact, so that lineage knows its bytes.

Only safetensors weights, configuration and tokenizer are taken; pickled weights and code are refused or left behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import Field

from eclectus.storage.artifact import ArtifactStore, Draft, hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.step import step

WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.jinja",
    "upcycle.json",
)


class FetchSettings(Settings):
    base_model: str = Field(
        "", description="Checkpoint: a folder, a .gguf file, or a model's name on the hub.", json_schema_extra=BASIC
    )


def fingerprint(settings: FetchSettings) -> dict[str, str]:
    """The bytes of a local model, or the commit that the hub's name stands for now."""
    place = Path(settings.base_model)
    if place.is_file():
        return {"base_model": hash_file(place)}
    if place.is_dir():
        return {f"base_model {path.name}": hash_file(path) for path in _wanted(place)}
    return {"base_model": f"commit-{_hub_commit(settings.base_model)}"}


@step(makes="checkpoint", version=1, fingerprint=fingerprint)
def fetch(settings: FetchSettings, out: Draft) -> None:
    """Brings a dense checkpoint into the home."""
    place = Path(settings.base_model)
    if place.suffix == ".gguf" and place.is_file():
        _convert_gguf(place, out.path)
    else:
        folder = place if place.is_dir() else _download(settings.base_model)
        files = _wanted(folder)
        if not any(path.suffix == ".safetensors" for path in files):
            raise EclectusError(
                f"base model {settings.base_model} holds no .safetensors weights; convert it with save_pretrained(..., safe_serialization=True)"
            )
        for path in files:
            shutil.copyfile(path, out.file(path.name))
    out.statistics = {"base_model": settings.base_model if not place.exists() else place.name}


def find_checkpoint(store: ArtifactStore, name: str) -> Path:
    """The folder or .gguf file of a checkpoint: a path, an artifact's name, or a name on the hub, which is downloaded.

    Raises EclectusError when it is none of them.
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


def _wanted(folder: Path) -> list[Path]:
    return sorted({path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()})


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name).sha
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _not_found(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return f"base_model '{name}' is no folder or file here, and the hub does not give it: {first}"


def _convert_gguf(path: Path, out: Path) -> None:
    from eclectus.models.mixture.dense_base import DenseBase

    try:
        DenseBase.from_gguf(path).save(out)
    except ValueError as error:
        raise EclectusError(str(error)) from error
