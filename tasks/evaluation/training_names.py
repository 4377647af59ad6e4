"""Names of trainings: the first training of a model has the model's name, a further one "lory seed 1"."""

from __future__ import annotations

import re

_FURTHER = re.compile(r"(?P<model>.+) seed (?P<seed>-?\d+)")


def training_name(model: str, seed: int) -> str:
    """The name of a further training of a model."""
    return f"{model} seed {seed}"


def further_training(name: str) -> tuple[str, int] | None:
    """(model, seed) of a further training; None for the name of a model."""
    found = _FURTHER.fullmatch(name)
    return (found["model"], int(found["seed"])) if found else None
