"""Languages: the language of each document, how confident the detector is, and the group that the document belongs to.

Groups: `original`, `expanded`, and `other` for further languages and for documents below the confidence. Nothing is
dropped. `second_languages.parquet` lists the documents of which a sample is in another language.

A part of the documents keeps the labels that an earlier run gave it; in other parts those documents do that the same
detector classified in an earlier artifact, so only what is new is read. Price: that of detection, part by part
(tasks/documents/language_detection.py). Memory: 12 bytes per document, and the text of a row group.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.labelling.fasttext_model import model_digest
from eclectus.tasks.documents.labelling.labels import MOST_LANGUAGES, Labels, detected, detector_name, write_second
from eclectus.tasks.documents.labelling.settings import LanguageSettings
from eclectus.tasks.documents.language_codes import UNDETERMINED, members_of, normalise, shortened
from eclectus.tasks.documents.table import parts, read_codes, read_part_table, relabel
from eclectus.tasks.run import metric, notify
from eclectus.tasks.step import step

__all__ = ["LanguageSettings", "fingerprint", "languages"]

SHOWN = 5
MUCH = 0.01
"""Share of documents with a second language that is reported."""


def fingerprint(settings: LanguageSettings) -> dict[str, str]:
    """The digest of the model that a user brings."""
    if settings.language_detector != "fasttext":
        return {}
    return {"language_model": f"file-{model_digest(settings.language_model)}"}


@step(makes="documents", version=4, fingerprint=fingerprint)
def languages(documents: Artifact, settings: LanguageSettings, out: Draft) -> None:
    """Fills language, language_confidence and group. Raises EclectusError when a wanted language has no documents."""
    settings.check_together()
    fields, read = _Fields(documents), fingerprint(settings)
    if settings.language_detector == "field":
        labels, reused = fields.labels(), 0
    else:
        labels, reused = detected(documents, settings, read.get("language_model", ""))
    groups = labels.groups(settings)
    relabel(documents, lambda _, begin, end: labels.columns(groups, begin, end), out)
    statistics = labels.statistics(groups, _sizes(documents)) | fields.statistics(labels)
    if settings.language_detector == "field":
        fields.report(statistics)
    else:
        statistics["second_languages"] = write_second(documents, labels, out)
        _report_second(statistics["second_languages"])
    _check_all_found(settings, statistics)
    detector = detector_name(settings, read.get("language_model", ""))
    out.statistics = {**statistics, "reused": reused, "judged_by": detector}
    if read:
        out.read = fingerprint(settings)
    for language in (*settings.original_languages, *settings.expanded_languages):
        metric("language_documents", statistics["languages"][language]["documents"], language=language)


def _report_second(second: dict[str, Any]) -> None:
    metric("second_language_documents", second["documents"])
    if second["share"] >= MUCH:
        pairs = _some([f"{one} with {other} ({count:,})" for one, other, count in second["pairs"]])
        notify("second-languages", f"{second['share']:.1%} of the documents hold a second language: {pairs}")


def _sizes(documents: Artifact) -> np.ndarray:
    """Bytes of all documents, int64 [N]."""
    sizes = [read_part_table(path, ["bytes"])["bytes"].to_numpy() for path in parts(documents)]
    return np.concatenate([np.empty(0, np.int64), *sizes])


class _Fields:
    """The records' own language fields: `codes` int64 [N], indices into `names`; `languages`, what each name means."""

    def __init__(self, documents: Artifact) -> None:
        self.codes, self.names = read_codes(documents, "language")
        self.languages = [normalise(name) for name in self.names]

    def labels(self) -> Labels:
        """What the fields say of each document."""
        labels = Labels(len(self.codes))
        known = [code or UNDETERMINED for code in self.languages]
        # In the order of the documents, like those that a detector finds.
        used, begins = np.unique(self.codes, return_index=True)
        for code in used[np.argsort(begins)].tolist():
            labels.number(known[code])
        numbers = np.array([labels.number_of.get(name, -1) for name in known], np.int32)
        stated = np.array([name != UNDETERMINED for name in known], np.float32)
        if len(self.codes):
            labels.language[:], labels.confidence[:] = numbers[self.codes], stated[self.codes]
        return labels

    def statistics(self, labels: Labels) -> dict[str, Any]:
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
