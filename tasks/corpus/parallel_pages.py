"""Pages of documentation in several languages, paragraph by paragraph, as distributions install them; no code is run.

    libreoffice-help    PREFIX/libreoffice/help/LANGUAGE/text/**.html: paragraphs have ids that all languages share
    debian-reference    PREFIX/debian-reference/CHAPTER.LANGUAGE.html: sections have anchors that all languages share
    man                 PREFIX/man/man[1-8] in English, PREFIX/man/LANGUAGE/man[1-8]: blocks of the page source

Where paragraphs have no ids (sections, man pages), those of a translation are the original's by their order, and only
if there are equally many: translations made from message catalogs keep the structure.
PREFIX: the given folder, or usr/share, share, usr/lib in it. Cost: 4,000 help pages per second and core.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

PREFIXES = (".", "usr/share", "share", "usr/lib")
# Of two translations into one language (en-US and en-GB, pt and pt-BR, zh-CN and zh-TW) the first one here is read.
PREFERRED = ("en-US", "zh-CN")
SPACE = re.compile(r"\s+")
_BLOCKS = ("pre", "table", "ul", "ol", "dl", "div", "h1", "h2", "h3", "h4", "h5", "h6")


@dataclass(frozen=True)
class Page:
    """A page in one language. paragraphs: by a key that is the same in all languages. book: whose page it is."""

    book: str
    name: str
    language: str
    paragraphs: dict[str, str] = field(hash=False)


def read_pages(folder: Path) -> Iterator[Page]:
    """The pages of all books in a folder with installed or unpacked packages, sorted by book and language."""
    for place in dict.fromkeys((folder / prefix).resolve() for prefix in PREFIXES):
        yield from _help_pages(place / "libreoffice" / "help")
        yield from _reference_pages(place / "debian-reference")
        yield from _man_pages(place / "man")


def _help_pages(place: Path) -> Iterator[Page]:
    for language, folder in _by_language(place, lambda path: (path / "text").is_dir()).items():
        text = folder / "text"
        for path in sorted(text.rglob("*.html")):
            name = path.relative_to(text).with_suffix("").as_posix()
            found = {key: paragraph for _, key, paragraph in _paragraphs(path) if key.startswith("par_")}
            yield Page(f"libreoffice-help {name.split('/')[0]}", name, language, found)


def _reference_pages(place: Path) -> Iterator[Page]:
    files = sorted(place.glob("*.*.html")) if place.is_dir() else []
    for path in files:
        chapter, code = path.name.removesuffix(".html").split(".", 1)
        sections: dict[str, list[str]] = {}
        for section, _, text in _paragraphs(path):
            if section.startswith("_"):
                sections.setdefault(section, []).append(text)
        for section, texts in sections.items():
            yield Page("debian-reference", f"{chapter}{section}", language_of(code), _numbered(texts))


def _man_pages(place: Path) -> Iterator[Page]:
    folders = {"en": place} | _by_language(place, lambda path: any(path.glob("man[1-8]")))
    for language, folder in folders.items():
        for path in sorted(folder.glob("man[1-8]/*.[1-8]*")):
            text = _read_text(path)
            if text and not text.startswith(".so "):
                name = path.name.removesuffix(".gz")
                yield Page(f"man {path.parent.name}", name, language, _numbered(list(roff_blocks(text))))


def language_of(code: str) -> str:
    """ISO 639-1 of a folder's name: pt of pt-BR, zh of zh_CN.UTF-8."""
    return re.split(r"[-_.@]", code)[0].lower()


def _by_language(place: Path, holds: Callable[[Path], bool]) -> dict[str, Path]:
    """The folder of each language, in the order of the codes. holds: whether a folder has pages."""
    if not place.is_dir():
        return {}
    named = re.compile(r"[a-z]{2,3}([-_][A-Za-z]+)?")
    folders = [each for each in place.iterdir() if named.fullmatch(each.name) and each.is_dir() and holds(each)]
    found: dict[str, Path] = {}
    for folder in sorted(folders, key=lambda path: (path.name not in PREFERRED, path.name)):
        found.setdefault(language_of(folder.name), folder)
    return dict(sorted(found.items()))


def _numbered(texts: list[str]) -> dict[str, str]:
    """Paragraphs by number, of how many: only pages with equally many share keys."""
    return {f"{number}/{len(texts)}": text for number, text in enumerate(texts)}


def _read_text(path: Path) -> str:
    """The text of a file; empty if it cannot be read as UTF-8."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, ValueError):
        return ""


def _paragraphs(path: Path) -> list[tuple[str, str, str]]:
    """(anchor of the section, id, text) of every paragraph of an HTML file; no code, no tables."""
    reader = _Reader()
    reader.feed(_read_text(path))
    reader.close()
    return reader.found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, str, str]] = []
        self._section, self._key, self._skip = "", "", 0
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in ("pre", "table", "script", "style"):
            self._skip += 1
        if tag == "p" or tag in _BLOCKS:
            self._end()
        if tag == "a" and given.get("id", "").startswith("_"):
            self._section = given["id"]
        if tag == "p" and not self._skip:
            self._text, self._key = [], given.get("id", "")
        if tag == "br" and self._text is not None:
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "table", "script", "style"):
            self._skip = max(0, self._skip - 1)
        if tag == "p" or tag in _BLOCKS:
            self._end()

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _end(self) -> None:
        text = SPACE.sub(" ", "".join(self._text or [])).strip()
        if text:
            self.found.append((self._section, self._key, text))
        self._text = None


_MACRO = re.compile(r"[.'][ \t]*(\w*)[ \t]*(.*)")
_INLINE = ("B", "I", "BR", "BI", "IR", "RB", "RI", "IB", "SM", "SB")
_CODE = {"nf": "fi", "EX": "EE", "TS": "TE", "Vb": "Ve"}
# Longest first: fonts, sizes, names of characters.
_ESCAPES = re.compile(r"\\f(?:\[\w*\]|\(\w\w|\w)|\\s[-+]?\d+|\\\((\w\w)|\\\[(\w+)\]|\\(.)")
_CHARACTERS = {
    "aq": "'", "cq": "’", "oq": "‘", "lq": "“", "rq": "”", "dq": '"', "co": "©", "bu": "•", "em": "—", "en": "–",
    "-": "-", "e": "\\", " ": " ", "~": " ", "ha": "^", "ti": "~", "0": " ", "'": "'", ":": "",
}  # fmt: skip


def roff_blocks(source: str) -> Iterator[str]:
    """The paragraphs of a man page's source as plain text, without headings, code and tables.

    A block ends at every macro that is no font, so a translation with the same macros has as many blocks.
    """
    block: list[str] = []
    until = ""
    for line in source.splitlines():
        macro = _MACRO.match(line)
        name = macro[1] if macro else ""
        if until:
            until = "" if name == until else until
        elif line.startswith(('.\\"', "'\\\"", '.\\ "')):
            continue
        elif macro is None:
            block.append(plain(line))
        elif name in _INLINE:
            words = [each.strip('"') for each in re.findall(r'"[^"]*"|\S+', macro[2])]
            block.append(plain(("" if len(name) == 2 else " ").join(words)))
        else:
            until = _CODE.get(name, "")
            yield from _block(block)
            block = []
    yield from _block(block)


def _block(lines: list[str]) -> Iterator[str]:
    text = SPACE.sub(" ", " ".join(lines)).strip()
    if text:
        yield text


def plain(text: str) -> str:
    """A line of roff without its escapes."""

    def character(found: re.Match[str]) -> str:
        return _CHARACTERS.get(found[1] or found[2] or found[3] or "", "")

    return _ESCAPES.sub(character, text)
