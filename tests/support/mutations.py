"""Seeded mutations of JSON objects: what a hand, a script or a broken download makes of a config."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**6, 10**12, 10**40, 0.5, -2.5, 1e30, float("nan"), float("inf"), "", "8", "x\ny",
    [], [1], ["full_attention"], {}, {"a": 1},
]  # fmt: skip


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all keys of nested objects, and of the first element of each list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths_of(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)


def changes_of(value: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every single change of an object, with a description: each key dropped, and set to each of VALUES."""
    found = []
    for path in paths_of(value):
        for new in ("drop", *VALUES):
            changed = copy.deepcopy(value)
            owner = changed
            for key in path[:-1]:
                owner = owner[key]
            if new == "drop":
                del owner[path[-1]]
            else:
                owner[path[-1]] = new
            found.append((f"{'.'.join(map(str, path))} = {new!r}", changed))
    return found


def some_changes(value: dict[str, Any], count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """`count` of them, the same for the same seed."""
    return random.Random(seed).sample(changes_of(value), count)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
