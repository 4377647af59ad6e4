"""Parallel held-out text: the same pages in several languages, to compare a model between languages on equal content.

Bits per byte are no measure between languages: a byte of Greek or Chinese says less or more than one of English. Here
every language has the same paragraphs of the same pages, and what a model spends on a page is divided by the characters
of the *English* page: bits per character of the English original, which is comparable across languages, scripts and
tokenizers (docs/evaluation.md, "Equal content").

    parallel_text_XX.jsonl    page, text, english_characters: one page a line, the same pages in every file
    page_choice_XX.jsonl      page, context, choices, label: how a page goes on, among the continuations of three other
                              pages of its book; the same items in every file, so chance is 1 in 4 in each

Documentation that counts as translated is often English in part. A paragraph is used only if in every language it
differs from the English one, has a length that fits it, and is not detected as English; a page only if every language's
text is detected as that language. Languages with too few pages are dropped and reported, unless the user names them.
Cost: a minute for ten languages of LibreOffice's help. The same packages give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from eclectus.storage.atomic_write import write_atomically
from eclectus.storage.errors import EclectusError
from eclectus.tasks.corpus.parallel_pages import Page, read_pages
from eclectus.tasks.documents.language_codes import language_name
from eclectus.tasks.documents.language_detection import detect
from eclectus.tasks.settings import Settings

ORIGINAL = "en"
# A paragraph that is shorter is not judged by its language: detectors need some words.
JUDGED = 40
SHORTEST_RATIO, LONGEST_RATIO = 0.15, 4.0
OTHER_PAGES = 3
CONTEXT_CHARACTERS, CONTINUATION = 200, (60, 400)

Key = tuple[str, str]


class ParallelSettings(Settings):
    """Which pages are taken, and how long they are."""

    parallel_languages: list[str] = Field(
        [], description="Languages beside English, as ISO 639-1 codes; empty: all that the folder has."
    )
    parallel_pages: int = Field(
        300, ge=4, description="At most this many pages, spread evenly over all by a hash of their names."
    )
    parallel_characters: int = Field(
        1_000, ge=100, description="A page ends with the paragraph in which its English reaches this many characters."
    )
    parallel_shortest: int = Field(
        300, ge=1, description="Pages of fewer characters in English, after the filters, are left out."
    )
    parallel_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="A language that is not named is dropped if it has a smaller share of the English pages.",
    )


@dataclass(frozen=True)
class ParallelSummary:
    """What was written. translated: by language, the share of the English pages. dropped: languages of too few."""

    languages: list[str]
    pages: int
    items: int
    translated: dict[str, float]
    dropped: list[str]


def write_parallel_text(folder: Path, out: Path, settings: ParallelSettings) -> ParallelSummary:
    """Writes the two files of every language into `out`. folder: with installed or unpacked packages.

    Raises EclectusError naming what is missing and where it was looked for.
    """
    pages = _read(folder)
    original = {key: each for (key, language), each in pages.items() if language == ORIGINAL}
    others = sorted({language for _, language in pages} - {ORIGINAL})
    if missing := sorted(set(settings.parallel_languages) - set(others)):
        raise EclectusError(
            f"{folder} has no pages in {', '.join(missing)}; it has {', '.join(others) or 'no translations'}"
        )
    if not original or not others:
        raise EclectusError(
            f"{folder} holds {'no English pages' if not original else 'English pages only'}; expected unpacked "
            "packages such as libreoffice-help-en-us and libreoffice-help-el (docs/evaluation.md, 'Equal content')"
        )
    others = [each for each in others if each in (settings.parallel_languages or others)]
    repeated = _repeated(original)
    translated = {
        language: {key: _translated(original[key], pages[key, language], repeated) for key in original
                   if (key, language) in pages}
        for language in others
    }  # fmt: skip
    whole = {
        key
        for key, page in original.items()
        if sum(len(text) for text in page.paragraphs.values() if text not in repeated) >= settings.parallel_shortest
    }
    shares = {language: _share(whole, original, each, settings) for language, each in translated.items()}
    named = set(settings.parallel_languages)
    kept = [language for language in others if language in named or shares[language] >= settings.parallel_share]
    if not kept:
        listed = ", ".join(f"{language} {share:.0%}" for language, share in shares.items())
        raise EclectusError(
            f"{folder} has too little translated text: of {len(whole)} English pages {listed}; install other packages, "
            "or lower --share"
        )
    texts = _equal_content(whole, original, {each: translated[each] for each in kept}, pages, settings)
    items = _items(texts, kept)
    out.mkdir(parents=True, exist_ok=True)
    for language in (ORIGINAL, *kept):
        _write(out / f"parallel_text_{language}.jsonl", _text_rows(texts, language))
        _write(out / f"page_choice_{language}.jsonl", [each[language] for each in items])
    dropped = [language for language in others if language not in kept]
    return ParallelSummary([ORIGINAL, *kept], len(texts), len(items), shares, dropped)


def _read(folder: Path) -> dict[tuple[Key, str], Page]:
    if not folder.is_dir():
        raise EclectusError(f"{folder} is no folder; expected one with installed or unpacked packages")
    found: dict[tuple[Key, str], Page] = {}
    for page in read_pages(folder):
        found.setdefault(((page.book, page.name), page.language), page)
    return found


def _repeated(original: dict[Key, Page]) -> set[str]:
    """English paragraphs that stand on several pages: notes, embedded parts, licences."""
    counts: Counter[str] = Counter()
    for page in original.values():
        counts.update(set(page.paragraphs.values()))
    return {text for text, count in counts.items() if count > 1}


def _translated(original: Page, page: Page, repeated: set[str]) -> set[str]:
    """Keys of the paragraphs that are translated; none if the whole is not in the page's language."""
    keys = set()
    for key, text in original.paragraphs.items():
        other = page.paragraphs.get(key, "")
        fits = SHORTEST_RATIO <= len(other) / len(text) <= LONGEST_RATIO
        if text in repeated or not fits or other == text:
            continue
        if len(other) >= JUDGED and detect(other)[0] == ORIGINAL:
            continue
        keys.add(key)
    whole = " ".join(page.paragraphs[key] for key in page.paragraphs if key in keys)
    return keys if whole and detect(whole)[0] == page.language else set()


def _size(page: Page, keys: set[str]) -> int:
    return sum(len(text) for key, text in page.paragraphs.items() if key in keys)


def _share(
    whole: set[Key], original: dict[Key, Page], translated: dict[Key, set[str]], settings: ParallelSettings
) -> float:
    """Of the English pages that are long enough, those of which this language has enough."""
    enough = [key for key in whole if _size(original[key], translated.get(key, set())) >= settings.parallel_shortest]
    return len(enough) / len(whole) if whole else 0.0


def _equal_content(
    whole: set[Key],
    original: dict[Key, Page],
    translated: dict[str, dict[Key, set[str]]],
    pages: dict[tuple[Key, str], Page],
    settings: ParallelSettings,
) -> dict[Key, dict[str, list[str]]]:
    """By page and language, the same paragraphs: those that every language has translated, from the page's start."""
    found: dict[Key, dict[str, list[str]]] = {}
    ordered = sorted(whole, key=lambda key: hashlib.sha256("\t".join(key).encode()).digest())
    for key in ordered:
        common = set.intersection(*(each.get(key, set()) for each in translated.values()))
        chosen, size = [], 0
        for name, text in original[key].paragraphs.items():
            if name in common and size < settings.parallel_characters:
                chosen.append(name)
                size += len(text)
        if size >= settings.parallel_shortest:
            found[key] = {
                language: [pages[key, language].paragraphs[name] for name in chosen]
                for language in (ORIGINAL, *translated)
            }
        if len(found) == settings.parallel_pages:
            break
    if not found:
        raise EclectusError(f"no page is translated in all of {', '.join(translated)}; name fewer with --languages")
    return dict(sorted(found.items()))


def _items(texts: dict[Key, dict[str, list[str]]], languages: list[str]) -> list[dict[str, dict[str, object]]]:
    """By item and language: a context, four continuations, and which one is right.

    Wrong ones are the right ones of the pages of the same book whose English is most alike in length.
    """
    cuts = {key: cut for key, each in texts.items() if (cut := _cut(each[ORIGINAL])) is not None}
    by_book: dict[str, list[Key]] = defaultdict(list)
    for key in cuts:
        by_book[key[0]].append(key)
    items = []
    for key, cut in cuts.items():
        length = len(texts[key][ORIGINAL][cut])
        nearest = sorted(
            (other for other in by_book[key[0]] if other != key),
            key=lambda other: (abs(len(texts[other][ORIGINAL][cuts[other]]) - length), other),
        )
        own = {texts[key][each][cut] for each in (ORIGINAL, *languages)}
        wrong = [
            other
            for other in nearest
            if own.isdisjoint(texts[other][each][cuts[other]] for each in (ORIGINAL, *languages))
        ]
        if len(wrong) < OTHER_PAGES:
            continue
        label = int(hashlib.sha256("\t".join(key).encode()).hexdigest(), 16) % (1 + OTHER_PAGES)
        chosen = wrong[:OTHER_PAGES]
        chosen.insert(label, key)
        items.append({each: _item(key, texts, cuts, chosen, label, each) for each in (ORIGINAL, *languages)})
    return items


def _item(
    key: Key, texts: dict[Key, dict[str, list[str]]], cuts: dict[Key, int], chosen: list[Key], label: int, language: str
) -> dict[str, object]:
    context = "\n\n".join(texts[key][language][: cuts[key]])
    choices = [texts[other][language][cuts[other]] for other in chosen]
    return {"page": "/".join(key), "context": context, "choices": choices, "label": label}


def _cut(paragraphs: list[str]) -> int | None:
    """The number of the paragraph that is the continuation: the first of fitting length after enough context."""
    size = 0
    for number, text in enumerate(paragraphs):
        if size >= CONTEXT_CHARACTERS and CONTINUATION[0] <= len(text) <= CONTINUATION[1]:
            return number
        size += len(text)
    return None


def _text_rows(texts: dict[Key, dict[str, list[str]]], language: str) -> list[dict[str, object]]:
    return [
        {
            "page": "/".join(key),
            "text": "\n\n".join(each[language]),
            "english_characters": len("\n\n".join(each[ORIGINAL])),
        }
        for key, each in texts.items()
    ]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def describe(summary: ParallelSummary) -> str:
    """What was written, in lines."""
    lines = [f"{summary.pages} pages and {summary.items} questions in each of {', '.join(summary.languages)}"]
    for language, share in summary.translated.items():
        note = "; dropped" if language in summary.dropped else ""
        lines.append(f"{language_name(language)}: {share:.0%} of the English pages are translated{note}")
    return "\n".join(lines)
