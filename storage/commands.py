"""Commands and paths as they are printed: what stands there can be pasted into a shell in the current folder.

Blanks, quotes, `$` and other characters of the shell are quoted, a path that begins with a dash has `./` before it, and
a command names the home that it was printed for: a folder, or the URL of an object store.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from eclectus.storage.secrets import scrub

HOME_VARIABLE = "ECLECTUS_HOME"
DEFAULT_HOME = "home"


def command(*words: str | Path, home: str | Path | None = None) -> str:
    """A command line of this program. home: where it shall look, if not where this process does."""
    named = str(home or os.environ.get(HOME_VARIABLE) or "")
    if "://" not in named:
        named = near(named) if named else ""
        if named == DEFAULT_HOME and HOME_VARIABLE not in os.environ:
            named = ""
    chosen = ["--home", named] if named else []
    return scrub(" ".join(quoted_word(str(word)) for word in [*_program(), *chosen, *words]))


def near(path: str | Path) -> str:
    """The path relative to the current folder if it is inside it, else as it is; as an argument, but not quoted."""
    relative = os.path.relpath(path)
    chosen = str(path) if relative.split(os.sep)[0] == os.pardir else relative
    return f".{os.sep}{chosen}" if chosen.startswith("-") else chosen


def quoted(path: str | Path) -> str:
    """`near`, for a shell."""
    return quoted_word(near(path))


def quoted_word(word: str) -> str:
    """One argument for a shell; SQL, which has single quotes of its own, stays readable."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


def _program() -> list[str]:
    """How to start this program again: by its name if the shell finds the same one, else by its path."""
    own = Path(sys.executable).with_name("eclectus")
    found = shutil.which("eclectus")
    if found and (not own.exists() or os.path.samefile(found, own)):
        return ["eclectus"]
    return [near(own)] if own.exists() else [sys.executable, "-m", "eclectus"]
