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

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import MANIFEST, read_manifest
from eclectus.storage.errors import EclectusError
from eclectus.tasks.certify.compare import NARROW_TOLERANCE, TOLERANCE, Comparison, Expected, compare
from eclectus.tasks.certify.environments import UnavailableError, environments_folder
from eclectus.tasks.certify.measure import Question, ask
from eclectus.tasks.certify.prompts import held_out_texts, make_prompts
from eclectus.tasks.certify.servers import Server
from eclectus.tasks.export.mixture import checkpoint_folder, export_dense, export_mixture, kind_of

if TYPE_CHECKING:
    from eclectus.storage.artifact import Artifact
    from eclectus.storage.home import Home

GREEDY = 16
# Of the type that weights are stored in, which some CPUs compute slowly.
NARROW_PROMPTS, NARROW_GREEDY = 3, 8
# Bytes of weights from which a server gets all cores.
MANY_THREADS = 100_000_000
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

    checkpoint: an export's folder, or an artifact's name, which is exported for it. Raises EclectusError for what is no
    checkpoint, or a Lory model, which servers cannot run.
    """
    folder, artifact = checkpoint_folder(home, checkpoint)
    if kind_of(folder) == "lory":
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
        served, training = folder, folder
        if artifact is not None:
            served = work / "export"
            make = export_mixture if kind_of(folder) == "mixture" else export_dense
            make(home, checkpoint, served)
        found = Certification(checkpoint, by_name=asked.by_name)
        try:
            found.damage = damage_of(served)
            if not found.damage:
                training = _training_folder(home, served, asked.against, found)
                texts = _held_out(home, training)
                _ask_all(served, training, texts, asked, environments, work, found, report)
        except (ValueError, OSError) as error:
            raise EclectusError(f"{checkpoint} was not certified: {error}") from error
    return found, folder, artifact


def damage_of(folder: Path) -> list[str]:
    """What of an export is not as it was exported, a line each: files, and a mixture's original weights."""
    from eclectus.models.checkpoints.door import check_checkpoint
    from eclectus.models.checkpoints.seal import broken_seal
    from eclectus.models.mixture.export import changed_originals

    if lines := broken_seal(folder):
        return lines
    checked = check_checkpoint(folder, trust_remote_code=True)
    if checked.kind == "mixture" and (fault := changed_originals(folder)):
        return [fault]
    return []


def _training_folder(home: Home, served: Path, against: str | None, found: Certification) -> Path:
    """The checkpoint to compare with."""
    from eclectus.models.checkpoints.seal import read_seal

    if against is not None:
        found.reference = against
        return checkpoint_folder(home, against)[0]
    sealed = read_seal(served)
    if sealed is None:
        found.reference = "its own files, read by the training code"
        found.notes.append(
            "this folder has no seal of an export, so that only servers are checked, not what was done to its files; "
            "name what it was made of with --against"
        )
        return served
    origin = sealed[0]
    if origin is not None:
        try:
            folder = checkpoint_folder(home, origin)[0]
        except EclectusError:
            folder = served
        if folder != served and kind_of(folder) == kind_of(served):
            found.reference = origin
            return folder
    found.reference = "its own files, unchanged since the export, read by the training code"
    return served


def _held_out(home: Home, training: Path) -> dict[str, str]:
    """Held-out text of the run that made the training model, if it is an artifact of this home."""
    manifest = training / MANIFEST
    return held_out_texts(home, read_manifest(training)["digest"]) if manifest.is_file() else {}


def _ask_all(
    served: Path,
    training: Path,
    texts: dict[str, str],
    asked: Asked,
    environments: Path,
    work: Path,
    found: Certification,
    report: Callable[[str], None],
) -> None:
    from eclectus.models.checkpoints.door import check_checkpoint
    from eclectus.models.checkpoints.own_code import brings_our_code
    from eclectus.models.checkpoints.side_files import has_tokenizer
    from eclectus.models.checkpoints.tensor_files import CheckpointReader
    from eclectus.models.checkpoints.tokenizer_files import open_tokenizer
    from eclectus.tasks.certify.expected import expected_answers

    config = check_checkpoint(served, trust_remote_code=True).config
    with CheckpointReader(served) as reader:
        types = {spec.dtype for spec in reader.specs.values() if spec.dtype.is_floating_point}
        # Weights of several types are compared as they are.
        large = sum(spec.nbytes for spec in reader.specs.values()) > MANY_THREADS
        threads = len(os.sched_getaffinity(0)) if large else 1
        found.stored = str(types.pop()).removeprefix("torch.") if len(types) == 1 else "float32"
    limit = min(config["max_position_embeddings"], config.get("sliding_window") or config["max_position_embeddings"])
    greedy = max(1, min(GREEDY, limit // 4))
    tokenizer = open_tokenizer(served) if has_tokenizer(served) else None
    prompts = make_prompts(tokenizer, config["vocab_size"], limit - greedy - 1, texts)
    context = min(limit, max(len(prompt.ids) for prompt in prompts) + greedy + 1)
    question = Question(prompts, greedy, brings_our_code(served, config), context, threads)
    report(f"the training model answers to {len(prompts)} prompts")
    expected = expected_answers(training, found.stored, prompts, greedy)
    tokens = [list(tokenizer(prompt.text)["input_ids"]) for prompt in prompts] if tokenizer else None
    files = _Files(served, work)
    for server in asked.servers:
        for dtype in dict.fromkeys(("float32", found.stored)):
            try:
                model = files.gguf(dtype) if server.gguf else served
                report(f"{server.name} answers in {dtype}")
                found.comparisons.append(
                    _ask_one(server, model, dtype, question, expected, tokens, asked, environments, report)
                )
            except UnavailableError as error:
                found.unavailable[server.name] = " ".join(str(error).split())
                break
        files.forget()


@dataclass
class _Files:
    """The GGUF files of an export, written when they are asked for."""

    served: Path
    work: Path

    def gguf(self, dtype: str) -> Path:
        import torch

        from eclectus.models.checkpoints.gguf.export import export_gguf
        from eclectus.models.checkpoints.proof import StepZeroError

        path = self.work / f"{dtype}.gguf"
        try:
            export_gguf(self.served, path, getattr(torch, dtype))
        except (ValueError, OSError, StepZeroError) as error:
            raise UnavailableError(f"no GGUF file was written: {error}") from error
        return path

    def forget(self) -> None:
        for path in self.work.glob("*.gguf"):
            path.unlink()


def _ask_one(
    server: Server,
    model: Path,
    dtype: str,
    question: Question,
    expected: list[Expected],
    tokens: list[list[int]] | None,
    asked: Asked,
    environments: Path,
    report: Callable[[str], None],
) -> Comparison:
    tolerance = asked.tolerance
    if dtype != "float32":
        question = replace(
            question, prompts=question.prompts[:NARROW_PROMPTS], greedy=min(question.greedy, NARROW_GREEDY)
        )
        tolerance = max(asked.tolerance, asked.narrow_tolerance)
    answer, seconds = ask(server, environments, question.request(model, dtype), report)
    names = [prompt.name for prompt in question.prompts]
    return compare(
        answer,
        expected[: len(names)],
        tokens[: len(names)] if tokens else None,
        names,
        (server.name, dtype, tolerance, seconds),
    )


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
