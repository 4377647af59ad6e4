"""Output folders that appear whole or not at all: staged in `NAME.partial` next to the target, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


def require_new_folder(out_dir: Path) -> None:
    """Raises ValueError when `out_dir` is a file or a folder with anything in it."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists already: remove it or choose another place")


@contextlib.contextmanager
def staged_folder(out_dir: Path) -> Iterator[Path]:
    """An empty folder that becomes `out_dir` at the end of the block, and is removed when the block raises.

    What a killed process left in its place is replaced. Raises ValueError when `out_dir` is not new or empty.
    """
    require_new_folder(out_dir)
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
