"""First losses in the lineage: beside documents, languages and the document before."""

import numpy as np

from eclectus.models.training.first_losses import NAME
from eclectus.storage.lineage.connection import query
from eclectus.tasks.first_losses import keep_first_losses
from tests.support.history import write_history, write_table


def packed(home):
    with home.store.draft("instances") as draft:
        rows = [("d1", 0, 0, 5), ("d2", 0, 5, 3), ("d3", 1, 0, 8)]
        values = ", ".join(
            f"('{d}', null, 'en', 'law', 'books', {i}::bigint, {o}::integer, {t}::integer, 0::integer)"
            for d, i, o, t in rows
        )
        names = "document, name, language, domain, source, instance, instance_offset, tokens, document_offset"
        write_table(home, draft.file("documents.parquet"), f"from (values {values}) t({names})")
        return home.store.commit(draft)


def test_losses_are_kept_beside_their_documents(run, tmp_path):
    instances = packed(run.home)
    np.array([2.5, np.nan, 4.0], np.float32).tofile(tmp_path / NAME)
    run.step, run.label = "s1", "train lory"
    keep_first_losses(tmp_path, instances)
    sql = "select step, document, document_before, domain, instance, tokens, loss from first_losses order by loss"
    assert query(sql, run.home)[1] == [
        ("s1", "d1", None, "law", 0, 5, 2.5), ("s1", "d3", None, "law", 1, 8, 4.0)
    ]  # fmt: skip
    run.step = "s2"
    np.array([1.0, 2.0, 3.0], np.float32).tofile(tmp_path / NAME)
    keep_first_losses(tmp_path, instances)
    rows = query("select document, document_before, loss from first_losses where step = 's2' order by loss", run.home)[
        1
    ]
    assert rows == [("d1", None, 1.0), ("d2", "d1", 2.0), ("d3", None, 3.0)]


def test_a_disk_that_cannot_be_written_and_no_run_end_no_training(run, tmp_path, caplog, monkeypatch):
    write_history(run.home)
    instances = packed(run.home)
    np.zeros(3, np.float32).tofile(tmp_path / NAME)
    run.step = "s1"
    (run.home.journal / "first_losses").mkdir(exist_ok=True)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    keep_first_losses(tmp_path, instances)
    assert "first losses of" in caplog.text and "were not kept" in caplog.text
    keep_first_losses(tmp_path / "none", instances)
