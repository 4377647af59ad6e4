"""Export of a mixture or a dense model: stock files that transformers 4.57 and 5 and vLLM load, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eclectus.storage.artifact import MANIFEST, Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.export.model_card import CARD, Origin, model_card, origin_of

if TYPE_CHECKING:
    from eclectus.storage.home import Home

Dtype = Literal["float32", "bfloat16", "float16"]


def checkpoint_folder(home: Home, checkpoint: str) -> tuple[Path, Artifact | None]:
    """(the folder of a checkpoint, its artifact or None). checkpoint: an artifact's name, or any folder.

    Raises EclectusError for a checkpoint that does not exist or is damaged.
    """
    folder = Path(checkpoint)
    if (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
        return folder, None
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        raise EclectusError(f"{checkpoint} has no config.json; expected a checkpoint's folder or an artifact's name")
    artifact = home.store.find(checkpoint)
    if fault := home.store.faults(artifact):
        raise EclectusError(f"{fault}; run the flow that made it again")
    if not artifact.file("config.json").is_file():
        raise EclectusError(f"{artifact.name} is not a model: it has no config.json")
    return Path(artifact.path), artifact


def kind_of(folder: Path) -> Literal["lory", "mixture", "dense"]:
    """What kind of model a folder holds. Raises EclectusError if its config.json cannot be read."""
    config = read_object(folder / "config.json")
    if config.get("model_type") == "lory":
        return "lory"
    return "mixture" if "num_experts_per_tok" in config else "dense"


def export_dense(home: Home, checkpoint: str, out: Path, dtype: Dtype | None = None) -> str:
    """Writes a dense checkpoint (a dense twin, a result of full, lora or llama_pro) into `out` atomically, with a card.

    checkpoint: an artifact's name, or any folder. dtype: of the stored floats; None: unchanged. Returns a description.
    Raises EclectusError naming the checkpoint and what is wrong with it.
    """
    import torch

    from eclectus.models.mixture.export import export_dense_checkpoint

    folder, artifact = checkpoint_folder(home, checkpoint)
    check_seal(folder, checkpoint)
    try:
        export_dense_checkpoint(folder, out, getattr(torch, dtype) if dtype else None)
    except (ValueError, OSError) as error:
        raise EclectusError(f"{checkpoint} was not exported: {error}") from error
    stored = read_object(folder / "config.json")
    before = stored.get("dtype") or stored.get("torch_dtype")
    made = {"stored_dtype": dtype, "trained_dtype": before} if dtype and before and dtype != before else {}
    return _with_card(home, out, artifact, made)


def export_mixture(
    home: Home, checkpoint: str, out: Path, dtype: Dtype | None = None, extract_base: bool = False
) -> str:
    """Writes the stock checkpoint, or its dense original, into `out` atomically and returns a description of it.

    checkpoint: an artifact's name, or any folder with an upcycled model. dtype: of the stored floats; None: unchanged.
    Raises EclectusError naming the checkpoint and what is wrong with it.
    """
    import torch

    from eclectus.models.checkpoints.proof import StepZeroError
    from eclectus.models.mixture.export import export_checkpoint
    from eclectus.models.mixture.export import extract_base as write_base

    folder, artifact = checkpoint_folder(home, checkpoint)
    if not extract_base:
        # A base is verified by its own digest.
        check_seal(folder, checkpoint)
    try:
        if extract_base:
            write_base(folder, out)
        else:
            export_checkpoint(folder, out, dtype=getattr(torch, dtype) if dtype else None)
    except (ValueError, OSError, StepZeroError) as error:
        raise EclectusError(f"{checkpoint} was not exported: {error}") from error
    if extract_base:
        seal(out, None)
        architecture = read_object(out / "config.json")["architectures"][0]
        return f"{out}: the dense {architecture} that it was upcycled from, with unchanged tensors"
    made = read_object(out / "upcycle.json") if (out / "upcycle.json").is_file() else {}
    told = _with_card(home, out, artifact, made)
    if made.get("original_weights") == "rounded":
        told += (
            f"\n  note         {made['original_dtype']} rounds the original weights: this export does not hold the "
            f"base bit by bit, and --extract-base refuses it; keep {checkpoint} for that"
        )
    return told


def _with_card(home: Home, out: Path, artifact: Artifact | None, made: dict[str, Any]) -> str:
    """Writes the model card of the export in `out` and returns a description of it. made: its upcycle.json."""
    seal(out, artifact)
    config = read_object(out / "config.json")
    origin = origin_of(home, artifact.digest) if artifact else Origin()
    (out / CARD).write_text(model_card(out.name, config, made, origin), encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"{out}: a {config['architectures'][0]}, {size / 1e6:,.1f} MB, with its model card in {CARD}"


def check_seal(folder: Path, checkpoint: str) -> None:
    """Raises EclectusError for an export, or a mixture of `upcycle`, whose files were changed since it was written."""
    from eclectus.models.checkpoints.seal import SEAL, broken_seal

    try:
        lines = broken_seal(folder)
    except (ValueError, OSError) as error:
        raise EclectusError(f"{checkpoint} was not exported: {error}") from error
    if lines:
        raise EclectusError(
            f"{checkpoint} was not exported: {lines[0]}; make it again, or remove {SEAL} from it to take it as it is"
        )


def seal(out: Path, artifact: Artifact | None) -> None:
    """Writes down what the export holds, so that whoever serves it can tell whether it was changed."""
    from eclectus.models.checkpoints.seal import write_seal

    write_seal(out, artifact.name if artifact else None)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises EclectusError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EclectusError(f"{path} cannot be read as JSON ({error})") from error
