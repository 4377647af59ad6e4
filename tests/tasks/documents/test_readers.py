"""What readers make of files as they come: every record is kept, or rejected by itself, and counted."""

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import random
import tracemalloc
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents import readers as read
from eclectus.tasks.documents.ingest import read_duplicates, read_rejected
from eclectus.tasks.documents.sources import find_sources
from eclectus.tasks.documents.table import read_table
from tests.support.documents import GREEK, TURKISH, ingested, lines, rejected, texts


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_json_file_may_be_one_array_or_lines(store, tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"array.json{suffix}").write_bytes(pack(b' [\n {"text": "one"},\n {"text": "two"}, 5, {"text": ""}]'))
    (tmp_path / f"lines.json{suffix}").write_bytes(pack(b'[{"text": "seven"}]\n{"text": "three"}\n{"text": "four"}'))
    names = [f"array.json{suffix}", f"lines.json{suffix}"]
    documents = ingested(store, [tmp_path / name for name in names])
    assert read_table(documents)["text"].to_pylist() == ["one", "two", "three", "four"]
    assert rejected(documents) == [
        (names[0], 3, "not a record"),
        (names[0], 4, "empty"),
        (names[1], 1, "not a record"),
    ]


def test_a_line_too_long_to_hold_is_passed_over(store, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x" * 5000}, {"text": GREEK}))
    documents = ingested(store, [tmp_path / "a.jsonl"])
    assert rejected(documents) == [("a.jsonl", 1, "too long")]
    assert read_table(documents)["text"].to_pylist() == [GREEK]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_gives_its_whole_lines_and_one_fault(store, tmp_path, suffix):
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    source = random.Random(0)
    texts = [source.randbytes(1000).hex() for _ in range(300)]
    whole = pack(lines(*({"text": text} for text in texts)))
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / f"full.jsonl{suffix}").write_bytes(pack(lines({"text": GREEK})) + pack(lines({"text": TURKISH})))
    documents = ingested(store, [tmp_path])
    kept = read_table(documents)["text"].to_pylist()
    count = len(kept) - 2
    assert 150 < count < 300 and kept == [*texts[:count], GREEK, TURKISH]
    assert rejected(documents) == [(f"cut.jsonl{suffix}", count + 1, "damaged archive")]
    assert "truncated" in read_rejected(documents)["detail"][0].as_py()


def test_a_damaged_or_unreadable_file_in_the_middle_is_a_fault_and_the_others_are_read(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": GREEK}))
    (tmp_path / "b.jsonl.gz").write_bytes(b"this is no gzip")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 this is no parquet PAR1")
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "e.jsonl.zst").write_bytes(b"this is no zstd")
    (tmp_path / "f.jsonl").write_bytes(lines({"text": TURKISH}))
    documents = ingested(store, [tmp_path])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]
    assert rejected(documents) == [
        ("b.jsonl.gz", 1, "damaged archive"),
        ("c.parquet", None, "unreadable"),
        ("d.jsonl", None, "unreadable"),
        ("e.jsonl.zst", 1, "damaged archive"),
    ]


def test_parquet_rows_of_wrong_type_or_bad_utf8_are_rejected_one_by_one(store, tmp_path):
    texts = pa.array([GREEK.encode(), b"caf\xe9", None, b"fine"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"body": texts, "number": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": [1.5, 2.5]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "c.parquet")
    documents = ingested(store, [tmp_path], text_field="body")
    assert read_table(documents)["text"].to_pylist() == [GREEK, "fine"]
    assert rejected(documents) == [
        ("a.parquet", 2, "not UTF-8"),
        ("a.parquet", 3, "wrong type"),
        ("b.parquet", 1, "wrong type"),
        ("b.parquet", 2, "wrong type"),
        ("c.parquet", None, "no text"),
    ]


def test_a_damaged_parquet_row_group_does_not_take_the_others_with_it(store, tmp_path):
    texts = [random.Random(i).randbytes(500).hex() for i in range(300)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    begin = column.data_page_offset
    content[begin + 200 : begin + column.total_compressed_size] = bytes(column.total_compressed_size - 200)
    path.write_bytes(content)
    documents = ingested(store, [path])
    assert read_table(documents)["text"].to_pylist() == texts[:100] + texts[200:]
    assert rejected(documents) == [("a.parquet", 101, "unreadable")]
    assert "101 to 200" in read_rejected(documents)["detail"][0].as_py()


def test_a_saved_dataset_folder_streams_through_datasets(store, tmp_path):
    import datasets

    rows = {"text": [GREEK, TURKISH, GREEK, ""], "language": ["el", "tr", "el", "en"], "extra": [1, 2, 3, 4]}
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
    saved.save_to_disk(str(tmp_path / "saved"))
    for entry in (f"dataset:{tmp_path}/saved", f"dataset:{tmp_path}/saved::train", f"{tmp_path}/saved"):
        documents = ingested(store, [entry])
        assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]
        assert read_table(documents)["domain"].to_pylist() == ["saved", "saved"]
        assert [(line, reason) for _, line, reason in rejected(documents)] == [(4, "empty")]
        assert str(tmp_path) not in str(read_duplicates(documents).to_pylist())
    with pytest.raises(EclectusError, match="no split 'test'; it has train"):
        ingested(store, [f"dataset:{tmp_path}/saved::test"])


def test_a_dataset_folder_of_files_streams_through_load_dataset(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "owner" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": [GREEK, TURKISH]}), tmp_path / "owner" / "data" / "train-00000.parquet")
    documents = ingested(store, [f"dataset:{tmp_path}/owner"])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]


def test_a_damaged_file_in_a_local_dataset_is_a_fault_after_what_could_be_read(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "owner").mkdir()
    pq.write_table(pa.table({"text": [GREEK, TURKISH]}), tmp_path / "owner" / "train-00000.parquet")
    (tmp_path / "owner" / "train-00001.parquet").write_bytes(b"PAR1 damaged PAR1")
    documents = ingested(store, [f"dataset:{tmp_path}/owner"])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]
    assert [(line, reason) for _, line, reason in rejected(documents)] == [(3, "unreadable")]


def good(number):
    return {"id": number, "text": f"text {number}", "spans": [{"a": 1}, {"b": "}, {"}]}


@pytest.mark.parametrize("layout", ["one line", "a line each", "indented"])
@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        (b'{"text": "text 5", "score": NaN}', 1),
        (b'{"text": "text 5", "n": ' + b"1" * 5000 + b"}", 1),
        (b'{"text": "text 5", "id": "caf\xe9"}', 1),
        (b'{"text": "text 5"}}', 1),
        (b'{"text": "caf\xe9"}', 0),
        (b'{"text": "\\ud800"}', 0),
        (b'{"text": "deep", "n": ' + b"[" * 3000 + b"]" * 3000 + b"}", 0),
        (b'{"text": "no quote}', 0),
        (b'{"text": "no quote, "n": 1}', 0),
        (b'{"text": "no bracket", "l": [1, 2}', 0),
        (b'{"text": "no bracket"', 0),
        (b'{"text": "no comma" "n": 2}', 0),
        (b'{"text": "line\nend"}', 0),
        (b'{"text": "nul\0"}', 0),
        (b'{"te', 0),
        (b'"', 0),
        (b"nothing", 0),
        (b"17", 0),
    ],
)
def test_a_bad_record_in_an_array_costs_itself(store, tmp_path, bad, kept, layout):
    items = [json.dumps(good(i), indent=1 if layout == "indented" else None).encode() for i in range(40)]
    items[5] = bad
    separator = b", " if layout == "one line" else b",\n"
    (tmp_path / "a.JSON").write_bytes(b"[" + separator.join(items) + b"]")
    documents = ingested(store, [tmp_path / "a.JSON"])
    assert texts(documents) == [f"text {i}" for i in range(40) if i != 5 or kept]
    assert [line for _, line, _ in rejected(documents)] == [6] * (1 - kept)


def test_an_array_larger_than_what_may_be_held_is_read_and_only_a_record_too_large_is_lost(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr(read, "LONGEST_LINE", 2**20)
    records = [{"text": f"{i} " + "x" * 400_000} for i in range(60)]
    records[7]["text"] += "y" * 2**21
    for name, separator in (("a.json", b", "), ("b.json", b",\n")):
        (tmp_path / name).write_bytes(b"[" + separator.join(json.dumps(each).encode() for each in records) + b"]")
        tracemalloc.start()
        [source] = find_sources([str(tmp_path / name)], []).sources
        count = sum(1 for _ in read.read_records(source, "text", ["text"], 10**9, read.Position()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 60 and peak < 12 * 2**20
        documents = ingested(store, [tmp_path / name])
        assert [text.split()[0] for text in texts(documents)] == [str(i) for i in range(60) if i != 7]
        assert rejected(documents) == [(name, 8, "too long")]


def pretty(*records):
    return b"\n".join(json.dumps(each, indent=2).encode() for each in records)


A, B = {"text": "a"}, {"text": "b"}


@pytest.mark.parametrize(
    ("name", "content", "expected", "faults"),
    [
        ("a.json", lines(A, B), "ab", []),
        ("a.json", pretty(A), "a", []),
        ("a.json", pretty(A, B), "ab", []),
        ("a.json", pretty(A, B)[:-3], "a", [4]),
        ("a.json", pretty(A, {"text": 1, "l": [1]}, B).replace(b'"text": 1', b'"text" 1'), "ab", [4]),
        ("a.jsonl", b'{"text": "a"}{"text": "b"}', "ab", []),
        ("a.jsonl", b'{"text": "a"} {"text": "b"} {"te\n', "ab", [1]),
        ("a.jsonl", b'{"text": "a"},\n{"text": "b"},\n', "ab", []),
        ("a.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]', "ab", []),
        ("a.jsonl", b'{"text": "cut", "x":\n{"text": "a"}\n{"text": "cut\n{"text": "b"}\n', "ab", [1, 3]),
        ("a.jsonl", lines(A).replace(b"\n", b"\r\n") + lines(B), "ab", []),
        ("a.jsonl", lines(A).replace(b"\n", b"\r") + lines(B), "ab", []),
        ("a.jsonl", lines(A) + b"\0" * 100 + b"\n\0" + lines(B), "ab", [2]),
        ("a.json", b"\xef\xbb\xbf" + json.dumps([A, B]).encode(), "ab", []),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(A) + b"\xef\xbb\xbf" + lines(B), "ab", []),
        ("a.json", b"[" + lines(A) + b"]\n[" + lines(B) + b"]\n", "ab", []),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "ab", [3]),
        ("a.json", b'[{"text": "a"}, {"text": "b"},]\n\0\0', "ab", []),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}\n] and more\n', "ab", [3]),
    ],
)
def test_json_is_read_however_it_is_laid_out(store, tmp_path, name, content, expected, faults):
    (tmp_path / name).write_bytes(content)
    documents = ingested(store, [tmp_path / name])
    assert texts(documents) == list(expected)
    assert [line for _, line, _ in rejected(documents)] == faults


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named_once(store, tmp_path, name, encoding):
    if name == "a.txt" and encoding == "utf-16-le":
        pytest.skip("zeros between letters may be text")
    (tmp_path / name).write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode(encoding))
    (tmp_path / "good.jsonl").write_bytes(lines(A))
    documents = ingested(store, [tmp_path / name, tmp_path / "good.jsonl"])
    assert rejected(documents) == [(name, None, "not UTF-8")]
    assert encoding[:6].upper() in read_rejected(documents)["detail"][0].as_py()


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".zstd": zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compress,
}


@pytest.mark.parametrize("suffix", [*PACKERS, ".GZ"])
def test_archives_of_every_kind_have_any_number_of_members_and_may_break_off(store, tmp_path, suffix):
    pack = PACKERS[suffix.lower()]
    texts_ = [random.Random(i).randbytes(500).hex() for i in range(200)]
    members = [pack(lines(*({"text": text} for text in texts_[i : i + 50]))) for i in range(0, 200, 50)]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(members[0] + b"".join(members[1:]))
    array = json.dumps([{"text": f"array {i} {text}"} for i, text in enumerate(texts_)]).encode()
    (tmp_path / f"b.JSON{suffix}").write_bytes(pack(array)[:-3000])
    (tmp_path / f"c.csv{suffix}").write_bytes(pack(b"text,n\nc,1\n"))
    (tmp_path / f"d.txt{suffix}").write_bytes(pack(b"d"))
    (tmp_path / f"e.jsonl{suffix}").write_bytes(pack(lines(A)) + b"trailing")
    (tmp_path / f"f.jsonl{suffix}").write_bytes(lines(B))
    documents = ingested(store, [tmp_path], text_suffixes=[".txt"])
    kept = texts(documents)
    of_array = [text for text in kept if text.startswith("array")]
    assert kept == [*texts_, *of_array, "c", "d", "a", "b"]
    assert 100 < len(of_array) < 200 or suffix == ".bz2"
    assert [(file[0], line, reason) for file, line, reason in rejected(documents)] == [
        ("b", len(of_array) + 1, "damaged archive"),
        ("e", 2, "damaged archive"),
    ]
    assert "followed by other data" in read_rejected(documents)["detail"][1].as_py()


def test_zeros_between_members_pad_them(store, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(A)) + b"\0" * 70_000 + gzip.compress(lines(B)) + b"\0")
    assert texts(ingested(store, [tmp_path / "a.jsonl.gz"])) == ["a", "b"]


def test_csv_and_tsv_rows_are_records_of_named_columns(store, tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'id,text\n1,"one, with a comma"\n2,"two\nlines"\n3,a,b\n4,caf\xe9\ncaf\xe9,five\n6,"not closed\n'
        b'7,seven\n8,"with ""quotes"""\n\n9\n'
    )
    (tmp_path / "b.csv").write_bytes("\ufefftext;id\r\nacht;08\r\n".encode())
    (tmp_path / "c.tsv").write_bytes(b'id\ttext\n9\t"quoted\n10\the said "no"\n')
    (tmp_path / "d.csv").write_bytes(b"name,value\nx,1\n")
    documents = ingested(store, [tmp_path])
    assert [(row["name"], row["text"]) for row in read_table(documents).to_pylist()] == [
        ("1", "one, with a comma"), ("2", "two\nlines"), ("caf?", "five"), ("7", "seven"), ("8", 'with "quotes"'),
        ("08", "acht"), ("9", '"quoted'), ("10", 'he said "no"'),
    ]  # fmt: skip
    assert rejected(documents) == [
        ("a.csv", 5, "not CSV"),
        ("a.csv", 6, "not UTF-8"),
        ("a.csv", 8, "not CSV"),
        ("a.csv", 12, "not CSV"),
        ("d.csv", None, "no text"),
    ]


IDS = [uuid.UUID(int=2**127 + i) for i in range(3)]
BAD = pa.array([b"caf\xe9", b"b", b"c"], pa.binary()).cast(pa.string(), safe=False)
LABELS = {
    "binary(16)": (pa.array([each.bytes for each in IDS], pa.binary(16)), list(map(str, IDS))),
    "uuid": (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([each.bytes for each in IDS], pa.binary(16))), None),
    "list": (pa.array([[1], None, []]), [None] * 3),
    "struct": (pa.array([{"a": 1}] * 3), [None] * 3),
    "map": (pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int32())), [None] * 3),
    "decimal": (pa.array([decimal.Decimal("1.50")] * 3), ["1.50"] * 3),
    "date": (pa.array([datetime.date(2020, 1, 2)] * 3), ["2020-01-02"] * 3),
    "impossible date": (
        pa.array([-1_000_000, 10_000_000, 5], pa.int32()).cast(pa.date32()),
        [None, None, "1970-01-06"],
    ),
    "unknown zone": (pa.array([10**15] * 3).cast(pa.timestamp("us", "Mars/Phobos")), [None] * 3),
    "dates in a list": (pa.array([[10_000_000]] * 3, pa.list_(pa.int32())).cast(pa.list_(pa.date32())), [None] * 3),
    "boolean": (pa.array([True] * 3), [None] * 3),
    "null": (pa.nulls(3), [None] * 3),
    "bad UTF-8": (BAD, ["caf\ufffd", "b", "c"]),
    "bad UTF-8 in a dictionary": (BAD.dictionary_encode(), ["caf\ufffd", "b", "c"]),
    "large string": (pa.array(["a", "b", None], pa.large_string()), ["a", "b", None]),
    "string view": (pa.array(["a", "b", None], pa.string_view()), ["a", "b", None]),
    "unsigned": (pa.array([2**64 - 1] * 3, pa.uint64()), [str(2**64 - 1)] * 3),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_label_of_any_parquet_type_never_costs_the_record(store, tmp_path, kind):
    labels, names = LABELS[kind]
    pq.write_table(pa.table({"text": ["x", "y", "z"], "id": labels}), tmp_path / "a.parquet")
    documents = ingested(store, [tmp_path / "a.parquet"])
    assert texts(documents) == ["x", "y", "z"] and documents.statistics["rejected"] == 0
    assert read_table(documents)["name"].to_pylist() == (names or list(map(str, IDS)))


STRINGS = {
    "large": lambda texts_: pa.array(texts_, pa.large_string()),
    "view": lambda texts_: pa.array(texts_, pa.string_view()),
    "dictionary": lambda texts_: pa.array(texts_).dictionary_encode(),
    "binary": lambda texts_: pa.array([each and each.encode() for each in texts_], pa.binary()),
    "json": lambda texts_: pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts_)),
}


@pytest.mark.parametrize("kind", STRINGS)
def test_a_text_may_be_of_any_string_type(store, tmp_path, kind):
    pq.write_table(pa.table({"text": STRINGS[kind]([GREEK, None, "{}", ""])}), tmp_path / "a.parquet")
    documents = ingested(store, [tmp_path / "a.parquet"])
    assert texts(documents) == [GREEK, "{}"]
    assert [(line, reason) for _, line, reason in rejected(documents)] == [(2, "wrong type"), (4, "empty")]


@pytest.mark.parametrize("texts_", [pa.array([{"a": "x"}]), pa.array([["x"]]), LABELS["impossible date"][0], BAD])
def test_a_text_that_is_none_is_rejected_row_by_row(store, tmp_path, texts_):
    pq.write_table(pa.table({"text": texts_}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(lines(A))
    documents = ingested(store, [tmp_path])
    bad = 1 if texts_ is BAD else len(texts_)
    assert documents.statistics["rejected"] == bad and documents.statistics["documents"] == 1 + len(texts_) - bad


def test_a_column_of_labels_that_cannot_be_read_does_not_cost_the_texts(store, tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x", "y", "z"], "id": ["q" * 100] * 3})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    content, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(0).column(1)
    content[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(content)
    documents = ingested(store, [path])
    assert texts(documents) == ["x", "y", "z"] and read_table(documents)["name"].null_count == 3


def test_empty_row_groups_and_footers_that_are_encrypted_or_damaged_are_no_internal_error(store, tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as writer:
        for part in ([], ["a"], [], ["b"]):
            writer.write_table(pa.table({"text": pa.array(part, pa.string())}))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-4] + b"PARE")
    (tmp_path / "c.parquet").write_bytes(content[:-60] + bytes(40) + content[-20:])
    (tmp_path / "d.parquet").write_bytes(content[: len(content) // 2])
    documents = ingested(store, [tmp_path])
    assert texts(documents) == ["a", "b"]
    assert rejected(documents) == [(f"{name}.parquet", None, "unreadable") for name in "bcd"]
