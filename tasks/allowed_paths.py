"""Path allow-list for parameters submitted through a shared UI.

$ECLECTUS_ROOTS lists folders, separated by `:`. If it is set, every path in a run's parameters must lie below one of
them (links and `..` resolved), and so must every file that a source finds. If unset, any path is allowed.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from typing import Any

from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import Settings

ROOTS = "ECLECTUS_ROOTS"
_PREFIX = "dataset:"


def check_roots(parameters: Settings) -> None:
    """Raises EclectusError naming the first parameter with a path outside the allowed folders."""
    if not os.environ.get(ROOTS):
        return
    for name, value in parameters.model_dump(mode="json").items():
        for path in _paths(value):
            check_path(path, f"setting '{name}'")


def check_path(path: str, what: str) -> None:
    """Raises EclectusError for a path outside the allowed folders, if set. what: its origin, for the message."""
    roots = [os.path.realpath(root) for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]
    target = os.path.realpath(os.path.expanduser(path))
    if roots and not any(target == root or target.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        raise EclectusError(f"{what} leads to {target}, which is outside {' and '.join(roots)} ({ROOTS})")


def _paths(value: Any) -> Iterator[str]:
    """The paths in a parameter's value: strings that look like a path, or that name an existing file or folder."""
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _paths(each)
    elif isinstance(value, str):
        path = value.removeprefix(_PREFIX).split("@")[0].split(":")[0] if value.startswith(_PREFIX) else value
        path = path.strip()
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0] if glob.has_magic(path) else path
        if re.match(r"[/~.]", path) or ".." in path.split("/") or (fixed and os.path.exists(fixed)):
            yield fixed
