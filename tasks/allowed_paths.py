"""Roots: where paths from parameters may lead, on a machine that other people's forms reach.

$ECLECTUS_ROOTS lists folders, separated by `:`. Where it is set, every path in a run's parameters must lie below one of them, links and
`..` resolved, and so must every file that a source finds. Unset (a person's own machine), any path will do.
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
    """Raises EclectusError for a parameter that leads out of the roots, naming it."""
    if not os.environ.get(ROOTS):
        return
    for name, value in parameters.model_dump(mode="json").items():
        for path in _paths(value):
            check_path(path, f"setting '{name}'")


def check_path(path: str, what: str) -> None:
    """Raises EclectusError where roots are set and a path leads out of them. what: that named it, for the message."""
    roots = [os.path.realpath(root) for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]
    place = os.path.realpath(os.path.expanduser(path))
    if roots and not any(place == root or place.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        raise EclectusError(f"{what} leads to {place}, which is outside {' and '.join(roots)} ({ROOTS})")


def _paths(value: Any) -> Iterator[str]:
    """What of a parameter's value is a path: it looks like one, or there is something of this name."""
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _paths(each)
    elif isinstance(value, str):
        path = value.removeprefix(_PREFIX).split("@")[0].split(":")[0] if value.startswith(_PREFIX) else value
        path = path.strip()
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0] if glob.has_magic(path) else path
        if re.match(r"[/~.]", path) or ".." in path.split("/") or (fixed and os.path.exists(fixed)):
            yield fixed
