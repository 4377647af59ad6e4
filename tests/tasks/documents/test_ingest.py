import gzip
import hashlib
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.ingest import (
    read_duplicates,
    read_rejected,
)
from eclectus.tasks.documents.table import read_table
from tests.support.documents import CHINESE, GREEK, TURKISH, ingested, lines, rejected


def test_a_document_is_named_by_the_hash_of_its_text_and_keeps_its_own_name(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        lines({"id": 7, "text": GREEK, "language": "el", "domain": "wiki", "source": "hand"}, {"text": TURKISH})
    )
    documents = ingested(store, [tmp_path / "a.jsonl"])
    first, second = read_table(documents).to_pylist()
    assert first["document"] == hashlib.sha256(GREEK.encode()).hexdigest()[:32]
    assert (first["name"], first["text"], first["language"]) == ("7", GREEK, "el")
    assert (first["domain"], first["source"], first["bytes"]) == ("wiki", "hand", len(GREEK.encode()))
    assert (second["name"], second["language"], second["domain"], second["source"]) == (None, None, "a", "a.jsonl")


def test_every_bad_line_is_rejected_with_file_line_reason_and_start(store, tmp_path):
    content = (
        b"\xef\xbb\xbf"
        + lines({"text": GREEK})
        + b"{not json\n"
        + b'{"text": "caf\xe9 au lait"}\n'
        + b"\n"
        + lines({"text": 12}, {"text": "  \n"}, {"body": "no text"}, ["text"], {"text": None}, {"text": "x" * 101})
        + b'{"text": "\\ud800 alone"}\n'
        + b'{"text": "with a NaN, as pandas writes it", "score": NaN}\n'
        + b'{"text": "the last line has no newline"}'
    )
    (tmp_path / "bad.jsonl").write_bytes(content)
    documents = ingested(store, [tmp_path / "bad.jsonl"], maximum_characters=100)
    assert rejected(documents) == [
        ("bad.jsonl", 2, "not JSON"),
        ("bad.jsonl", 3, "not UTF-8"),
        ("bad.jsonl", 5, "wrong type"),
        ("bad.jsonl", 6, "empty"),
        ("bad.jsonl", 7, "no text"),
        ("bad.jsonl", 8, "not a record"),
        ("bad.jsonl", 9, "wrong type"),
        ("bad.jsonl", 10, "too long"),
        ("bad.jsonl", 11, "not UTF-8"),
    ]
    assert documents.manifest()["rows"] == 3
    table = read_rejected(documents).to_pylist()
    assert table[0]["start"] == "{not json\n" and "caf" in table[1]["start"]
    assert "int" in table[2]["detail"] and "body" in table[4]["detail"] and "101" in table[7]["detail"]
    assert documents.statistics["rejected"] == 9
    assert documents.statistics["rejected_by_reason"]["wrong type"] == 2


def test_a_text_that_is_shorter_than_the_minimum_without_its_blanks_is_rejected(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "short" + " " * 500}, {"text": "long enough to stay"}))
    documents = ingested(store, [tmp_path / "a.jsonl"], minimum_characters=10)
    assert rejected(documents) == [("a.jsonl", 1, "too short")]


def test_exact_duplicates_are_kept_once_and_counted_across_files_and_formats(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": GREEK}, {"text": TURKISH}, {"id": "again", "text": GREEK}))
    pq.write_table(pa.table({"text": [TURKISH, CHINESE]}), tmp_path / "b.parquet")
    documents = ingested(store, [tmp_path])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH, CHINESE]
    kept = read_table(documents)["document"].to_pylist()
    assert read_duplicates(documents).to_pylist() == [
        {"file": "a.jsonl", "line": 3, "name": "again", "document": kept[0]},
        {"file": "b.parquet", "line": 1, "name": None, "document": kept[1]},
    ]


def test_text_files_are_one_document_each_with_their_folder_as_domain(store, tmp_path):
    (tmp_path / "novels" / ".git").mkdir(parents=True)
    (tmp_path / "novels" / "emma.txt").write_text(f"{GREEK}\n{TURKISH}\n")
    (tmp_path / "novels" / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "novels" / "cover.png").write_bytes(b"png")
    (tmp_path / "novels" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "novels" / "zipped.md.gz").write_bytes(gzip.compress(CHINESE.encode()))
    documents = ingested(store, [tmp_path])
    rows = read_table(documents).to_pylist()
    assert [(row["text"], row["domain"], row["source"]) for row in rows] == [
        (f"{GREEK}\n{TURKISH}\n", "novels", "novels/emma.txt"),
        (CHINESE, "novels", "novels/zipped.md.gz"),
    ]
    assert rejected(documents) == [("novels/latin1.txt", None, "not UTF-8")]
    assert documents.statistics["ignored_files"] == {".png": 1}


def test_the_limit_takes_the_first_documents_of_each_source(store, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*({"text": f"{name} {i}"} for i in range(10))))
    documents = ingested(store, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], documents_limit=2)
    assert read_table(documents)["text"].to_pylist() == ["a 0", "a 1", "b 0", "b 1"]


def test_nothing_kept_is_an_error_with_the_first_reason(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "x"}, {"body": "y"}))
    with pytest.raises(EclectusError, match=r"2 rejected, the first because there is no field 'text'.*a.jsonl, line 1"):
        ingested(store, [tmp_path / "a.jsonl"])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(EclectusError, match="hold no record"):
        ingested(store, [tmp_path / "empty.jsonl"])


def test_the_same_sources_give_the_same_artifact(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": GREEK}, {"text": TURKISH}, {"text": GREEK}) + b"bad\n")
    assert ingested(store, [tmp_path / "a.jsonl"]).digest == ingested(store, [tmp_path / "a.jsonl"]).digest


@pytest.mark.parametrize("text", [GREEK, TURKISH, "Árvíztűrő tükörfúrógép", "हिन्दी क़लम", "한국어 문장", "Ｆｕｌｌ ﬁne"])
def test_twins_in_other_unicode_forms_are_exact_duplicates_of_the_first_which_stays_as_it_came(store, tmp_path, text):
    forms = [
        text,
        *(unicodedata.normalize(form, text) for form in ("NFD", "NFC", "NFKD")),
        "  " + text.replace(" ", "\n\n"),
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"id": i, "text": each} for i, each in enumerate(forms))))
    documents = ingested(store, [tmp_path / "a.jsonl"])
    kept = read_table(documents).to_pylist()
    assert [row["text"] for row in kept] == [text]
    assert kept[0]["document"] == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert {row["document"] for row in read_duplicates(documents).to_pylist()} == {kept[0]["document"]}
    assert documents.statistics["duplicates"] == 4


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "true", '["el"]', '{"code": "el"}', "7", "1.5"])
def test_a_language_that_is_no_text_counts_as_absent_and_is_counted(store, tmp_path, written):
    text = f'{{"text": "one", "language": {written}}}\n' + '{"text": "two", "language": "el"}\n'
    (tmp_path / "a.jsonl").write_text(text)
    documents = ingested(store, [tmp_path / "a.jsonl"])
    assert read_table(documents)["language"].to_pylist() == [None, "el"]
    ignored = documents.statistics["labels_ignored"]
    assert list(ignored) == ["language"] and ignored["language"]["records"] == 1
    assert "a.jsonl, line 1" in ignored["language"]["first"]


@pytest.mark.parametrize("field", ["id", "work", "domain", "source"])
@pytest.mark.parametrize("written", ["NaN", "-Infinity", "false", "[1]", "{}"])
def test_no_label_is_made_of_what_names_nothing(store, tmp_path, field, written):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one", "{field}": {written}}}\n')
    documents = ingested(store, [tmp_path / "a.jsonl"])
    row = read_table(documents).to_pylist()[0]
    expected = {"name": None, "work": row["document"], "domain": "a", "source": "a.jsonl"}
    assert {name: row[name] for name in expected} == expected
    assert documents.statistics["labels_ignored"][field]["records"] == 1


def test_an_id_keeps_its_digits(store, tmp_path):
    ids = ["007", 7, 2**53 + 1, 2**63 - 1, 2**64 - 1, -1, "1e18", " x ", "e\u0301", 0, "nan", "0.10"]
    kept = [
        "007",
        "7",
        "9007199254740993",
        str(2**63 - 1),
        str(2**64 - 1),
        "-1",
        "1e18",
        "x",
        "e\u0301",
        "0",
        "nan",
        "0.10",
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"{i} text", "id": each} for i, each in enumerate(ids))))
    assert read_table(ingested(store, [tmp_path / "a.jsonl"]))["name"].to_pylist() == kept


def test_labels_that_are_one_in_unicode_are_one_and_odd_characters_stay(store, tmp_path):
    odd = ["a\nb", "a\tb", "<b>&|`", "\u202egnirts", "../../etc/passwd", "C:\\x", "x" * 20_000, "\x1b[31m"]
    twins = [unicodedata.normalize(form, "Ελλάδα") for form in ("NFC", "NFD")]
    labels = [*odd, *twins, "", "  \n ", None]
    fields = [{"text": f"{i} text", "domain": each, "source": each} for i, each in enumerate(labels)]
    (tmp_path / "a.jsonl").write_bytes(lines(*fields))
    documents = ingested(store, [tmp_path / "a.jsonl"])
    expected = [*odd, twins[0], twins[0]]
    assert read_table(documents)["domain"].to_pylist() == [*expected, "a", "a", "a"]
    assert read_table(documents)["source"].to_pylist() == [*expected, *["a.jsonl"] * 3]
    assert documents.statistics["labels_ignored"] == {}


def test_half_of_a_surrogate_pair_in_a_label_does_not_lose_the_record(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "domain": "a\\ud800", "id": "\\udfff7"}\n')
    row = read_table(ingested(store, [tmp_path / "a.jsonl"])).to_pylist()[0]
    assert (row["domain"], row["name"]) == ("a?", "?7")
