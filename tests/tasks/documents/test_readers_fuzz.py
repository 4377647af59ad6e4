"""Readers against files made at random: what goes in is counted here, independently of the code that reads it."""

import bz2
import gzip
import json
import lzma
import random
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from eclectus.tasks.documents.readers import Fault, Position, read_records
from eclectus.tasks.documents.sources import find_sources
from tests.support.documents import ingested, texts
from tests.support.random_records import COLUMNS, cut, made_text, made_up, record


@pytest.mark.parametrize("seed", range(24))
def test_every_record_of_random_json_is_kept_or_counted_as_rejected(store, tmp_path, seed):
    draw = random.Random(seed)
    made = [record(draw, i) for i in range(draw.randrange(1, 120))] + [(b'{"text": "the last"}', "the last")]
    layout = draw.choice(["lines", "array", "array of lines", "objects on a line", "indented"])
    if layout == "indented":
        made = [(json.dumps(json.loads(c.decode()), indent=1).encode(), t) for c, t in made if b"\xff" not in c]
        # A file that begins with an array is that array.
        made.insert(0, (b'{"text": "the first"}', "the first"))
    if layout == "objects on a line":
        made = [(content, text) for content, text in made if content.startswith(b"{")]
    contents = [content for content, _ in made]
    if layout.startswith("array"):
        whole = b" [" + draw.choice([b",", b",\n", b" ,\r\n\t"]).join(contents) + b"\n]"
    else:
        whole = (b" " if layout == "objects on a line" else b"\n").join(contents)
    suffix = draw.choice(["", ".gz", ".ZST"])
    pack = {"": bytes, ".gz": gzip.compress, ".ZST": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a{draw.choice(['.jsonl', '.json', '.NDJSON'])}{suffix}"
    path.write_bytes(pack(draw.choice([b"", b"\xef\xbb\xbf"]) + whole))
    documents = ingested(store, [path])
    assert texts(documents) == [text for _, text in made if text is not None]
    counts = documents.statistics
    assert counts["documents"] + counts["duplicates"] + counts["rejected"] == len(made)


@pytest.mark.parametrize("seed", range(12))
def test_a_record_cut_short_costs_no_other(store, tmp_path, seed):
    draw = random.Random(seed)
    made = [(json.dumps({"id": i, "text": f"{i} {made_text(draw)}", "x": made_up(draw)}), i) for i in range(60)]
    damaged = set(range(draw.randrange(1, 4), 59, 5))
    contents = [cut(draw, content.encode()) if i in damaged else content.encode() for content, i in made]
    whole = b"\n".join(contents)
    if seed % 2:
        whole = b"[" + draw.choice([b",", b",\n"]).join(contents) + b"]"
    (tmp_path / "a.json").write_bytes(whole)
    documents = ingested(store, [tmp_path / "a.json"])
    assert [int(text.split()[0]) for text in texts(documents)] == [i for i in range(60) if i not in damaged]
    assert documents.statistics["rejected"] == len(damaged)


def random_column(draw, rows):
    """A column of labels of some Arrow type."""
    numbers = [draw.choice([None, draw.randrange(2**31)]) for _ in range(rows)]
    words = [draw.choice([None, made_text(draw)]) for _ in range(rows)]
    raw = pa.array([draw.choice([None, draw.randbytes(16)]) for _ in range(rows)], pa.binary(16))
    days = pa.array(numbers, pa.int32())
    make = [
        lambda: pa.array(words),
        lambda: pa.array(words, pa.large_string()),
        lambda: pa.array(words).dictionary_encode(),
        lambda: pa.array([each and each * 1.0 for each in numbers], pa.float32()),
        lambda: pa.array(numbers, pa.int64()).cast(pa.decimal128(30, 2)),
        lambda: days.cast(pa.date32()),
        lambda: pa.array([each and each * 10**9 for each in numbers]).cast(pa.timestamp("ms", "UTC")),
        lambda: pa.array([each and [each] for each in numbers], pa.list_(pa.int64())),
        lambda: pa.array([each and {"a": each} for each in numbers], pa.struct([("a", pa.int64())])),
        lambda: raw,
        lambda: raw.cast(pa.binary()).cast(pa.string(), safe=False),
        lambda: raw.cast(pa.binary()).cast(pa.string(), safe=False).dictionary_encode(),
        lambda: pa.array([each and each > 2**30 for each in numbers]),
        lambda: pa.nulls(rows),
        lambda: pa.array(words, pa.string_view()),
    ]
    return draw.choice(make)()


@pytest.mark.parametrize("seed", range(24))
def test_every_row_of_a_random_parquet_schema_is_kept_or_counted_as_rejected(store, tmp_path, seed):
    draw = random.Random(seed)
    rows = draw.randrange(1, 700)
    values = [draw.choice([f"{i} {made_text(draw)}", f"{i}", None, "", f"{i} \0"]) for i in range(rows)]
    values[0] = "one at least"
    content = [value if value is None else value.encode() for value in values]
    bad = {i for i in range(1, rows) if values[i] and draw.random() < 0.1}
    content = [each + b"\xe9" if i in bad else each for i, each in enumerate(content)]
    column = pa.array(content, pa.binary())
    kind = draw.choice([pa.string(), pa.large_string(), pa.binary(), pa.string_view(), "dictionary"])
    if kind == "dictionary":
        column = column.cast(pa.string(), safe=False).dictionary_encode()
    elif kind != pa.binary():
        column = column.cast(pa.string(), safe=False).cast(kind, safe=False)
    table = {"text": column}
    for name in draw.sample(COLUMNS[1:], draw.randrange(5)):
        table[name] = random_column(draw, rows)
    pq.write_table(
        pa.table(table),
        tmp_path / "a.parquet",
        row_group_size=draw.choice([1, 7, 100, 1000]) if rows < 50 else draw.choice([100, 1000]),
        compression=draw.choice(["none", "snappy", "zstd", "gzip"]),
        data_page_version=draw.choice(["1.0", "2.0"]),
    )
    documents = ingested(store, [tmp_path / "a.parquet"])
    assert texts(documents) == [value for i, value in enumerate(values) if value and i not in bad]
    counts = documents.statistics
    assert counts["documents"] + counts["duplicates"] + counts["rejected"] == rows


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.json.bz2", "a.csv.xz"]
)
def test_bytes_changed_at_random_end_no_run_and_make_no_false_text(tmp_path, name):
    records = [{"id": i, "text": f"text {i}", "x": [{"a": 1}]} for i in range(30)]
    whole = {
        ".jsonl": "\n".join(map(json.dumps, records)),
        ".json": json.dumps(records, indent=1),
        ".csv": 'id,text\n1,"a ""b"" c"\n' * 9,
        ".tsv": 'id\ttext\n1\t"a"\n' * 9,
        ".txt": "text",
    }["." + name.split(".")[1]].encode()
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
    whole = packers.get(name.split(".")[-1], bytes)(whole)
    draw = random.Random(zlib.crc32(name.encode()))
    path = tmp_path / name
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(content) + 1)
            content[place : place + draw.choice([0, 1, 1, 5])] = draw.choice(
                [b"", b'"', b"\0", b"\xff", b"{", b"}", b"[", b"]", b",", b"\n", b"\\", draw.randbytes(3)]
            )
        path.write_bytes(content)
        [source] = find_sources([str(path)], [".txt"]).sources
        position = Position()
        for _, each in read_records(source, "text", COLUMNS, 10_000, position):
            assert isinstance(each, dict | Fault)
            if isinstance(each, Fault):
                each.detail.encode(), each.start.encode()
        assert position.digest.startswith("file-")
