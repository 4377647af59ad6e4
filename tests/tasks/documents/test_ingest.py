import gzip
import hashlib
import json
import os
import random
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents import readers as read
from eclectus.tasks.documents.digest_set import DigestMap
from eclectus.tasks.documents.ingest import (
    IngestSettings,
    check_sources,
    fingerprint,
    ingest,
    read_duplicates,
    read_rejected,
)
from eclectus.tasks.documents.table import read_table

GREEK = "Η Ελλάδα είναι χώρα της νοτιοανατολικής Ευρώπης."
TURKISH = "Türkiye'nin başkenti Ankara, en kalabalık şehri İstanbul'dur."
CHINESE = "中国是世界上历史最悠久的国家之一。"


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


def run(store, sources, **settings):
    with store.draft("documents") as out:
        ingest.function(settings=IngestSettings(sources=[str(each) for each in sources], **settings), out=out)
        return store.commit(out)


def lines(*records):
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in records)


def rejected(documents):
    return [(row["file"], row["line"], row["reason"]) for row in read_rejected(documents).to_pylist()]


def test_a_document_is_named_by_the_hash_of_its_text_and_keeps_its_own_name(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        lines({"id": 7, "text": GREEK, "language": "el", "domain": "wiki", "source": "hand"}, {"text": TURKISH})
    )
    documents = run(store, [tmp_path / "a.jsonl"])
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
    documents = run(store, [tmp_path / "bad.jsonl"], maximum_characters=100)
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


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_json_file_may_be_one_array_or_lines(store, tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"array.json{suffix}").write_bytes(pack(b' [\n {"text": "one"},\n {"text": "two"}, 5, {"text": ""}]'))
    (tmp_path / f"lines.json{suffix}").write_bytes(pack(b'[{"text": "seven"}]\n{"text": "three"}\n{"text": "four"}'))
    names = [f"array.json{suffix}", f"lines.json{suffix}"]
    documents = run(store, [tmp_path / name for name in names])
    assert read_table(documents)["text"].to_pylist() == ["one", "two", "three", "four"]
    assert rejected(documents) == [
        (names[0], 3, "not a record"),
        (names[0], 4, "empty"),
        (names[1], 1, "not a record"),
    ]


def test_a_text_that_is_shorter_than_the_minimum_without_its_blanks_is_rejected(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "short" + " " * 500}, {"text": "long enough to stay"}))
    documents = run(store, [tmp_path / "a.jsonl"], minimum_characters=10)
    assert rejected(documents) == [("a.jsonl", 1, "too short")]


def test_a_line_too_long_to_hold_is_passed_over(store, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x" * 5000}, {"text": GREEK}))
    documents = run(store, [tmp_path / "a.jsonl"])
    assert rejected(documents) == [("a.jsonl", 1, "too long")]
    assert read_table(documents)["text"].to_pylist() == [GREEK]


def test_exact_duplicates_are_kept_once_and_counted_across_files_and_formats(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": GREEK}, {"text": TURKISH}, {"id": "again", "text": GREEK}))
    pq.write_table(pa.table({"text": [TURKISH, CHINESE]}), tmp_path / "b.parquet")
    documents = run(store, [tmp_path])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH, CHINESE]
    kept = read_table(documents)["document"].to_pylist()
    assert read_duplicates(documents).to_pylist() == [
        {"file": "a.jsonl", "line": 3, "name": "again", "document": kept[0]},
        {"file": "b.parquet", "line": 1, "name": None, "document": kept[1]},
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_gives_its_whole_lines_and_one_fault(store, tmp_path, suffix):
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    source = random.Random(0)
    texts = [source.randbytes(1000).hex() for _ in range(300)]
    whole = pack(lines(*({"text": text} for text in texts)))
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / f"full.jsonl{suffix}").write_bytes(pack(lines({"text": GREEK})) + pack(lines({"text": TURKISH})))
    documents = run(store, [tmp_path])
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
    documents = run(store, [tmp_path])
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
    documents = run(store, [tmp_path], text_field="body")
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
    documents = run(store, [path])
    assert read_table(documents)["text"].to_pylist() == texts[:100] + texts[200:]
    assert rejected(documents) == [("a.parquet", 101, "unreadable")]
    assert "101 to 200" in read_rejected(documents)["detail"][0].as_py()


def test_text_files_are_one_document_each_with_their_folder_as_domain(store, tmp_path):
    (tmp_path / "novels" / ".git").mkdir(parents=True)
    (tmp_path / "novels" / "emma.txt").write_text(f"{GREEK}\n{TURKISH}\n")
    (tmp_path / "novels" / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "novels" / "cover.png").write_bytes(b"png")
    (tmp_path / "novels" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "novels" / "zipped.md.gz").write_bytes(gzip.compress(CHINESE.encode()))
    documents = run(store, [tmp_path])
    rows = read_table(documents).to_pylist()
    assert [(row["text"], row["domain"], row["source"]) for row in rows] == [
        (f"{GREEK}\n{TURKISH}\n", "novels", "novels/emma.txt"),
        (CHINESE, "novels", "novels/zipped.md.gz"),
    ]
    assert rejected(documents) == [("novels/latin1.txt", None, "not UTF-8")]
    assert documents.statistics["ignored_files"] == {".png": 1}


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("en.code.jsonl.gz", "code"),
        ("el.jsonl", "unknown"),
        ("train-00000-of-00010.jsonl", "unknown"),
        ("wiki/train-00000-of-00010.jsonl", "wiki"),
        ("arxiv-0007.jsonl", "arxiv"),
        ("ell_Grek.news.jsonl", "news"),
    ],
)
def test_a_file_name_says_the_domain_unless_it_only_numbers_a_shard_or_a_language(store, tmp_path, name, domain):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    content = lines({"text": GREEK})
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_table(run(store, [tmp_path / "in"]))["domain"].to_pylist() == [domain]


def test_a_saved_dataset_folder_streams_through_datasets(store, tmp_path):
    import datasets

    rows = {"text": [GREEK, TURKISH, GREEK, ""], "language": ["el", "tr", "el", "en"], "extra": [1, 2, 3, 4]}
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)})
    saved.save_to_disk(str(tmp_path / "saved"))
    for entry in (f"dataset:{tmp_path}/saved", f"dataset:{tmp_path}/saved::train", f"{tmp_path}/saved"):
        documents = run(store, [entry])
        assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]
        assert read_table(documents)["domain"].to_pylist() == ["saved", "saved"]
        assert [(line, reason) for _, line, reason in rejected(documents)] == [(4, "empty")]
        assert str(tmp_path) not in str(read_duplicates(documents).to_pylist())
    with pytest.raises(EclectusError, match="no split 'test'; it has train"):
        run(store, [f"dataset:{tmp_path}/saved::test"])


def test_a_dataset_folder_of_files_streams_through_load_dataset(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "owner" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": [GREEK, TURKISH]}), tmp_path / "owner" / "data" / "train-00000.parquet")
    documents = run(store, [f"dataset:{tmp_path}/owner"])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]


def test_a_damaged_file_in_a_local_dataset_is_a_fault_after_what_could_be_read(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "owner").mkdir()
    pq.write_table(pa.table({"text": [GREEK, TURKISH]}), tmp_path / "owner" / "train-00000.parquet")
    (tmp_path / "owner" / "train-00001.parquet").write_bytes(b"PAR1 damaged PAR1")
    documents = run(store, [f"dataset:{tmp_path}/owner"])
    assert read_table(documents)["text"].to_pylist() == [GREEK, TURKISH]
    assert [(line, reason) for _, line, reason in rejected(documents)] == [(3, "unreadable")]


def test_a_dataset_that_cannot_be_reached_is_an_error_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EclectusError, match="data set 'nobody/nothing' cannot be reached on the hub"):
        fingerprint(IngestSettings(sources=["dataset:nobody/nothing"]))


def test_the_limit_takes_the_first_documents_of_each_source(store, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*({"text": f"{name} {i}"} for i in range(10))))
    documents = run(store, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], documents_limit=2)
    assert read_table(documents)["text"].to_pylist() == ["a 0", "a 1", "b 0", "b 1"]


def test_what_does_not_exist_is_one_error_that_names_it_and_the_fix(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"pdf")
    for sources, message in (
        ([], "no sources are set"),
        ([tmp_path / "gone.jsonl"], "gone.jsonl' does not exist"),
        (["someone/something"], "dataset:someone/something"),
        (["s3://bucket/x.jsonl"], "is a URL"),
        ([tmp_path / "*.jsonl"], r"glob .* matches no file"),
        ([tmp_path / "empty"], "holds no file"),
        ([tmp_path / "a.pdf"], "suffix that cannot be read; these can: .jsonl"),
    ):
        with pytest.raises(EclectusError, match=message):
            check_sources(IngestSettings(sources=[str(each) for each in sources]))


def test_nothing_kept_is_an_error_with_the_first_reason(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "x"}, {"body": "y"}))
    with pytest.raises(EclectusError, match=r"2 rejected, the first because there is no field 'text'.*a.jsonl, line 1"):
        run(store, [tmp_path / "a.jsonl"])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(EclectusError, match="hold no record"):
        run(store, [tmp_path / "empty.jsonl"])


def test_globs_read_each_file_once_and_equal_names_stay_distinct(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(lines({"text": folder}))
    written = [str(tmp_path / "x" / "a.jsonl"), str(tmp_path / "y" / "a.jsonl"), str(tmp_path / "**" / "*.jsonl")]
    found = check_sources(IngestSettings(sources=written)).sources
    assert [source.name for source in found] == ["a.jsonl", "1/a.jsonl"]
    found = check_sources(IngestSettings(sources=written[2:])).sources
    assert [source.name for source in found] == ["x/a.jsonl", "y/a.jsonl"]


def test_a_changed_file_changes_the_fingerprint_and_a_moved_folder_does_not(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_bytes(lines({"text": GREEK}))
    before = fingerprint(IngestSettings(sources=[str(tmp_path / "x")]))
    os.rename(tmp_path / "x", tmp_path / "y")
    assert fingerprint(IngestSettings(sources=[str(tmp_path / "y")])) == before
    (tmp_path / "y" / "a.jsonl").write_bytes(lines({"text": TURKISH}))
    changed = fingerprint(IngestSettings(sources=[str(tmp_path / "y")]))
    assert changed.keys() == before.keys() == {"source.0.a.jsonl"} and changed != before
    for i in range(100):
        (tmp_path / "y" / f"{i}.jsonl").write_bytes(lines({"text": str(i)}))
    assert list(fingerprint(IngestSettings(sources=[str(tmp_path / "y")]))) == ["source.0.101-files"]


def test_the_same_sources_give_the_same_artifact(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": GREEK}, {"text": TURKISH}, {"text": GREEK}) + b"bad\n")
    assert run(store, [tmp_path / "a.jsonl"]).digest == run(store, [tmp_path / "a.jsonl"]).digest


def test_a_digest_map_agrees_with_a_dict_whatever_its_size():
    source = random.Random(1)
    pool = [source.randbytes(15) + b"\0" for _ in range(300)] + [source.randbytes(16) for _ in range(700)]
    digests = [source.choice(pool) for _ in range(5000)]
    small, reference = DigestMap(recent=16), {}
    for start in range(0, len(digests), 37):
        part = digests[start : start + 37]
        values = [source.randbytes(14) + b"\0\0" for _ in part]
        expected = []
        for digest, value in zip(part, values, strict=True):
            expected.append(reference.get(digest))
            reference.setdefault(digest, value)
        assert small.add(part, values) == expected
    assert len(small) == len(reference)


@pytest.mark.parametrize("text", [GREEK, TURKISH, "Árvíztűrő tükörfúrógép", "हिन्दी क़लम", "한국어 문장", "Ｆｕｌｌ ﬁne"])
def test_twins_in_other_unicode_forms_are_exact_duplicates_of_the_first_which_stays_as_it_came(store, tmp_path, text):
    forms = [
        text,
        *(unicodedata.normalize(form, text) for form in ("NFD", "NFC", "NFKD")),
        "  " + text.replace(" ", "\n\n"),
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"id": i, "text": each} for i, each in enumerate(forms))))
    documents = run(store, [tmp_path / "a.jsonl"])
    kept = read_table(documents).to_pylist()
    assert [row["text"] for row in kept] == [text]
    assert kept[0]["document"] == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert {row["document"] for row in read_duplicates(documents).to_pylist()} == {kept[0]["document"]}
    assert documents.statistics["duplicates"] == 4


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "true", '["el"]', '{"code": "el"}', "7", "1.5"])
def test_a_language_that_is_no_text_counts_as_absent_and_is_counted(store, tmp_path, written):
    text = f'{{"text": "one", "language": {written}}}\n' + '{"text": "two", "language": "el"}\n'
    (tmp_path / "a.jsonl").write_text(text)
    documents = run(store, [tmp_path / "a.jsonl"])
    assert read_table(documents)["language"].to_pylist() == [None, "el"]
    ignored = documents.statistics["labels_ignored"]
    assert list(ignored) == ["language"] and ignored["language"]["records"] == 1
    assert "a.jsonl, line 1" in ignored["language"]["first"]


@pytest.mark.parametrize("field", ["id", "work", "domain", "source"])
@pytest.mark.parametrize("written", ["NaN", "-Infinity", "false", "[1]", "{}"])
def test_no_label_is_made_of_what_names_nothing(store, tmp_path, field, written):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one", "{field}": {written}}}\n')
    documents = run(store, [tmp_path / "a.jsonl"])
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
    assert read_table(run(store, [tmp_path / "a.jsonl"]))["name"].to_pylist() == kept


def test_labels_that_are_one_in_unicode_are_one_and_odd_characters_stay(store, tmp_path):
    odd = ["a\nb", "a\tb", "<b>&|`", "\u202egnirts", "../../etc/passwd", "C:\\x", "x" * 20_000, "\x1b[31m"]
    twins = [unicodedata.normalize(form, "Ελλάδα") for form in ("NFC", "NFD")]
    labels = [*odd, *twins, "", "  \n ", None]
    fields = [{"text": f"{i} text", "domain": each, "source": each} for i, each in enumerate(labels)]
    (tmp_path / "a.jsonl").write_bytes(lines(*fields))
    documents = run(store, [tmp_path / "a.jsonl"])
    expected = [*odd, twins[0], twins[0]]
    assert read_table(documents)["domain"].to_pylist() == [*expected, "a", "a", "a"]
    assert read_table(documents)["source"].to_pylist() == [*expected, *["a.jsonl"] * 3]
    assert documents.statistics["labels_ignored"] == {}


def test_half_of_a_surrogate_pair_in_a_label_does_not_lose_the_record(store, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one", "domain": "a\\ud800", "id": "\\udfff7"}\n')
    row = read_table(run(store, [tmp_path / "a.jsonl"])).to_pylist()[0]
    assert (row["domain"], row["name"]) == ("a?", "?7")
