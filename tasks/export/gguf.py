"""Export of a checkpoint as a GGUF file for llama.cpp (models/checkpoints/gguf/export.py), with a model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.errors import EclectusError
from eclectus.tasks.export.lory import export as export_lory
from eclectus.tasks.export.mixture import Dtype, check_seal, checkpoint_folder, kind_of, read_object, seal
from eclectus.tasks.export.model_card import CARD, Origin, model_card, origin_of

if TYPE_CHECKING:
    from eclectus.storage.home import Home

SHORT = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export_gguf(home: Home, checkpoint: str, out: Path, dtype: Dtype | None, **merged_by: str | None) -> str:
    """Writes `out`/NAME-TYPE.gguf, terms of use and a model card, atomically; returns a description.

    checkpoint: an artifact's name, or any folder. dtype: of the matrices; None: as stored. merged_by: domain, language
    or prompt, for a Lory model. Raises EclectusError naming the checkpoint and what llama.cpp cannot do with it.
    """
    from eclectus.models.checkpoints.gguf.export import export_gguf as write
    from eclectus.models.checkpoints.proof import StepZeroError
    from eclectus.models.staged_folder import require_new_folder, staged_folder

    folder, artifact = checkpoint_folder(home, checkpoint)
    check_seal(folder, checkpoint)
    with tempfile.TemporaryDirectory(prefix="eclectus-") as temporary:
        try:
            require_new_folder(out)
            if kind_of(folder) == "lory":
                folder = Path(temporary) / out.name
                by = [merged_by.get(name) for name in ("domain", "language", "prompt")]
                export_lory(home.store, checkpoint, folder, by[0], by[1], by[2])
            with staged_folder(out) as partial:
                path = partial / f"{out.resolve().name}.gguf"
                made = write(folder, path, _torch_type(dtype))
                named = path.rename(partial / f"{path.stem}-{SHORT[str(made.dtype).removeprefix('torch.')]}.gguf")
                for terms in ("LICENSE*", "NOTICE*", "USE_POLICY*"):
                    for found in folder.glob(terms):
                        shutil.copyfile(found, partial / found.name)
                seal(partial, artifact)
                config = read_object(folder / "config.json")
                origin = origin_of(home, artifact.digest) if artifact else Origin()
                record = folder / "upcycle.json"
                about = (read_object(record) if record.is_file() else {}) | {"gguf": named.name}
                (partial / CARD).write_text(model_card(out.name, config, about, origin), encoding="utf-8")
        except (ValueError, OSError, StepZeroError) as error:
            raise EclectusError(f"{checkpoint} was not exported: {error}") from error
    size = (out / named.name).stat().st_size
    lines = [
        f"{out / named.name}: {made.architecture} of {size / 1e6:,.1f} MB for llama.cpp, with its model card in {CARD}",
        f"  proof        no logit differs by more than {made.proof.max_abs_delta:.2g} (largest logit "
        f"{made.proof.max_abs_logit:.3g}), read as llama.cpp reads it",
        *(f"  note         {note}" for note in made.notes),
    ]
    return "\n".join(lines)


def _torch_type(dtype: Dtype | None) -> Any:
    import torch

    return getattr(torch, dtype) if dtype else None
