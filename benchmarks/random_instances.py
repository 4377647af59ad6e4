"""Instances of random tokens for benchmarks of speed and memory, as models/training/instances.py reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_random_instances(place: Path, rows: int, length: int, vocabulary: int, languages: Sequence[str]) -> None:
    """Writes `rows` instances of `length` tokens, a document each, whose languages take turns. place: a folder."""
    np.random.default_rng(0).integers(1, vocabulary, (rows, length)).astype(np.uint16).tofile(place / "tokens.bin")
    spans = [(row * length, length, row, row % len(languages), 0) for row in range(rows)]
    np.save(place / "spans.npy", np.array(spans, np.int64))
    matrix = {"file": "tokens.bin", "dtype": "uint16", "offset": 0, "rows": rows, "columns": length}
    about = {"length": length, "vocabulary": vocabulary, "end_of_document": 0, "languages": list(languages)}
    text = json.dumps({**about, "domains": ["a"], "matrices": {"input_ids": matrix}})
    (place / "instances.json").write_text(text)
