"""Cost beside score: the table, and what the verdict says about FLOPs."""

from types import SimpleNamespace

import numpy as np
import pytest

from eclectus.tasks.evaluation.costs import Cost, flops, read_costs
from eclectus.tasks.report.tables import cost_table
from eclectus.tasks.report.verdict import Comparer, make_verdict
from tests.support.made_up_scores import made_up

# Size laptop of benchmarks/lory_claims.py, as tests/models/training/test_flops.py counts it.
COSTS = {
    "dense": Cost(103_392, 103_392, 784_859_136, 352_321_536, 6_000_000_000_000, 100.0, None, 1024),
    "lory": Cost(892_128, 106_464, 993_067_008, 352_321_536, 7_500_000_000_000, 150.0, None, 1024),
    "dense_equal_flops": Cost(137_952, 137_952, 997_195_776, 352_321_536, 7_600_000_000_000, 130.0, None, 1024),
}


def comparer(place, factors, costs=COSTS):
    nats = np.linspace(3, 5, 40)
    return Comparer({name: made_up(place, name, nats * factor) for name, factor in factors.items()}, costs=costs)


def test_lory_is_compared_at_its_flops_and_a_missing_control_is_noted(tmp_path):
    verdict = make_verdict(comparer(tmp_path, {"dense": 1.0, "lory": 0.9}))
    assert "at 1.48 times (1.27 with attention) the twin's FLOPs per training step." in verdict.sentences[0]
    assert any("no dense model of equal FLOPs was trained" in note for note in verdict.notes)


@pytest.mark.parametrize(
    ("factor", "words", "tone"),
    [
        (0.95, "scores worse than", "bad"),
        (1.05, "scores better than", "good"),
        (1.0, "does not differ clearly", "even"),
    ],
)
def test_the_verdict_on_the_control_follows_the_numbers(tmp_path, factor, words, tone):
    verdict = make_verdict(comparer(tmp_path, {"dense": 1.1, "lory": 1.0, "dense_equal_flops": factor}))
    sentence = verdict.sentences[1]
    assert f"This training of Lory {words}" in sentence
    assert "whose step costs 1.01 times (1.00 with attention) Lory's FLOPs" in sentence
    assert verdict.tiles[1].tone == tone
    assert not any("no dense model of equal FLOPs" in note for note in verdict.notes)


def test_the_table_shows_score_parameters_flops_and_seconds(tmp_path):
    table = cost_table(comparer(tmp_path, {"dense": 1.0, "lory": 0.9, "given": 1.0}))
    assert [row[0].text for row in table.rows] == ["dense", "lory"], "what a given model cost is not known"
    texts = [cell.text for cell in table.rows[1]]
    assert texts[2:] == ["892\u202f128", "106\u202f464", "993 MFLOPs", "1.48", "7.5 TFLOPs", "150.0"]
    assert table.rows[1][5].small == "1.27" and table.rows[0][5].text == "1.00"
    assert table.head[-1] == "CPU seconds" and all(len(row) == len(table.head) for row in table.rows)


def test_reports_of_models_without_costs_are_as_before(tmp_path):
    without = comparer(tmp_path, {"dense": 1.0, "lory": 0.9}, {})
    assert cost_table(without) is None
    verdict = make_verdict(without)
    assert "FLOPs" not in " ".join([*verdict.sentences, *verdict.notes])


def test_costs_are_read_from_checkpoints_that_say_them():
    about = {"parameters": 4, "active_parameters": 3, "flops_per_step": 9, "attention_flops_per_step": 2}
    about |= {"training_flops": 90, "cpu_seconds": 1.5, "gpu_seconds": 0.5, "tokens": 60, "steps": 3}
    given = {"new": SimpleNamespace(statistics=about), "old": SimpleNamespace(statistics={"parameters": 4})}
    assert read_costs(given) == {"new": Cost(4, 3, 9, 2, 90, 1.5, 0.5, 20)}
    assert [flops(value) for value in (12, 3.2e9, 1.5e19)] == ["12 FLOPs", "3.2 GFLOPs", "15 EFLOPs"]
