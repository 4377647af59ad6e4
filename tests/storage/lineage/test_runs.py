import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.connection import connect
from eclectus.storage.lineage.runs import find_run


@pytest.fixture
def opened(home):
    for run in ("20260101-a", "20260102-b", "20260102-bb"):
        with Journal(home.journal, run) as journal:
            journal.event("run_started", flow="main", parameters={}, packages={})
    with connect(home) as connection:
        yield connection


def test_a_whole_id_wins_over_the_start_of_another(opened):
    assert find_run(opened, "20260102-b") == "20260102-b"
    assert find_run(opened, "20260101") == "20260101-a"


def test_runs_are_counted_back_from_the_last(opened):
    assert [find_run(opened, name) for name in ("last", "last~0", "last~1", "last~2")] == [
        "20260102-bb", "20260102-bb", "20260102-b", "20260101-a"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["", "last~", "last~-1", "last~1.5", "last~³", "LAST", "%", "20260102"])
def test_what_names_no_single_run_is_refused(opened, name):
    with pytest.raises(EclectusError, match=f"'{name}'"):
        find_run(opened, name)
