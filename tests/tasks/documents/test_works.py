import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.table import DocumentsWriter, parts, read_table
from eclectus.tasks.documents.works import work_of_name
from tests.support.topics import make, write_documents


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


@pytest.mark.parametrize(
    ("name", "source", "work"),
    [
        ("shakespeare-milton:richard_iii_gut.txt#5", "shakespeare-milton", "shakespeare-milton:richard_iii_gut.txt"),
        ("emma#57", "janeausten", "janeausten:emma"),
        ("emma#57", "novels.jsonl.gz", "novels.jsonl.gz:emma"),
        ("emma#57", "train-00003-of-00008.parquet", "train.parquet:emma"),
        ("emma#57", "letters-1821.jsonl", "letters-1821.jsonl:emma"),
        ("lohelp:a.html", "lohelp", None),
        ("issue #12a", "tracker", None),
        ("#12", "tracker", None),
        ("12", "gcide", None),
        (None, None, None),
    ],
)
def test_an_id_that_ends_in_a_number_sign_and_digits_names_a_piece_of_a_work_of_its_source(name, source, work):
    assert work_of_name(name, source) == work


def test_a_work_is_the_records_field_else_the_id_without_its_piece_else_the_document(store, tmp_path):
    rows = [
        {"id": "a#1", "text": "one", "work": "the book"},
        {"id": "a#1", "text": "two"},
        {"id": "a#22", "text": "three", "book": "other"},
        {"id": "b", "text": "four"},
        {"text": "five", "work": 7},
        {"id": "c#1", "text": "six", "work": " "},
    ]
    for name in ("one.jsonl", "two.jsonl"):
        lines = [json.dumps(row | {"text": f"{row['text']} in {name}"}) for row in rows]
        (tmp_path / name).write_text("\n".join(lines))
    sources = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    table = read_table(make(store, ingest, settings=IngestSettings(sources=sources))).to_pylist()
    own = table[3]["document"]
    expected = ["the book", "one.jsonl:a", "one.jsonl:a", own, "7", "one.jsonl:c"]
    assert [row["work"] for row in table[:6]] == expected
    shared = {row["work"] for row in table[:6]} & {row["work"] for row in table[6:]}
    assert shared == {"the book", "7"}, "only a field that says so joins two sources"
    table = read_table(make(store, ingest, settings=IngestSettings(sources=sources[:1], work_field="book"))).to_pylist()
    assert [row["work"] for row in table[:3]] == ["one.jsonl:a", "one.jsonl:a", "other"]
    table = read_table(make(store, ingest, settings=IngestSettings(sources=sources[:1], work_field="id"))).to_pylist()
    assert [row["work"] for row in table[:4]] == ["a#1", "a#1", "a#22", "b"]


def test_a_document_that_is_its_own_work_costs_nothing_in_the_file_and_is_never_null_when_read(store):
    documents = write_documents(store, [{"text": f"text {i}", "language": "en", "domain": "d"} for i in range(10)])
    read = read_table(documents, ["work", "document"])
    assert read["work"].to_pylist() == read["document"].to_pylist()
    with store.draft("documents") as out:
        again = read_table(documents)
        with DocumentsWriter(out) as writer:
            writer.write(again)
        copied = store.commit(out)
    assert pq.read_table(parts(copied)[0])["work"].null_count == 10
    assert read_table(documents, ["language"], [("work", "==", read["work"][3].as_py())]).num_rows == 1


def test_documents_made_before_there_were_works_are_read_with_works_from_their_names(store):
    documents = write_documents(store, [{"text": f"text {i}", "language": "en", "domain": "d"} for i in range(4)])
    path = parts(documents)[0]
    table = pq.read_table(path).drop_columns(["work", "name", "source"])
    names = pa.array(["book#0", "book#1", "page", None])
    path.chmod(0o644)
    pq.write_table(table.append_column("name", names).append_column("source", pa.array(["library"] * 4)), path)
    read = read_table(documents, ["document", "work"]).to_pylist()
    assert [row["work"] for row in read[:2]] == ["library:book"] * 2
    assert [row["work"] for row in read[2:]] == [row["document"] for row in read[2:]]
