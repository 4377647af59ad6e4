"""What the whole would cost, told from a sample's steps."""

import time
from types import SimpleNamespace

import pytest

from eclectus.tasks.report.cost_estimate import cluster_cpus, hours, table_of, whole_cost
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step


@step(makes="documents", version=1)
def ingest_ten(settings: Settings, out):
    """Makes ten documents of a hundred."""
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    out.file("text").write_text("x" * 1000)
    out.statistics = {"documents": 10, "expected_documents": 100}


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_steps_grow_with_the_documents_and_those_of_a_bounded_sample_do_not():
    steps = [
        ("ingest", "ingest", 2.0, 300_000_000, 4_000_000),
        ("tokenizer", "tokenizer", 30.0, 900_000_000, 1_000),
        ("pack", "pack original", 100.0, 500_000_000, 2_000_000),
        ("data_report", "data_report", 1.0, 0, 9_999_999),
        ("embed", "embed", None, None, None),
    ]
    table = table_of(steps, sample=1_000, whole=1_000_000, cpus=10)
    assert texts(table) == [
        ["ingest", "500", "33.3 min", "3.3 min", "4.0 GB"],
        ["tokenizer", "", "30.0 s", "30.0 s", "1.0 kB"],
        ["pack original", "10", "27.8 h", "2.8 h", "2.0 GB"],
        ["all", "", "28.3 h", "2.8 h", "6.0 GB"],
    ]
    assert "900.0 MB on the sample" in table.note and "60.0 MB" in table.note
    assert table_of([], 10, 100, 2) is None


def test_the_lineage_tells_what_the_steps_of_this_run_cost_also_reused_ones(run):
    made = ingest_ten(settings=Settings())
    assert ingest_ten(settings=Settings()).digest == made.digest
    table = whole_cost(made)
    (name, rate, cpu, wall, stored), total = texts(table)
    assert name == "ingest_ten" and stored == "10.0 kB" and total[1:] == ["", cpu, wall, stored]
    assert 10 / int(rate) == pytest.approx(0.06, rel=0.9), "not the CPU seconds of the step that made it"
    assert f"for about 100, on {cluster_cpus()} CPUs" in table.note


def test_a_run_of_the_whole_corpus_has_no_estimate(run):
    assert whole_cost(SimpleNamespace(statistics={"documents": 10})) is None


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59, "59.0 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_durations_are_in_a_unit_that_fits(seconds, text):
    assert hours(seconds) == text
