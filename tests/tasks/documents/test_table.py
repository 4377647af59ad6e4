import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents import table as module
from eclectus.tasks.documents.table import parts, read_batches, read_codes, read_table, relabel
from eclectus.tasks.documents.text_reader import TextReader
from tests.support.topics import write_documents

ROWS = [{"text": f"text {i} " * (1 + i % 5), "language": "xx", "domain": f"d{i % 3}"} for i in range(150)]


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """150 documents in three parts of several row groups, and the same with labels of their own."""
    monkeypatch.setattr(module, "ROWS_PER_PART", 60)
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 25)
    store = ArtifactStore(tmp_path / "home")
    documents = write_documents(store, ROWS)
    with store.draft("documents") as out:
        labels = {
            "language": pa.array([("en", "el")[i % 2] for i in range(150)]),
            "split": pa.array(["heldout" if i < 30 or i == 140 else "train" for i in range(150)]),
        }
        relabel(documents, labels, out)
        return documents, store.commit(out)


def test_labels_win_and_everything_else_stays(labelled):
    before, after = labelled
    assert len(parts(after)) > 1
    table, old = read_table(after), read_table(before)
    assert table["language"].to_pylist() == [("en", "el")[i % 2] for i in range(150)]
    for name in ("document", "text", "domain", "bytes", "group"):
        assert table[name] == old[name]


def test_texts_are_linked_not_written_again(labelled):
    before, after = labelled
    for old, new in zip(parts(before), parts(after), strict=True):
        assert os.path.samefile(old, new)


@pytest.mark.parametrize(
    "where",
    [
        [("split", "==", "heldout")],
        [("split", "==", "train"), ("language", "!=", "en")],
        [("group", "not in", ["original", "expanded", "other"]), ("domain", "==", "d1")],
        [("split", "==", "none such")],
    ],
)
@pytest.mark.parametrize("columns", [["text"], ["document", "text", "split"], ["domain"], ["language", "bytes"], None])
def test_a_filtered_read_equals_the_filter_of_a_whole_read(labelled, where, columns):
    _, after = labelled
    expected = read_table(after).filter(pq.filters_to_expression(where)).select(columns or module.SCHEMA.names)
    assert read_table(after, columns, where).to_pylist() == expected.to_pylist()
    batches = list(read_batches(after, columns, where, rows=7))
    assert all(0 < len(batch) <= 7 for batch in batches)
    assert [row for batch in batches for row in batch.to_pylist()] == expected.to_pylist()


def test_row_groups_without_a_wanted_document_are_not_read(labelled, monkeypatch):
    _, after = labelled
    read = []
    whole = module.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        module.pq.ParquetFile,
        "read_row_group",
        lambda file, group, **more: read.append(group) or whole(file, group, **more),
    )
    wanted = [("document", "in", read_table(after, ["document"])["document"].to_pylist()[140:141])]
    assert len(read_table(after, ["text"], wanted)) == 1
    assert len(read) == 1


def test_a_text_is_found_by_its_row_in_any_order(labelled):
    _, after = labelled
    rows = np.array([149, 0, 61, 0, 24, 25])
    assert TextReader(after).read(rows) == [ROWS[row]["text"] for row in rows]


def test_codes_are_the_labels_of_every_column_sorted_by_name(labelled):
    for documents in labelled:
        for column in ("domain", "language", "source", "split", "document"):
            codes, names = read_codes(documents, column, missing="-")
            expected = [value or "-" for value in read_table(documents)[column].to_pylist()]
            assert [names[code] for code in codes.tolist()] == expected and names == sorted(set(expected))


def test_codes_of_an_empty_table_are_empty(tmp_path):
    with ArtifactStore(tmp_path / "home").draft("documents") as out:
        with module.DocumentsWriter(out):
            pass
        documents = ArtifactStore(tmp_path / "home").commit(out)
    codes, names = read_codes(documents, "domain")
    assert len(codes) == 0 and names == []
