"""Settings of `ingest`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from eclectus.tasks.documents.conversations import ConversationSettings
from eclectus.tasks.documents.folders import readable
from eclectus.tasks.documents.sources import Found, find_sources, split_entries
from eclectus.tasks.settings import BASIC, CurationWorkerSettings, RuntimeSetting

SLICES_PER_PART = 8


class IngestSettings(ConversationSettings, CurationWorkerSettings):
    """Which documents are read, and from which fields."""

    sources: list[str] = RuntimeSetting(
        [],
        "Files, folders (read recursively), globs, or dataset:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]; JSON, Parquet, "
        "CSV with named columns or text, also compressed (.gz, .zst, .bz2, .xz).",
        basic=True,
    )
    text_field: str = Field(
        "text", description="Field or column that holds a document's text.", json_schema_extra=BASIC
    )
    id_field: str = Field("id", description="Field that holds a document's own name, kept for tracing; may be absent.")
    language_field: str = Field("language", description="Field that holds a document's language; may be absent.")
    domain_field: str = Field("domain", description="Field that holds a document's domain; may be absent.")
    source_field: str = Field("source", description="Field that gives a document's source; else the file's name.")
    work_field: str = Field(
        "work",
        description="Field that names the work (book, page, file) of which a document is a piece; pieces of one work "
        "are held out together. If absent, the id up to a final # and number; else each document is a work.",
    )
    text_suffixes: list[str] = Field(
        [".txt", ".md", ".rst"], description="Suffixes of files that are one document each, as plain text."
    )
    minimum_characters: int = Field(1, ge=1, description="Shorter documents are rejected (characters, ends stripped).")
    maximum_characters: int = Field(5_000_000, ge=1, description="Longer documents are rejected (characters).")
    documents_limit: int = Field(
        0, ge=0, description="At most this many documents of each source; 0 takes all.", json_schema_extra=BASIC
    )
    part_megabytes: float = Field(
        64, gt=0, description="Text in each part of the documents, about, in MB; later steps work part by part."
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _take_text(cls, value: Any) -> Any:
        """One text is a list separated by commas, as on the command line."""
        entries = split_entries(value) if isinstance(value, str) else value
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, str) and not entry.isascii() and readable(entry) != entry:
                raise ValueError("a name that is not UTF-8 cannot be written down; give its folder or a glob")
        return entries

    @property
    def part_bytes(self) -> int:
        return max(1, int(self.part_megabytes * 1e6))

    @property
    def slice_bytes(self) -> int:
        """What is read at once: an eighth of a part, so that little is read again where a source has grown."""
        return -(-self.part_bytes // SLICES_PER_PART)

    def check_together(self) -> None:
        super().check_together()
        check_sources(self)


def check_sources(settings: IngestSettings) -> Found:
    """The files and data sets that the settings name. Raises EclectusError with the fix, before any long work."""
    return find_sources(settings.sources, settings.text_suffixes)
