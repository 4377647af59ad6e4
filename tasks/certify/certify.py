"""Certification of an export: it is whole, and servers answer with it as the training model answers.

    1. its seal (models/checkpoints/seal.py) and, of a mixture, the digest of the original weights: what was changed
       after the export is named, and nothing else is asked
    2. the training model, the artifact that it was exported from if this home has it, answers to the prompts in float32
    3. each server, in an environment of its own, answers with the export: in float32, which shows every wrong weight,
       and in the type that it is stored in, as it will be served
    4. differences are compared with tolerances (tasks/certify/compare.py)

The result goes into the model card and, as a step with statistics and metrics, into the lineage. Cost: a server loads
the model once in each type; minutes for the first installation of all servers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.commands import quoted
from eclectus.storage.errors import EclectusError
from eclectus.tasks.certify.compare import NARROW_TOLERANCE, TOLERANCE, Comparison
from eclectus.tasks.certify.environments import UnavailableError, environments_folder
from eclectus.tasks.certify.examination import Examination
from eclectus.tasks.certify.servers import Server
from eclectus.tasks.export.mixture import checkpoint_folder, export_dense, export_mixture, kind_of

if TYPE_CHECKING:
    from eclectus.storage.artifact import Artifact
    from eclectus.storage.home import Home

# It is the library that the model was trained with: what it refuses is damaged.
MUST_OPEN = "transformers-5"


@dataclass
class Certification:
    """What a certification found. name: of the checkpoint. unavailable: reason, by server. damage: a line for each
    file or weight that is not as it was exported. by_name: whether the user asked for these servers.
    """

    name: str
    stored: str = ""
    reference: str = ""
    comparisons: list[Comparison] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    by_name: bool = False

    @property
    def certified(self) -> bool:
        """Whether every server that was asked agreed, and one at least did."""
        missing = self.unavailable if self.by_name else self.unavailable.keys() & {MUST_OPEN}
        return not self.damage and not missing and bool(self.comparisons) and all(c.certified for c in self.comparisons)


@dataclass(frozen=True)
class Asked:
    """Options of a certification. servers: in order. by_name: whether the user named them. tolerance: of float32.

    against: a checkpoint to compare with, instead of the one that the export was made of.
    """

    servers: list[Server]
    by_name: bool = False
    tolerance: float = TOLERANCE
    narrow_tolerance: float = NARROW_TOLERANCE
    against: str | None = None
    environments: Path | None = None


def certify_checkpoint(
    home: Home, checkpoint: str, asked: Asked, report: Callable[[str], None] = lambda text: None
) -> tuple[Certification, Path, Artifact | None]:
    """(what was found, the folder that was given, its artifact if it is one).

    checkpoint: an export's folder, with weights or with a GGUF file, or an artifact's name, which is exported for it.
    Raises EclectusError for what is no checkpoint, or a Lory model, which servers cannot run.
    """
    gguf = gguf_file(Path(checkpoint))
    folder, artifact = (gguf.parent, None) if gguf else checkpoint_folder(home, checkpoint)
    if not gguf and kind_of(folder) == "lory":
        raise EclectusError(
            f"{checkpoint} is a Lory model, which no server runs: export it with --domain, --language or --prompt, and "
            "certify that export"
        )
    environments = asked.environments or environments_folder()
    with ExitStack() as stack:
        try:
            environments.mkdir(parents=True, exist_ok=True)
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=environments, prefix=".work-")))
        except OSError as error:
            raise EclectusError(f"{environments} cannot be written ({error.strerror}); set ECLECTUS_SERVERS") from error
        served = folder
        if artifact is not None:
            served = work / "export"
            make = export_mixture if kind_of(folder) == "mixture" else export_dense
            make(home, checkpoint, served)
        found = Certification(checkpoint, by_name=asked.by_name)
        try:
            found.damage = damage_of(served)
            if not found.damage:
                training = _training_folder(home, served, gguf, asked.against, found)
                _ask_all(Examination(gguf or served, training, home), asked, environments, work, found, report)
        except (ValueError, OSError) as error:
            raise EclectusError(f"{checkpoint} was not certified: {error}") from error
    return found, folder, artifact


def gguf_file(folder: Path) -> Path | None:
    """The file of an export for llama.cpp (`export --format gguf`), None for any other folder.

    Raises EclectusError for several files, and for the name of a file.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        raise EclectusError(f"{folder} is a file: certify {quoted(folder.parent)}, the folder of the export")
    files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise EclectusError(f"{folder} has {len(files)} GGUF files; expected one, as `export --format gguf` writes it")
    return files[0] if files else None


def damage_of(folder: Path) -> list[str]:
    """What of an export is not as it was exported, a line each: files, and a mixture's original weights."""
    from eclectus.models.checkpoints.door import check_checkpoint
    from eclectus.models.checkpoints.seal import broken_seal
    from eclectus.models.mixture.export import changed_originals

    if (lines := broken_seal(folder)) or gguf_file(folder):
        return lines
    checked = check_checkpoint(folder, trust_remote_code=True)
    if checked.kind == "mixture" and (fault := changed_originals(folder)):
        return [fault]
    return []


def _training_folder(home: Home, served: Path, gguf: Path | None, against: str | None, found: Certification) -> Path:
    """The checkpoint to compare with. Raises EclectusError where a GGUF file's is not known."""
    from eclectus.models.checkpoints.seal import read_seal

    if against is not None:
        found.reference = against
        return checkpoint_folder(home, against)[0]
    sealed = read_seal(served)
    if sealed is not None and sealed[0] is not None:
        try:
            folder = checkpoint_folder(home, sealed[0])[0]
        except EclectusError:
            folder = served
        # A Lory model's export has its experts merged in one of many ways.
        if folder != served and kind_of(folder) in ((kind_of(served),) if gguf is None else ("mixture", "dense")):
            found.reference = sealed[0]
            return folder
    if gguf is not None:
        raise EclectusError(
            f"{gguf} does not lead to a checkpoint of this home: name the one that it was made of with --against"
        )
    found.reference = "its own files, unchanged since the export, read by the training code"
    if sealed is None:
        found.reference = "its own files, read by the training code"
        found.notes.append(
            "this folder has no seal of an export, so that only servers are checked, not what was done to its files; "
            "name what it was made of with --against"
        )
    return served


def _ask_all(
    exam: Examination,
    asked: Asked,
    environments: Path,
    work: Path,
    found: Certification,
    report: Callable[[str], None],
) -> None:
    found.stored = exam.stored
    servers = [server for server in asked.servers if server.gguf or not exam.is_gguf]
    if asked.by_name:
        found.unavailable = {each.name: "reads no GGUF files" for each in asked.servers if each not in servers}
    report("the training model answers to prompts in several languages")
    for server in servers:
        for dtype in [exam.stored] if exam.is_gguf else dict.fromkeys(("float32", exam.stored)):
            try:
                model = exam.file_for(server, dtype, work)
                report(f"{server.name} answers in {dtype}")
                tolerances = (asked.tolerance, asked.narrow_tolerance)
                found.comparisons.append(exam.compared(server, model, dtype, tolerances, environments, report))
            except UnavailableError as error:
                found.unavailable[server.name] = " ".join(str(error).split())
                break
        for path in work.glob("*.gguf"):
            path.unlink()


def as_statistics(found: Certification) -> dict[str, Any]:
    """The certification as statistics of an artifact."""
    return {
        "certified": found.certified,
        "stored": found.stored,
        "reference": found.reference,
        "servers": [each.as_dict() for each in found.comparisons],
        "unavailable": found.unavailable,
        "damage": found.damage,
        "notes": found.notes,
    }
