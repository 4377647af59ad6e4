"""Journals: what JSON cannot hold is written as null, and ends no run."""

import json
import math

import pytest

from eclectus.storage.journal import Journal


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null_at_any_depth(tmp_path, value):
    output = {"statistics": {"loss": value, "by_language": [{"el": value, "en": 1.5}], "pair": (value, 2)}}
    with Journal(tmp_path, "run") as journal:
        journal.event("step_ended", step="s", output=output)
        journal.metric("s", "loss", value, 3, {"language": "el"})
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for path in tmp_path.rglob("*.ndjson")
        for line in path.read_text().splitlines()
    ]
    event = next(row for row in rows if "output" in str(row) and "statistics" in str(row))
    assert "NaN" not in json.dumps(event) and "1.5" in json.dumps(event)
    metric = next(row for row in rows if row.get("name") == "loss")
    assert metric["value"] is None and metric["tags"] == {"language": "el", "value": str(value)}
