"""Fetch: copies a checkpoint from a folder, a GGUF file or the hub into an artifact, so that lineage records its bytes.

Copied are safetensors weights, config.json and the side files (models/checkpoints/side_files.py); pickled weights are
refused, and code, optimizer states and weights in other formats are not copied.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import ArtifactStore, Draft, hash_file, is_checkpoint_name
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import copy_allowed, hash_all_allowed
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.check_base import check_base, check_files
from eclectus.tasks.training.without_torch import without_torch


class FetchSettings(Settings):
    base_model: str = Field(
        "",
        description="Checkpoint: a folder, a .gguf file, an artifact's name or tag, or a model's name on the hub.",
        json_schema_extra=BASIC,
    )


def fingerprint(settings: FetchSettings) -> dict[str, str]:
    """Digests of a local model's files, or the commit that the name on the hub points to now."""
    path, what = Path(settings.base_model), f"base model {settings.base_model}"
    if path.exists():
        check_files(path, what)
    if path.is_file():
        return _gguf_digests(path)
    if path.is_dir():
        try:
            files = [path / each for each in listing().checkpoint_files(path)]
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            # A damaged index: the door names what is wrong with it.
            check_base(settings.base_model)
            raise
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not any(each.suffix == ".safetensors" for each in files):
            return _gguf_digests(ggufs[0])
        names = [f"base_model {each.relative_to(path)}" for each in files]
        return dict(zip(names, hash_all_allowed(files, what), strict=True))
    return {"base_model": f"commit-{_hub_commit(settings.base_model)}"}


@step(makes="checkpoint", version=2, fingerprint=fingerprint)
def fetch(settings: FetchSettings, out: Draft) -> None:
    """Copies a checkpoint into the home, through the door: checked whole, weights and tokenizer too."""
    from eclectus.models.checkpoints.dense_base import DenseBase
    from eclectus.models.checkpoints.door import check_checkpoint, check_contents
    from eclectus.models.checkpoints.proof import StepZeroError

    base, proof = Path(settings.base_model), None
    folder, what = base if base.exists() else _download(settings.base_model), f"base model {settings.base_model}"
    check_files(folder, what)
    try:
        checked = check_checkpoint(folder)
        check_contents(checked)
        if checked.path.is_file():
            proof = DenseBase.from_gguf(checked.path).save(out.path)
            # Its readers open it by name: no link may have been swapped meanwhile.
            check_files(checked.path, what)
        else:
            for path in listing().checkpoint_files(folder):
                copy_allowed(folder / path, out.file(str(path)), what)
        # What was converted, or copied while somebody wrote it, passes once more.
        check_checkpoint(out.path)
    except (ValueError, StepZeroError) as error:
        raise EclectusError(f"base model {settings.base_model}: {error}") from error
    out.read = _as_read(settings, folder, out)
    out.statistics = {"base_model": settings.base_model if not base.exists() else base.name}
    if proof is not None:
        out.statistics["step_zero"] = asdict(proof)


def _as_read(settings: FetchSettings, folder: Path, out: Draft) -> dict[str, str] | None:
    """The fingerprint of what was copied; a download has its commit as the name of its folder."""
    if not Path(settings.base_model).exists():
        return {"base_model": f"commit-{folder.name}"} if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    # What was converted from GGUF is not a copy; that file is hashed again.
    return {
        name: hash_file(copy) if (copy := out.path / name.removeprefix("base_model ")).is_file() else digest
        for name, digest in fingerprint(settings).items()
    }


def _gguf_digests(path: Path) -> dict[str, str]:
    """The digest of a .gguf file, and of its further shards by their names."""
    others = listing().gguf_shards(path)[1:]
    names = ["base_model", *(f"base_model {each.name}" for each in others)]
    return dict(zip(names, hash_all_allowed([path, *others], f"base model {path}"), strict=True))


def find_checkpoint(store: ArtifactStore, name: str) -> Path:
    """The folder or .gguf file of a checkpoint. name: a path, an artifact, or a model on the hub, which is downloaded.

    Raises EclectusError when it is none of these.
    """
    if Path(name).exists():
        return Path(name)
    if is_checkpoint_name(name):
        return Path(store.find(name).path)
    _check_hub_name(name, name)
    return _download(name)


def _check_hub_name(name: str, shown: str) -> None:
    """Raises EclectusError for what can only be a path. shown: the name in the message."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise EclectusError(
            f"{shown} does not exist; give a checkpoint's folder, a .gguf file, an artifact's name or tag, or a "
            "model's name on the hub"
        )


def listing() -> Any:
    """The module models/checkpoints/side_files.py, without PyTorch."""
    return without_torch("checkpoints/side_files.py")


def _hub_commit(name: str) -> str:
    from huggingface_hub import HfApi

    _check_hub_name(name, f"model '{name}'")
    try:
        return str(HfApi().model_info(name).sha)
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    _check_hub_name(name, f"model '{name}'")
    files = listing()
    try:
        return Path(snapshot_download(name, allow_patterns=list(files.WANTED), ignore_patterns=list(files.UNWANTED)))
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _not_found(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return f"model '{name}' is not a local folder or file, and it cannot be downloaded from the hub: {first}"
