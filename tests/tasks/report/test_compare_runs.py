"""Comparison of runs: means with their spread over seeds, settings that differ, curves, reused steps included."""

import re

import pytest

from eclectus.flows.cli.compare import compare
from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import Journal
from eclectus.tasks.report.compare_runs import compare_runs
from tests.support.browser import BROWSER, FilePage, open_browser


def write_run(home, run, seed, loss, k=20, reuses=None):
    """A run with a training step and an evaluation; reuses: the run whose training it reused."""
    with Journal(home.journal, run) as journal:
        parameters = {"k": k, "seed": seed, "sources": ["<b>mine</b>"]}
        journal.event("run_started", flow="main", parameters=parameters, packages={}, code_version="abc")
        for label, kind in (("train lory", "checkpoint"), ("evaluate lory", "evaluation")):
            step, reused = f"{run}-{kind}", reuses is not None and kind == "checkpoint"
            digest = (f"{reuses if reused else run}-{kind}".encode().hex() + "0" * 64)[:64]
            journal.event("step_started", step=step, name=label.split()[0], label=label, flow="main", key=step)
            if kind == "checkpoint" and not reused:
                for at in (1, 2, 3):
                    journal.metric(step, "loss", loss + 3 - at, at)
            if kind == "evaluation":
                journal.metric(step, "bits_per_byte", loss, tags={"language": "el"})
                journal.metric(step, "router_entropy", 0.5, tags={"layer": "0"})
            journal.event(
                "step_ended", step=step, name=label.split()[0], label=label, flow="main", key=step, version=1,
                state="reused" if reused else "completed", reason="", seconds=1, settings={}, inputs={},
                output={
                    "kind": kind, "artifact": digest, "rows": 1, "bytes": 1, "created": "2026-11-22T05:10:13Z",
                    "path": "p", "statistics": {},
                },
            )  # fmt: skip
        journal.event("run_ended", state="completed", seconds=2)


@pytest.fixture
def home(home, monkeypatch):
    write_run(home, "r1", 0, 2.0)
    write_run(home, "r2", 1, 2.2)
    write_run(home, "r3", 0, 1.5, k=32)
    write_run(home, "r4", 0, 1.6, k=32, reuses="r3")
    monkeypatch.setenv("ECLECTUS_HOME", str(home.root))
    return home


def test_runs_that_differ_in_the_seed_alone_are_one_group_with_a_spread(home):
    found = compare_runs(home, ["r1", "r2", "r3"])
    assert [[run.run for run in group.runs] for group in found.groups] == [["r1", "r2"], ["r3"]]
    mean, spread, count = found.groups[0].value(("evaluate lory", "bits_per_byte", "language el"))
    assert (mean, count) == (pytest.approx(2.1), 2) and spread == pytest.approx(0.141421, rel=1e-5)
    assert found.groups[1].value(("evaluate lory", "bits_per_byte", "language el")) == (1.5, None, 1)
    assert found.differing == {"k": [20, 32]}


def test_a_run_that_reused_training_tells_the_curve_of_the_run_that_trained(home):
    (group,) = compare_runs(home, ["r4"]).groups
    assert group.runs[0].curves["train lory", "loss"] == {"": [(1, 3.5), (2, 2.5), (3, 1.5)]}
    assert list(group.runs[0].values["train lory", "loss", ""].values()) == [1.5]


def test_runs_are_found_by_the_start_of_their_name_and_by_how_long_ago_they_were(home):
    assert compare_runs(home, ["last", "last~3"]).groups[0].runs[0].run == "r4"
    with pytest.raises(EclectusError, match="'r' is the start of 4 runs, such as r4, r3, r2; write more of it"):
        compare_runs(home, ["r"])
    with pytest.raises(EclectusError, match="there is no run 'nonsense'; the latest are r4, r3, r2"):
        compare_runs(home, ["nonsense"])
    with pytest.raises(EclectusError, match="there is no run 'last~9'; there are 4 runs"):
        compare_runs(home, ["last~9"])


def test_the_command_shows_what_differs_and_the_measures_and_writes_a_page(home):
    page = home.root / "compare.html"
    assert compare(["r1", "r2", "r3"], "", None) == compare(["r1", "r2", "r3"], "", page)
    _, settings, values = compare(["r1", "r2", "r3"], "", None)
    text = page.read_text("utf-8")
    assert settings[1] == [("k", "20", "32")]
    rows = {row[0]: row[1:] for row in values[1]}
    assert rows["evaluate lory: bits_per_byte, language el"] == ("2.1 ± 0.14 (2)", "1.5")
    assert "evaluate lory: router_entropy, layer 0" not in rows
    assert set(dict.fromkeys(row[0] for row in compare(["r1"], "bits", None)[2][1])) == {
        "evaluate lory: bits_per_byte, language el"
    }
    for series, first in (("A, r1", "4.000"), ("A, r2", "4.200"), ("B, r3", "3.500")):
        assert f"<title>{series}, step 1: {first}</title>" in text
    assert text.count('<svg class="chart"') == 1
    assert set(re.findall("border-color:(#......)", text)) == {"#7d8ba1", "#e08a2e"}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_real_browser_the_curves_are_drawn_and_nothing_leaves_the_page(home):
    page = home.root / "compare.html"
    compare(["r1", "r2", "r3"], "", page)
    with open_browser() as browser:
        for width in (390, 1440):
            shown = FilePage(browser, page, width, "dark")
            assert shown.page.locator("svg.chart").bounding_box()["width"] > 250
            assert shown.fits_its_width()
            assert shown.problems == [] and shown.outside_requests() == []
