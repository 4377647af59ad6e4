"""The data report's table of files that are not read."""

from eclectus.tasks.documents.ingest import passed_over
from eclectus.tasks.report.data_report import _passed_over_table


class Ingested:
    def __init__(self, **statistics):
        self.statistics = statistics


def test_the_data_report_lists_what_is_not_read_by_reason_with_some_names():
    files = {f"{i}.png": "has a suffix that cannot be read" for i in range(150)} | {".git/": "is hidden"}
    table = _passed_over_table(Ingested(passed_over=passed_over(files)))
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["has a suffix that cannot be read", "150"],
        ["is hidden", "1"],
    ]
    assert table.rows[0][1].small == "0.png, 1.png, 2.png, 3.png ..."
    assert len(passed_over(files)["files"]) == 100


def test_an_earlier_artifact_that_does_not_know_them_has_no_such_table():
    assert _passed_over_table(Ingested()) is None
    assert _passed_over_table(Ingested(passed_over=passed_over({}))) is None
