"""Decisions of users about artifacts: adopting one as a step's result, and tagging one with a name.

Both are journaled with who, when and why, and both keep the artifact from `gc`.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal, now
from eclectus.storage.lineage.champions import user_name
from eclectus.storage.step_keys import Adoption, KnownKeys
from eclectus.tasks.plan import Plan, PlannedStep
from eclectus.tasks.step import describe


def adopt(home: Home, plan: Plan, label: str, named: str, reason: str, by: str | None = None) -> Adoption:
    """Accepts an artifact as the result of a step of a planned flow.

    label: of the step, or its function's name where only one step has it. named: the artifact, or the folder of a
    checkpoint, which is copied into the home. Raises EclectusError for a step that the flow does not have, that has its
    artifact already or whose inputs are not made yet, and for an artifact of another kind or with changed bytes.
    """
    planned = _planned(plan, label)
    keys = KnownKeys(home.keys, home.store)
    if planned.action == "reuse" and keys.adopted(planned.record.key) is None:
        raise EclectusError(f"step '{planned.label}' has its artifact already ({planned.why}); nothing to adopt")
    if not planned.known:
        raise EclectusError(
            f"step '{planned.label}' cannot adopt yet: {planned.why}, and what it makes decides the step's key; run or "
            "adopt that first"
        )
    artifact = _artifact(home, named, planned)
    adoption = Adoption(
        planned.record.key, f"{artifact.kind}-{artifact.digest}", planned.label, _by(by), _reason(reason), now()
    )
    keys.adopt(adoption)
    columns = {"key": adoption.key, "name": planned.name, "label": adoption.label, "inputs": planned.record.inputs}
    _note(home, "adopted", artifact, adoption.by, adoption.reason, **columns, settings=planned.record.settings)
    return adoption


def unadopt(home: Home, named: str, label: str | None = None, by: str | None = None) -> list[Adoption]:
    """Takes back the adoptions of an artifact; those of one step where a label is given.

    Raises EclectusError where there is none.
    """
    keys, artifact = KnownKeys(home.keys, home.store), home.store.find(named)
    name = f"{artifact.kind}-{artifact.digest}"
    found = [each for each in keys.adoptions() if each.artifact == name and label in (None, each.label)]
    if not found:
        what = f"as step '{label}'" if label else "by any step"
        raise EclectusError(f"{artifact.name} is not adopted {what}; see: eclectus sql 'from adoptions'")
    for each in found:
        keys.unadopt(each.key)
        _note(home, "unadopted", artifact, _by(by), each.reason, key=each.key, label=each.label)
    return found


def tag(home: Home, named: str, name: str, reason: str = "", by: str | None = None) -> tuple[str, Artifact]:
    """Names an artifact: (the tag with its version, the artifact). name: `greek@2`, or `greek` for the next version."""
    artifact = home.store.find_whole(named)
    tagged = home.store.tags.add(name, f"{artifact.kind}-{artifact.digest}")
    _note(home, "tagged", artifact, _by(by), reason, name=tagged)
    return tagged, artifact


def untag(home: Home, name: str, by: str | None = None) -> str:
    """Removes a tag; returns the name of the artifact, which stays."""
    kind, _, digest = home.store.tags.remove(name).partition("-")
    artifact = Artifact(kind, digest, str(home.store.place(kind, digest)))
    _note(home, "untagged", artifact, _by(by), "", name=name)
    return artifact.name


def _planned(plan: Plan, label: str) -> PlannedStep:
    found = [each for each in plan.steps if each.label == label] or [each for each in plan.steps if each.name == label]
    if len({each.record.key for each in found}) == 1:
        return found[0]
    labels = ", ".join(each.label for each in plan.steps)
    if found:
        raise EclectusError(f"'{label}' is several steps: {', '.join(each.label for each in found)}; name one of them")
    more = f", and what follows step '{plan.unknown_after}' is not known yet" if plan.unknown_after else ""
    raise EclectusError(f"this flow has no step '{label}'; its steps are {labels}{more}")


def _artifact(home: Home, named: str, planned: PlannedStep) -> Artifact:
    """The artifact that a user names, whole and of the kind that the step makes."""
    from eclectus.storage.artifact import MANIFEST

    path = Path(named)
    if planned.makes == "checkpoint" and path.is_dir() and not (path / MANIFEST).exists():
        return _copied(home, named)
    artifact = home.store.find_whole(named)
    if artifact.kind != planned.makes:
        raise EclectusError(
            f"'{named}' is {artifact.name}, but step '{planned.label}' makes an artifact of kind {planned.makes}"
        )
    if Path(artifact.path) != home.store.place(artifact.kind, artifact.digest):
        raise EclectusError(f"{artifact.name} lies in another home, {artifact.path}; copy it into this one first")
    return artifact


def _copied(home: Home, folder: str) -> Artifact:
    """A checkpoint's folder as an artifact: checked as a base model is, and copied."""
    from eclectus.tasks.training.fetch_model import FetchSettings, fetch

    with home.store.draft("checkpoint") as draft:
        fetch.function(FetchSettings(base_model=folder), draft)
        draft.statistics["made_outside"] = True
        return home.store.commit(draft)


def _note(home: Home, event: str, artifact: Artifact, by: str, reason: str, **columns: Any) -> None:
    with Journal(home.journal, f"{event}-{uuid.uuid4().hex[:8]}", home.mirror) as journal:
        try:
            output = describe(artifact)
        except EclectusError:
            # A tag of an artifact that was deleted can still be removed.
            output = {"kind": artifact.kind, "artifact": artifact.digest, "path": artifact.path}
        journal.event(event, output=output, by=by, reason=reason, **columns)


def _by(given: str | None) -> str:
    return (given or user_name()).strip()


def _reason(given: str) -> str:
    if not given.strip():
        raise EclectusError("an adoption needs a reason, which lineage and `why` show; give one with --reason")
    return given.strip()
