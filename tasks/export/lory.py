"""Export of a Lory checkpoint to a stock dense LLaMA that any server can run (models/pretraining/export_dense.py)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import cast

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.export.mixture import Dtype, seal


def export(
    store: ArtifactStore,
    checkpoint: str,
    out: Path,
    domain: str | None,
    language: str | None,
    prompt: str | None,
    dtype: Dtype | None = None,
) -> str:
    """Writes the dense model into `out` atomically and returns a description of it.

    checkpoint: an artifact's name, or any folder with a Lory model. domain, language, prompt: exactly one decides how
    experts are merged, unless there is one expert. dtype: of the stored floats; None: unchanged. Raises EclectusError
    naming a checkpoint that is damaged or not a Lory model, or which of the three is missing.
    """
    folder = _folder(store, checkpoint)
    from eclectus.models.checkpoints.door import check_checkpoint, open_model
    from eclectus.models.lory.model import LoryForCausalLM
    from eclectus.models.pretraining.export_dense import export_dense
    from eclectus.models.staged_folder import require_new_folder, staged_folder

    try:
        require_new_folder(out)
        checked = check_checkpoint(folder)
        if checked.kind != "lory":
            raise ValueError(f"config.json says model_type {checked.config.get('model_type')!r}, expected 'lory'")
        model = cast(LoryForCausalLM, open_model(folder, dtype=None))
        with staged_folder(out) as partial:
            dense = export_dense(model, partial, domain=domain, language=language, prompt=prompt)
            if dtype:
                _convert(partial, dtype)
            seal(partial, None)
    except (OSError, ValueError) as error:
        raise EclectusError(f"{checkpoint} was not exported: {error}") from error
    return f"{out}: a LlamaForCausalLM of {sum(p.numel() for p in dense.parameters()):,} parameters"


def _convert(folder: Path, dtype: Dtype) -> None:
    """Rewrites the floats of a dense checkpoint in another type."""
    import torch

    from eclectus.models.mixture.export import export_dense_checkpoint

    with tempfile.TemporaryDirectory(dir=folder.parent) as wide:
        shutil.move(folder, Path(wide) / "wide")
        export_dense_checkpoint(Path(wide) / "wide", folder, getattr(torch, dtype))


def _folder(store: ArtifactStore, checkpoint: str) -> Path:
    if (Path(checkpoint) / "config.json").is_file() and not (Path(checkpoint) / "manifest.json").is_file():
        return Path(checkpoint)
    artifact = store.find(checkpoint)
    fault = store.faults(artifact)
    if fault:
        raise EclectusError(f"{fault}; run the flow that made it again")
    return Path(artifact.path)
