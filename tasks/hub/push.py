"""Push: a checkpoint or an export on a model hub, with what shows where it comes from.

    the checkpoint's own files    bit by bit: `pull` makes the same artifact of them
    README.md                     the model card, with the digests and the certification table
    eclectus/manifest.json        the artifact's manifest          eclectus/SHA256SUMS    of every file
    eclectus/lineage.duckdb       the run that made it, with all that it was made from (storage/lineage/bundle.py)

Everything is one commit, so a push that fails leaves the repository as it was. An existing repository keeps its
visibility; a public one is refused unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import MANIFEST, Artifact, hash_all
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.bundle import bundle
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.export.mixture import check_seal, checkpoint_folder, kind_of, read_object
from eclectus.tasks.export.model_card import CARD, Origin, model_card, origin_of
from eclectus.tasks.hub.hub import (
    BUNDLE_THERE,
    DIGESTS_THERE,
    MANIFEST_THERE,
    api,
    check_repository,
    check_token,
    on_hub,
)
from eclectus.tasks.hub.pull import is_part

if TYPE_CHECKING:
    from eclectus.storage.home import Home

# Code and the seal belong to an export; `pull` leaves them out.
_OF_EXPORTS = ("*.py", "export.json")
_MADE_BY = "select s.run from artifacts a join steps s on a.made_by = s.step where a.artifact = $artifact"
_LORY = "import eclectus.models.lory  # makes Lory known to transformers\nfrom transformers import"


@dataclass(frozen=True)
class Upload:
    """A file to push. name: in the repository."""

    name: str
    path: Path

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


@dataclass
class Push:
    """What is pushed. notes: what is not, and why."""

    repository: str
    uploads: list[Upload]
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.uploads)


def plan_push(home: Home, checkpoint: str, repository: str, scratch: Path) -> Push:
    """Lists what would be pushed; what is made for it (card, digests, bundle) is written into `scratch`.

    checkpoint: an artifact's name, or an export's folder. Raises EclectusError for one that is damaged or changed, or
    no model.
    """
    check_repository(repository)
    folder, artifact = checkpoint_folder(home, checkpoint)
    if artifact is None:
        check_seal(folder, checkpoint)
        names = _names_of_export(folder)
    else:
        names = sorted(artifact.digests())
    known = artifact or _exported_from(home, folder)
    plan = Push(repository, [Upload(name, folder / name) for name in names])
    if strange := [name for name in names if not is_part(name) and artifact]:
        raise EclectusError(
            f"{checkpoint} holds {strange[0]}, which `pull` would not take; export it, and push the export"
        )
    origin = origin_of(home, known.digest) if known and home.journal.is_dir() else Origin()
    digests = dict(zip(names, hash_all(folder / name for name in names), strict=True))
    _write(plan, scratch, CARD, _card(folder, artifact, repository, origin, digests))
    if artifact is not None:
        _write(plan, scratch, MANIFEST_THERE, artifact.file(MANIFEST).read_text("utf-8"))
    _write(plan, scratch, DIGESTS_THERE, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    _add_lineage(plan, home, known, scratch)
    return plan


def push(plan: Push, public: bool, message: str, say: Callable[[str], None]) -> str:
    """Pushes in one commit and returns its address. Raises EclectusError with what the hub says."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import RepositoryNotFoundError

    check_token(f"push to {plan.repository}")
    hub, name = api(), plan.repository

    def visibility() -> bool | None:
        try:
            return bool(hub.model_info(name).private)
        except RepositoryNotFoundError:
            return None

    private = on_hub(visibility, f"push to {name}", say)
    if private is False and not public:
        raise EclectusError(
            f"{name} is public, so everyone would see the checkpoint; add --public, or choose another name"
        )
    if private is None:
        on_hub(lambda: hub.create_repo(name, private=not public, exist_ok=True), f"push to {name}", say)
    operations = [CommitOperationAdd(each.name, str(each.path)) for each in plan.uploads]
    done = on_hub(
        lambda: hub.create_commit(name, operations, commit_message=message, num_threads=2), f"push to {name}", say
    )
    return f"{done.commit_url}"


def _names_of_export(folder: Path) -> list[str]:
    from eclectus.models.checkpoints.side_files import checkpoint_files

    found = {str(path) for path in checkpoint_files(folder)}
    found |= {path.name for pattern in _OF_EXPORTS for path in folder.glob(pattern)}
    return sorted(found)


def _exported_from(home: Home, folder: Path) -> Artifact | None:
    """The artifact that an export was made of, if this home has it."""
    from eclectus.models.checkpoints.seal import read_seal

    sealed = read_seal(folder)
    try:
        return home.store.find(sealed[0]) if sealed and sealed[0] else None
    except EclectusError:
        return None


def _card(folder: Path, artifact: Artifact | None, repository: str, origin: Origin, digests: dict[str, str]) -> str:
    """The export's own card, or one from lineage, for this repository; with the digests."""
    own = folder / CARD
    if artifact is None and own.is_file():
        text = own.read_text("utf-8")
    else:
        made = read_object(folder / "upcycle.json") if (folder / "upcycle.json").is_file() else {}
        text = model_card(repository.split("/")[1], read_object(folder / "config.json"), made, origin)
        if kind_of(folder) == "lory":
            text = text.replace("from transformers import", _LORY, 1)
    text = text.replace('from_pretrained(".', f'from_pretrained("{repository}')
    rows = "".join(f"| `{name}` | `{digest}` |\n" for name, digest in digests.items())
    whole = (
        f"Artifact `{artifact.kind}-{artifact.digest}`: `eclectus pull {repository}` makes it again.\n\n"
        if artifact
        else ""
    )
    return f"{text.rstrip()}\n\n## Digests\n\n{whole}| file | SHA-256 |\n|---|---|\n{rows}"


def _add_lineage(plan: Push, home: Home, artifact: Artifact | None, scratch: Path) -> None:
    """Adds the bundle of the run that made the checkpoint."""
    row: tuple[Any, ...] | None = None
    if artifact is not None and home.journal.is_dir():
        with connect(home) as lineage:
            row = lineage.execute(_MADE_BY, {"artifact": artifact.digest}).fetchone()
    if row is None:
        plan.notes.append("no lineage: this home does not know how the checkpoint was made")
        return
    path = scratch / BUNDLE_THERE
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.uploads.append(Upload(BUNDLE_THERE, bundle(home, row[0], path)))


def _write(plan: Push, scratch: Path, name: str, text: str) -> None:
    path = scratch / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    plan.uploads = [each for each in plan.uploads if each.name != name] + [Upload(name, path)]
