"""Labels of all documents, part by part: what earlier runs and artifacts say of them, and what is detected anew."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents import language_detection
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.intake.tables import RowGroups
from eclectus.tasks.documents.labelling.settings import LanguageSettings
from eclectus.tasks.documents.table import codes_of, first_rows, ids_of, parts, read_part_table
from eclectus.tasks.over_parts import Done, Part, find, key_of, over_parts
from eclectus.tasks.ray_cluster import workers_see_files
from eclectus.tasks.reuse import earlier, is_whole

SECONDS_PER_DOCUMENT = 1.7e-4
MOST_LANGUAGES = 50
GROUPS = ("expanded", "original", "other")
SECOND = "second_languages.parquet"
SECOND_SCHEMA = pa.schema([("document", pa.string()), ("language", pa.string()), ("second", pa.string())])
KNOWN = {"rows": np.int64, "language": np.int64, "confidence": np.float32, "second": np.int64}


class Labels:
    """Of each document: `language` int32 [N] (index into `names`), `confidence` float32 [N], `second` int32 [N], the
    language that a sample of it is in besides (-1: none)."""

    def __init__(self, count: int) -> None:
        self.language = np.full(count, -1, np.int32)
        self.confidence = np.zeros(count, np.float32)
        self.second = np.full(count, -1, np.int32)
        self.names: list[str] = []
        self.number_of: dict[str, int] = {}

    def set(self, begin: int, part: Done) -> None:
        """Sets the labels of the documents of a part, which begin at this row."""
        numbers = np.array([*(self.number(name) for name in part.about["names"]), -1], np.int32)
        codes = np.load(part.file("languages.npy"), allow_pickle=False)
        rows = slice(begin, begin + len(codes))
        self.language[rows], self.second[rows] = numbers[codes[:, 0]], numbers[codes[:, 1]]
        self.confidence[rows] = np.load(part.file("confidence.npy"), allow_pickle=False)

    def number(self, language: str) -> int:
        if language not in self.number_of:
            self.number_of[language] = len(self.names)
            self.names.append(language)
        return self.number_of[language]

    def groups(self, settings: LanguageSettings) -> np.ndarray:
        """The group of each document, an index into GROUPS: int8 [N]."""
        of_language = np.array([*(GROUPS.index(settings.group_of(name)) for name in self.names), 0], np.int8)
        confident = self.confidence >= np.float32(settings.language_confidence)
        return np.where(confident, of_language[self.language], GROUPS.index("other")).astype(np.int8)

    def columns(self, groups: np.ndarray, begin: int, end: int) -> dict[str, pa.Array]:
        """The labels of the documents [begin, end), as columns."""
        codes = {"language": (self.language, self.names), "group": (groups, GROUPS)}
        columns = {
            name: pa.array(list(names), pa.string()).take(pa.array(numbers[begin:end]))
            for name, (numbers, names) in codes.items()
        }
        return columns | {"language_confidence": pa.array(self.confidence[begin:end])}

    def statistics(self, groups: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
        """Documents, bytes and confidence by language and group, the largest languages first.

        groups [N]. sizes: bytes of the documents [N].
        """
        kept, count = groups != GROUPS.index("other"), len(self.names)
        in_group = np.bincount(groups, minlength=len(GROUPS)).tolist()
        documents = np.bincount(self.language[kept], minlength=count)
        excluded = np.bincount(self.language[~kept], minlength=count)
        size = np.bincount(self.language[kept], sizes[kept], count)
        confidence = np.bincount(self.language[kept], self.confidence[kept], count)
        return {
            "groups": {name: n for name, n in zip(GROUPS, in_group, strict=True) if n},
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


def detector_name(settings: LanguageSettings, model: str) -> str:
    """model: digest of the user's."""
    return " ".join(filter(None, [settings.language_detector, str(language_detection.DETECTION_VERSION), model]))


def detected(documents: Artifact, settings: LanguageSettings, model: str) -> tuple[Labels, int]:
    """The labels of all documents, and how many of them were known."""
    begins, digests = first_rows(documents), documents.digests()
    name, paths = detector_name(settings, model), parts(documents)
    keys = [key_of("languages", name, digests[f"documents/{path.name}"]) for path in paths]
    missing = [number for number, key in enumerate(keys) if find(key) is None]
    known = _known(name, [paths[number] for number in missing])
    counts = np.diff(begins).tolist()
    work = []
    for number, (path, key) in enumerate(zip(paths, keys, strict=True)):
        arguments = {
            "documents": path, "detector": settings.language_detector, "model": settings.language_model,
            "digest": model.removeprefix("file-"), "known": known.get(path, {}),
        }  # fmt: skip
        work.append(Part(key, arguments, counts[number], f"languages of {path.name}"))
    workers = settings.language_workers or settings.curation_workers
    if settings.language_model and not workers_see_files():
        workers = 1
    done = over_parts(label_part, work, "detecting languages", "documents", SECONDS_PER_DOCUMENT, workers)
    labels = Labels(int(begins[-1]))
    for begin, each in zip(begins.tolist(), done, strict=False):
        labels.set(begin, each)
    read = sum(each.about["read"] for number, each in enumerate(done) if number in set(missing))
    return labels, len(labels.language) - read


def label_part(
    out: Path, documents: Path, detector: str, model: str, digest: str, known: dict[str, Any]
) -> dict[str, Any]:
    """Detects the languages of one part of the documents, except those of `_known`.

    Writes languages.npy int32 [n, 2], numbers of the language and of a second one (-1: none) in the `names` that it
    returns, and confidence.npy float32 [n].
    """
    numbers = {"": -1}
    codes, confidence = list[tuple[int, int]](), list[float]()
    old = _rows_of(known)
    read = row = 0
    with pq.ParquetFile(documents) as file:
        for group in range(file.num_row_groups):
            for text in file.read_row_group(group, columns=["text"])["text"].to_pylist():
                found = old.get(row)
                if found is None:
                    samples = language_detection.samples_of(text or "")
                    found = language_detection.detect_in_samples(samples, detector, model, digest)
                    read += 1
                row += 1
                codes.append(
                    (
                        numbers.setdefault(found[0], len(numbers) - 1),
                        numbers.setdefault(found[2], len(numbers) - 1),
                    )
                )
                confidence.append(found[1])
    np.save(out / "languages.npy", np.array(codes, np.int32).reshape(-1, 2))
    np.save(out / "confidence.npy", np.array(confidence, np.float32))
    return {"names": list(numbers)[1:], "read": read}


def _rows_of(known: dict[str, Any]) -> dict[int, tuple[str, float, str]]:
    """Row -> language, confidence, second language of the documents in `known`."""
    if not known:
        return {}
    names = [*known["names"], ""]
    columns = [np.frombuffer(known[name], kind).tolist() for name, kind in KNOWN.items()]
    return {
        row: (names[language], confidence, names[second])
        for row, language, confidence, second in zip(*columns, strict=True)
    }


def _known(detector: str, missing: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """What earlier artifacts say of documents in these parts, after verifying the artifacts' hashes.

    By part: `names`, and the columns of `KNOWN` as bytes; language and second are numbers in `names` (-1: none).
    """
    artifacts = earlier("documents", judged_by=detector) if missing else iter(())
    first = next(artifacts, None)
    if first is None:
        return {}
    ids = [ids_of(read_part_table(path, ["document"])["document"]) for path in missing]
    wanted = np.concatenate(ids)
    order = np.argsort(wanted, kind="stable")
    labels = Labels(len(wanted))
    for artifact in itertools.chain([first], artifacts):
        left = order[labels.language[order] < 0]
        with contextlib.suppress(EclectusError, OSError, pa.ArrowException):
            _take_labels(artifact, wanted[left], left, labels)
    known, begin = dict[Path, dict[str, Any]](), 0
    for path, of_part in zip(missing, ids, strict=True):
        here = slice(begin, begin + len(of_part))
        rows = np.flatnonzero(labels.language[here] >= 0)
        columns = (rows, labels.language[here][rows], labels.confidence[here][rows], labels.second[here][rows])
        known[path] = {"names": labels.names}
        for (name, kind), column in zip(KNOWN.items(), columns, strict=True):
            known[path][name] = np.asarray(column, kind).tobytes()
        begin += len(of_part)
    return known


def _take_labels(artifact: Artifact, wanted: np.ndarray, places: np.ndarray, labels: Labels) -> None:
    """Sets the labels of documents that an artifact has as well. wanted: their ids, sorted [n]. places: rows [n]."""
    verified = False
    for path in parts(artifact):
        position = positions_of(ids_of(read_part_table(path, ["document"])["document"]), wanted, ascending=True)
        hit = np.flatnonzero(position >= 0)
        if not len(hit):
            continue
        if not verified and not is_whole(artifact):
            return
        verified = True
        table = read_part_table(path, ["language", "language_confidence"], ["language"])
        codes, names = codes_of(table["language"])
        numbers = np.array([labels.number(name) for name in names], np.int32)
        rows = places[position[hit]]
        labels.language[rows] = numbers[codes[hit]]
        labels.confidence[rows] = table["language_confidence"].to_numpy()[hit]
    if verified:
        table = pq.read_table(artifact.file(SECOND), read_dictionary=["second"])
        position = positions_of(ids_of(table["document"]), wanted, ascending=True)
        codes, names = codes_of(table["second"])
        numbers = np.array([labels.number(name) for name in names], np.int32)
        labels.second[places[position[position >= 0]]] = numbers[codes[position >= 0]]


def write_second(documents: Artifact, labels: Labels, out: Draft) -> dict[str, Any]:
    """Writes which documents hold a second language; returns how many, and the most frequent pairs."""
    table, pairs, begin = RowGroups(out.file(SECOND), SECOND_SCHEMA), Counter[tuple[str, str]](), 0
    names = pa.array(labels.names, pa.string())
    for path in parts(documents):
        ids = read_part_table(path, ["document"])["document"]
        second = labels.second[begin : begin + len(ids)]
        rows = np.flatnonzero(second >= 0)
        first = labels.language[begin : begin + len(ids)][rows]
        columns = [ids.take(pa.array(rows)), names.take(pa.array(first)), names.take(pa.array(second[rows]))]
        table.write(pa.table(columns, schema=SECOND_SCHEMA))
        codes, counts = np.unique(np.column_stack([first, second[rows]]), axis=0, return_counts=True)
        for (one, other), count in zip(codes.tolist(), counts.tolist(), strict=True):
            pairs[labels.names[one], labels.names[other]] += count
        begin += len(ids)
    table.close()
    return {
        "documents": table.count,
        "share": round(table.count / max(1, begin), 4),
        "pairs": [[*pair, count] for pair, count in pairs.most_common(MOST_LANGUAGES)],
    }
