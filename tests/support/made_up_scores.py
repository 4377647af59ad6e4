"""Scores of models that were never run, for tests of comparisons, gate rules and the report."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.evaluation.scores import Scores


def made_up(tmp_path, name, bits, group="original", missing=()):
    """Scores of a model whose documents cost `bits` [D] per token, with 100 tokens and 400 bytes each."""
    place = tmp_path / name.replace(" ", "-")
    place.mkdir()
    (place / "about.json").write_text(
        json.dumps(
            {"window": 64, "model": "X", "languages_without_held_out_text": list(missing), "too_short_to_score": []}
        )
    )
    pq.write_table(
        pa.table({"layer": pa.array([], pa.int32()), "expert": pa.array([], pa.int32())}), place / "routing.parquet"
    )
    count = len(bits)
    groups = np.full(count, group, object) if isinstance(group, str) else np.array(group, object)
    return Scores(
        name,
        Artifact("evaluation", "0" * 64, str(place)),
        np.array([f"d{i:03}" for i in range(count)], object),
        np.where(groups == "original", "en", "el").astype(object),
        np.array(["code" if i % 2 else "law" for i in range(count)], object),
        groups,
        np.asarray(bits) * 100,
        np.full(count, 400.0),
        np.full(count, 100),
    )
