"""Pull: a model of a hub as an artifact of the home. What `push` wrote becomes the same artifact, with its lineage.

Only safetensors and the text files of a checkpoint are downloaded (models/checkpoints/side_files.py): no pickle is
opened. Every file is checked against the manifest of the artifact; code that Lory's checkpoints carry is a part of it,
and is run only where it is this version's. The lineage bundle is read as
tables, by a DuckDB that can open nothing else; runs that the home has already stay as they are.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import Draft, content_digest, hash_file, seal
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.imported import import_bundle
from eclectus.storage.mirror import is_below
from eclectus.tasks.hub.hub import BUNDLE_THERE, MANIFEST_THERE, OURS, api, check_repository, endpoint, on_hub
from eclectus.tasks.run import current_run, notify, progress
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.fetch_model import listing

MOMENTS_INDEX = "moments.safetensors.index.json"
LARGEST_MANIFEST = 10_000_000
# Of these it is not said that they were left out.
_NOT_MISSED = ("README.md", ".git", f"{OURS}/", "export.json")


class PullSettings(Settings):
    """What is pulled. The commit makes it one thing for all time."""

    hub_repository: str = Field("", description="OWNER/NAME.")
    hub_commit: str = Field("", description="Commit of the repository.")


def fingerprint(settings: PullSettings) -> dict[str, str]:
    return {settings.hub_repository: f"commit-{settings.hub_commit}"}


def is_part(name: str) -> bool:
    """Whether a file may be a part of an artifact that is pulled: as `is_taken`, or code that our checkpoints carry.

    That code is run where it is this version's, byte for byte, and only there (models/checkpoints/own_code.py).
    """
    from eclectus.models.checkpoints.own_code import CARRIED

    return is_taken(name) or name in {path.name for path in CARRIED}


def is_taken(name: str) -> bool:
    """Whether a file of any repository is a part of a checkpoint: safetensors, or a text file that is known."""
    files = listing()
    allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in (*files.WANTED, MOMENTS_INDEX))
    refused = any(fnmatch.fnmatchcase(name, pattern) for pattern in files.UNWANTED)
    return is_below(name) and allowed and not refused


def resolve(name: str, say: Callable[[str], None]) -> tuple[PullSettings, list[str]]:
    """(settings, names of all files) of OWNER/NAME or OWNER/NAME@REVISION. Raises EclectusError."""
    repository, _, revision = name.partition("@")
    check_repository(repository)
    found = on_hub(lambda: api().model_info(repository, revision=revision or None), f"pull {name}", say)
    names = [each.rfilename for each in found.siblings or []]
    return PullSettings(hub_repository=repository, hub_commit=found.sha or ""), names


@step(makes="checkpoint", version=1, fingerprint=fingerprint)
def pull(settings: PullSettings, out: Draft) -> None:
    """Downloads a checkpoint and checks every byte that its manifest names."""
    name = f"{settings.hub_repository}@{settings.hub_commit}"
    _, there = resolve(name, lambda text: notify("hub", text))
    manifest = _manifest(settings, there) if MANIFEST_THERE in there else None
    wanted = [file["name"] for file in manifest["files"]] if manifest else [each for each in there if is_taken(each)]
    if missing := sorted({*wanted} - {*there}):
        raise EclectusError(f"{name} lacks {missing[0]}, which its manifest names; push it again")
    if "config.json" not in wanted or not any(each.endswith(".safetensors") for each in wanted):
        raise EclectusError(
            f"{name} is no checkpoint that can be pulled: it needs config.json and safetensors, and has "
            f"{', '.join(there[:5]) or 'no files'}; pickled weights are never opened"
        )
    told = progress(len(wanted), "downloading", "files")
    for number, each in enumerate(wanted, 1):
        _download(settings, each, out.path)
        told(number)
    shutil.rmtree(out.path / ".cache", ignore_errors=True)
    if manifest is not None:
        _check(name, manifest, out.path)
        out.rows, out.statistics = manifest["rows"], dict(manifest["statistics"])
    else:
        _check_model(name, out.path)
        left = sorted(each for each in there if each not in wanted and not each.startswith(_NOT_MISSED))
        out.statistics = {"left_out": left}
        if left:
            notify("left out", f"left out: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}")
    out.statistics["pulled_from"] = name


def take_lineage(home: Home, settings: PullSettings, there: list[str]) -> str:
    """Adds the lineage of a pulled checkpoint to the home's; says what was added."""
    if BUNDLE_THERE not in there:
        return "the repository has no lineage"
    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        file = _download(settings, BUNDLE_THERE, Path(scratch))
        try:
            runs = import_bundle(home, file)
        except EclectusError as error:
            return f"its lineage was left out: {error}"
    return f"its lineage was added: {', '.join(runs)}" if runs else "its lineage is known here"


def _manifest(settings: PullSettings, there: list[str]) -> dict[str, Any]:
    """The manifest of the artifact that was pushed. Raises EclectusError for one that is not true of itself."""
    name = settings.hub_repository
    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        file = _download(settings, MANIFEST_THERE, Path(scratch))
        try:
            if file.stat().st_size > LARGEST_MANIFEST:
                raise ValueError(f"it has {file.stat().st_size} bytes")
            manifest = json.loads(file.read_text("utf-8"))
            unsealed = {key: value for key, value in manifest.items() if key != "seal"}
            if manifest["kind"] != "checkpoint" or manifest["seal"] != seal(unsealed):
                raise ValueError("it was changed, or is of something else")
            if content_digest("checkpoint", manifest["files"]) != manifest["digest"]:
                raise ValueError("its digest is not that of its files")
            strange = [each["name"] for each in manifest["files"] if not is_part(each["name"])]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EclectusError(f"{MANIFEST_THERE} of {name} cannot be used ({error}); push it again") from error
    if strange:
        raise EclectusError(
            f"{name} names {strange[0]!r} as a part of its checkpoint; only safetensors and the text files of a "
            "checkpoint are pulled"
        )
    return manifest


def _download(settings: PullSettings, name: str, folder: Path) -> Path:
    """Downloads a file to its place below a folder."""
    from huggingface_hub import hf_hub_download

    say: Callable[[str], None] = (lambda text: notify("hub", text)) if current_run() else (lambda text: None)
    what = f"pull {settings.hub_repository}: {name}"
    return Path(
        on_hub(
            lambda: hf_hub_download(
                settings.hub_repository, name, revision=settings.hub_commit, local_dir=folder, endpoint=endpoint()
            ),
            what,
            say,
        )
    )


def _check(name: str, manifest: dict[str, Any], folder: Path) -> None:
    for file in manifest["files"]:
        path = folder / file["name"]
        if path.stat().st_size != file["bytes"] or hash_file(path) != file["sha256"]:
            raise EclectusError(
                f"{file['name']} of {name} is not what was pushed (its SHA-256 differs); nothing was kept"
            )


def _check_model(name: str, folder: Path) -> None:
    """What was not pushed by Eclectus passes the door, as a base model does."""
    from eclectus.models.checkpoints.door import check_checkpoint

    try:
        check_checkpoint(folder)
    except ValueError as error:
        raise EclectusError(f"{name}: {error}") from error
