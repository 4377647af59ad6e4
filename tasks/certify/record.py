"""What a certification leaves behind: a step in the lineage, and a table in the export's model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.tasks.certify.certify import Certification, as_statistics
from eclectus.tasks.export.model_card import CARD, served_section
from eclectus.tasks.run import metric
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

RESULT = "certification.json"
_SECTION = re.compile(r"## Served by\n.*?(?=\n## |\Z)", re.DOTALL)


class CertifyParameters(Settings):
    """What is certified, and by which servers."""

    checkpoint: str = Field(description="Export's folder, or artifact's name.")
    servers: list[str] = Field([], description="Names of the servers.")
    tolerance: float = Field(0.0, description="Largest allowed difference of a log-probability in float32.")
    against: str | None = Field(None, description="Checkpoint to compare with.")


class CertificationSettings(Settings):
    """What was certified, and what was found."""

    certified_name: str = Field("", description="Checkpoint that was certified: an artifact's name, or a folder's.")
    certified_weights: str = Field("", description="SHA-256 of the certified export's files.")
    certified_at: str = Field("", description="When it was certified.")
    certified_result: dict[str, Any] = Field({}, description="What was found, as in the statistics.")


@step(makes="evaluation", version=1)
def certify(settings: CertificationSettings, out: Draft, checkpoint: Artifact | None = None) -> None:
    """Stores a certification: by server and type, differences from the training model and what is beyond tolerance."""
    out.statistics = dict(settings.certified_result)
    for each in settings.certified_result.get("servers", []):
        tags = {"server": each["server"], "dtype": each["dtype"], "version": each["version"]}
        for name in ("max_difference", "mean_difference", "equal_texts", "texts", "seconds"):
            metric(f"certify_{name}", each[name], **tags)
        metric("certified", each["certified"], **tags)
    out.file(RESULT).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")


def table(found: Certification) -> str:
    """The certification as a section of a model card."""
    return served_section(as_statistics(found))


def write_into_card(folder: Path, found: Certification) -> Path | None:
    """Puts the table into the model card of an export, in place of an earlier one; None if the card is not writable."""
    card = folder / CARD
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.resolve().name}\n"
        section = table(found).rstrip() + "\n"
        text = _SECTION.sub(lambda _: section, text) if _SECTION.search(text) else f"{text.rstrip()}\n\n{section}"
        card.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return card
