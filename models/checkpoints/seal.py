"""The seal of an export: SHA-256 of each of its files, and the checkpoint that it was made of.

    export.json    {"exported_from": "checkpoint-1a2b3c4d5e6f" or null, "files": {"model.safetensors": "9f86...", ...}}

Whoever serves an export, or certifies it, can tell whether it is what was written. A file that was changed, removed or
added since (weights, config, tokenizer, code) breaks the seal. The model card is not sealed.
"""

import hashlib
import json
from pathlib import Path

from eclectus.models.checkpoints.config_file import CheckpointError, read_json_object
from eclectus.models.checkpoints.side_files import checkpoint_files

SEAL = "export.json"
_BLOCK = 1 << 22


def write_seal(folder: Path, exported_from: str | None) -> None:
    """Seals an export. exported_from: name of the artifact that it was made of, if it was one. Reads all files once."""
    sealed = {"exported_from": exported_from, "files": {str(path): digest_of(folder / path) for path in _files(folder)}}
    (folder / SEAL).write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")


def read_seal(folder: Path) -> tuple[str | None, dict[str, str]] | None:
    """(the artifact that it was exported from, SHA-256 by file), None without a seal. Raises CheckpointError."""
    path = folder / SEAL
    if not path.is_file():
        return None
    sealed = read_json_object(path)
    origin, files = sealed.get("exported_from"), sealed.get("files")
    if not isinstance(files, dict) or not isinstance(origin, str | None):
        raise CheckpointError(f"{path} is no seal of an export: export the checkpoint again")
    return origin, files


def broken_seal(folder: Path) -> list[str]:
    """What is not as it was exported, a line for each file; empty for a whole export and for one without a seal."""
    sealed = read_seal(folder)
    if sealed is None:
        return []
    _, files = sealed
    present = {str(path) for path in _files(folder)}
    lines = [f"{name} is missing, which was exported" for name in sorted(files.keys() - present)]
    lines += [f"{name} was not exported" for name in sorted(present - files.keys())]
    changed = [name for name in sorted(files.keys() & present) if digest_of(folder / name) != files[name]]
    return lines + [f"{name} is not what was exported (its SHA-256 differs)" for name in changed]


def files_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that a seal covers."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path} {digest_of(folder / path)}\n".encode())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    # A file for llama.cpp beside a checkpoint is the user's; without one it is the export.
    own = "*.py" if (folder / "config.json").is_file() else "*.gguf"
    return sorted({*checkpoint_files(folder), *(path.relative_to(folder) for path in folder.glob(own))})
