"""Parallel text: every language has the same paragraphs of the same pages; what is English in truth is left out."""

import json

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.tasks.corpus.parallel_pages import plain, read_pages, roff_blocks
from eclectus.tasks.corpus.parallel_text import ParallelSettings, describe, write_parallel_text
from tests.support.parallel_packages import NOTE, NOUNS, texts, write_help, write_man, write_reference

LANGUAGES = ("en", "el", "tr")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    summary = write_parallel_text(write_help(folder / "root"), folder / "out", ParallelSettings())
    return summary, folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_every_language_has_the_translated_paragraphs_of_the_same_pages(written):
    _, folder = written
    for language in LANGUAGES:
        found = rows(folder, f"parallel_text_{language}")
        assert [row["page"] for row in found] == [f"libreoffice-help swriter/swriter/page{n}" for n in range(8)]
        for page, row in enumerate(found):
            assert row["text"] == "\n\n".join(texts(language, page))
            assert row["english_characters"] == len("\n\n".join(texts("en", page)))


def test_notes_of_many_pages_code_and_untranslated_paragraphs_are_in_no_file(written):
    _, folder = written
    for path in (folder / "out").iterdir():
        text = path.read_text("utf-8")
        assert "Press the key twice" not in text and "Dim x" not in text
        assert not any(note in text for note in NOTE.values())


def test_a_language_that_is_english_in_truth_is_dropped_by_name(written):
    summary, folder = written
    assert summary.languages == list(LANGUAGES) and summary.dropped == ["hi"]
    assert summary.translated == {"el": 1.0, "hi": 0.0, "tr": 1.0}
    assert "Hindi: 0% of the English pages are translated; dropped" in describe(summary)
    assert not list((folder / "out").glob("*_hi.jsonl"))


def test_items_are_the_same_in_every_language_and_only_one_choice_goes_on(written):
    _, folder = written
    by_language = {language: rows(folder, f"page_choice_{language}") for language in LANGUAGES}
    assert len(by_language["en"]) == 8 and {row["label"] for row in by_language["en"]} > {0}
    for number in range(8):
        items = {language: each[number] for language, each in by_language.items()}
        assert len({(row["page"], row["label"]) for row in items.values()}) == 1
        for language, row in items.items():
            paragraphs = {page: texts(language, page) for page in range(8)}
            page = int(row["page"][-1])
            own, cut = paragraphs.pop(page), row["context"].count("\n\n") + 1
            assert row["context"] == "\n\n".join(own[:cut]) and len(set(row["choices"])) == 4
            assert row["choices"][row["label"]] == own[cut]
            wrong = [each for n, each in enumerate(row["choices"]) if n != row["label"]]
            assert all(any(each in other for other in paragraphs.values()) for each in wrong)


def test_the_same_packages_give_the_same_bytes_and_pages_can_be_limited(written, tmp_path):
    _, folder = written
    write_parallel_text(folder / "root", tmp_path / "again", ParallelSettings())
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes()
    few = ParallelSettings(parallel_pages=4, parallel_languages=["tr"])
    summary = write_parallel_text(folder / "root", tmp_path / "few", few)
    assert (summary.pages, summary.languages) == (4, ["en", "tr"])


def test_pages_without_ids_are_aligned_by_the_number_of_their_paragraphs(tmp_path):
    for language in ("en", "el"):
        write_man(tmp_path, "same", language, texts(language, 0))
        write_man(tmp_path, "other", language, texts(language, 1)[: 4 if language == "en" else 3])
        write_reference(tmp_path, language, texts(language, 2))
    found = {(page.book, page.name, page.language): page.paragraphs for page in read_pages(tmp_path)}
    assert len(found) == 6
    assert list(found["man man1", "same.1", "en"].values()) == texts("en", 0)
    assert found["man man1", "same.1", "el"].keys() == found["man man1", "same.1", "en"].keys()
    assert not found["man man1", "other.1", "el"].keys() & found["man man1", "other.1", "en"].keys()
    assert list(found["debian-reference", "ch01_shell", "el"].values()) == texts("el", 2)
    summary = write_parallel_text(tmp_path, tmp_path / "out", ParallelSettings())
    assert summary.pages == 2


def test_two_translations_into_one_language_are_read_once(tmp_path):
    write_help(tmp_path, ("en-US", "en-GB", "el"), ())
    pages = list(read_pages(tmp_path))
    assert len(pages) == 2 * len(NOUNS["en"])


def test_roff_becomes_plain_text():
    source = "\n".join([
        ".SH NAME", "ls \\- list", ".PP", "Use \\fB\\-\\-all\\fP or", ".BR ls (1)", "now.", ".TS", "table", ".TE",
        ".PP", 'It\\(aqs \\[lq]done\\[rq] \\s-1SMALL\\s0\\&.',
    ])  # fmt: skip
    assert list(roff_blocks(source)) == ["ls - list", "Use --all or ls(1) now.", "It's “done” SMALL."]
    assert plain("a\\ b\\f(CWc\\fR") == "a bc"


def test_what_is_missing_is_one_line(written, tmp_path):
    _, folder = written
    for place, settings, message in (
        (tmp_path / "none", {}, "is no folder"),
        (tmp_path, {}, "holds no English pages; expected unpacked packages such as libreoffice-help-en-us"),
        (folder / "root", {"parallel_languages": ["fr"]}, "has no pages in fr; it has el, hi, tr"),
        (folder / "root", {"parallel_languages": ["hi"]}, "no page is translated in all of hi; name fewer"),
        (
            folder / "root",
            {"parallel_share": 1.0, "parallel_shortest": 9000},
            "too little translated text: of 0 English",
        ),
    ):
        with pytest.raises(EclectusError, match=message) as caught:
            write_parallel_text(place, tmp_path / "out", ParallelSettings(**settings))
        assert "\n" not in str(caught.value)


def test_the_command_writes_the_files_and_names_the_next_one(written, tmp_path, capsys):
    _, folder = written
    main(["parallel", str(folder / "root"), str(tmp_path / "out"), "--languages", "el", "--pages", "5"])
    printed = capsys.readouterr().out
    assert "5 pages and 5 questions in each of en, el" in printed and "--benchmark-files" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "page_choice_el.jsonl", "page_choice_en.jsonl", "parallel_text_el.jsonl", "parallel_text_en.jsonl"
    ]  # fmt: skip
