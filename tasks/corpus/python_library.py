"""Python's own standard library as text: its sources (domain code) and its documentation (domain programming-docs).

The two domains read different modules, chosen by a hash of the module's name, so that no docstring is in both. The
code is split with regular expressions, not `ast`: the sources are 10 MB, which take 10 s to parse and 1 s to search.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

from eclectus.storage.errors import EclectusError
from eclectus.tasks.corpus.text import Document, cut, merge_short

LICENCE = "PSF-2.0"
SOURCE = "python"
VERSION = platform.python_version()
# Third-party packages, tables, and tools with little text of their own; then the tests and generated tables.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
}
TESTS = ("test", "_sysconfigdata")
CODE_MODULES_OF_TEN = 3
TOP_LEVEL = re.compile(r"^(?:@[^\n]*\n)*(?:def |async def |class )", re.MULTILINE)
DOCSTRING = re.compile(
    r'(?:\A(?:#[^\n]*\n|\s)*|^[ \t]*(?:async def|def|class) (?P<name>\w+)(?P<rest>[^"#]{0,300}?):[ \t]*\n\s*)'
    r'[rR]?"""(?P<text>.{40,}?)"""',
    re.MULTILINE | re.DOTALL,
)


def code(minimum: int, maximum: int) -> Iterator[Document]:
    """Modules of the standard library, long ones cut between their top-level classes and functions."""
    for name, path in _modules():
        if not _is_code(name):
            continue
        text = _read(path)
        borders = [0, *(match.start() for match in TOP_LEVEL.finditer(text)), len(text)]
        blocks = [text[start:end] for start, end in pairwise(borders) if end > start]
        for number, piece in enumerate(_packed(blocks, minimum, maximum)):
            yield Document(f"python/code/{name}/{number:03}", f"python/code/{name}", piece, "en", "code", SOURCE)


def programming_docs(minimum: int, maximum: int) -> Iterator[Document]:
    """The language reference's topics, and the docstrings of a module, each under the name that it describes."""
    for name in sorted(topics):
        work = f"python/topic/{name}"
        for number, piece in enumerate(cut(_dedented(topics[name]), maximum)):
            yield Document(f"{work}/{number:03}", work, piece, "en", "programming-docs", SOURCE)
    for name, path in _modules():
        if _is_code(name):
            continue
        work = f"python/docstrings/{name}"
        entries = [_entry(name, match) for match in DOCSTRING.finditer(_read(path))]
        for number, piece in enumerate(_packed(entries, minimum, maximum)):
            yield Document(f"{work}/{number:03}", work, piece, "en", "programming-docs", SOURCE)


def _entry(module: str, match: re.Match[str]) -> str:
    name = f"{module}.{match['name']}" if match["name"] else module
    return f"{name}\n\n{_dedented(match['text'])}\n\n"


def _dedented(text: str) -> str:
    """A docstring as `inspect.cleandoc` gives it, with tabs expanded."""
    lines = text.expandtabs().strip("\n").split("\n")
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    body = [lines[0].strip(), *(line[margin:].rstrip() for line in lines[1:])]
    return "\n".join(body).strip()


def _packed(blocks: list[str], minimum: int, maximum: int) -> Iterator[str]:
    """Neighbouring blocks joined up to half of `maximum` characters; a longer block is cut."""
    piece = ""
    pieces: list[str] = []
    for block in blocks:
        if piece and len(piece) + len(block) > maximum // 2:
            pieces.append(piece)
            piece = ""
        piece += block
    for whole in merge_short([*pieces, piece] if piece else pieces, minimum, joint=""):
        for part in cut(whole.strip("\n"), maximum):
            yield part.strip("\n")


def _modules() -> list[tuple[str, Path]]:
    """Every module of the standard library with sources here, as (dotted name, path), in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(TESTS)]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and not name.startswith(TESTS):
                found.append((".".join(path.relative_to(root).with_suffix("").parts), path))
    if not found:
        raise EclectusError(
            f"no sources of Python's standard library under {root}, which the default corpus reads: use a Python "
            f"installed with its library's .py files, or give your own documents instead"
        )
    return sorted(found)


def _is_code(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] % 10 < CODE_MODULES_OF_TEN


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").replace("\f", "")
