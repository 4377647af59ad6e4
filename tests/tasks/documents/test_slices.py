"""Sources in slices: the same documents, rejected records and duplicates as read from beginning to end, wherever they
are cut; and of a corpus that has grown only the slices with news are read."""

import gzip
import json
import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents import fingerprints, readers
from eclectus.tasks.documents.ingest import IngestSettings, ingest, read_duplicates, read_rejected
from eclectus.tasks.documents.intake import documents_parts, exact_duplicates, reading, slices
from eclectus.tasks.documents.intake.read_slices import _Intake
from eclectus.tasks.documents.intake.slices import batches, survey
from eclectus.tasks.documents.readers import Position, read_records
from eclectus.tasks.documents.sources import find_sources
from eclectus.tasks.documents.table import parts, read_table
from tests.support.documents import ingested, lines, rejected, texts
from tests.support.random_records import cut, record

SMALL = {"part_megabytes": 0.002}
"""Slices of 250 bytes."""


@pytest.fixture
def folder(tmp_path):
    """Of sources: apart from the store."""
    path = tmp_path / "in"
    path.mkdir()
    return path


def everything(documents):
    """What an artifact says: all rows, and what is counted."""
    tables = [read_table(documents), read_rejected(documents), read_duplicates(documents)]
    return [*(table.to_pylist() for table in tables), documents.statistics]


def cut_and_whole(store, sources, **settings):
    """The artifact of small slices, after it was found to be that of one slice."""
    in_slices = ingested(store, sources, **{**SMALL, **settings})
    assert everything(in_slices) == everything(ingested(store, sources, **settings))
    return in_slices


def slices_of(path, megabytes=0.002):
    settings = IngestSettings(sources=[str(path)], part_megabytes=megabytes)
    found = find_sources(settings.sources, settings.text_suffixes).sources
    return [each.slices for each in survey(found, settings.slice_bytes, settings.text_field)]


def messy(draw, count):
    """Lines of records, whole or cut short, alone or several on a line, over several lines, blank ones between."""
    for number in range(count):
        content, text = record(draw, number)
        kind = draw.randrange(20)
        if kind == 0:
            content = cut(draw, content)
        elif kind == 1 and text is not None:
            content = json.dumps(json.loads(content.decode()), indent=draw.choice([0, 1, 3])).encode()
        elif kind == 2:
            content = b'{"text": "open", "x": [' + draw.choice([b"\n", b'{"y":\n']) + content
        elif kind == 3:
            content += draw.choice([b" ", b", "]) + json.dumps({"text": f"second {number}"}).encode()
        yield content + draw.choice([b"\n"] * 8 + [b"\r\n", b"\n\n", b"\n \t\n", b"\n\0\0\n"])


@pytest.mark.parametrize("seed", range(20))
def test_a_file_that_is_cut_anywhere_reads_as_a_whole(store, tmp_path, seed):
    draw = random.Random(seed)
    content = b"".join(messy(draw, draw.randrange(1, 250))) + b'{"text": "the last"}'
    (tmp_path / "a.jsonl").write_bytes(
        draw.choice([b"", b"\xef\xbb\xbf"]) + content + draw.choice([b"", b"\n", b"\r\n"])
    )
    cut_and_whole(store, [tmp_path / "a.jsonl"], part_megabytes=draw.choice([0.0004, 0.002, 0.01]))


def test_most_cuts_of_clean_lines_are_made_and_every_byte_is_in_one_slice(store, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*({"id": i, "text": f"größer {i} 中国 🙂"} for i in range(400))))
    [found] = slices_of(path)
    ends = [each.end for each in found]
    assert len(found) > path.stat().st_size / 250 * 0.9 and ends[-1] == path.stat().st_size
    assert [each.begin for each in found] == [0, *ends[:-1]]
    assert all(path.read_bytes()[end - 1 : end] == b"\n" for end in ends)
    assert len(parts(cut_and_whole(store, [path]))) > 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"text": f"text {i}"} for i in range(100)], indent=1).encode()),
        ("a.jsonl", b"\n".join(json.dumps({"text": f"text {i}"}, indent=1).encode() for i in range(100))),
        ("a.jsonl", "\n".join(json.dumps({"text": f"text {i}"}) for i in range(100)).encode("utf-16")),
        ("a.jsonl", gzip.compress(lines(*({"text": random.Random(i).randbytes(99).hex()} for i in range(100))))),
        ("a.jsonl", lines(*({"text": f"text {i}"} for i in range(100))).replace(b"\n", b"\r")),
        ("a.csv", b"text\n" + b"".join(b'"text\n%d"\n' % i for i in range(100))),
    ],
)
def test_what_is_not_lines_of_objects_is_not_cut(store, folder, name, content):
    (folder / name).write_bytes(content)
    (folder / "b.jsonl").write_bytes(lines({"text": "another"}))
    assert [len(each) for each in slices_of(folder)] == [1, 1]
    cut_and_whole(store, [folder])


def test_an_object_that_goes_on_after_a_cut_is_read_with_what_follows(store, tmp_path, monkeypatch):
    begins = b'{"text": "goes on", "x": [\n' + lines({"y": "z" * 230})
    content = lines(*({"text": f"before {i}"} for i in range(40))) + begins
    (tmp_path / "a.jsonl").write_bytes(content + lines(*({"text": f"after {i}"} for i in range(40))))
    joined = []

    def spy(first, second):
        joined.append(second)
        return slices.rejoined(first, second)

    monkeypatch.setattr(reading, "rejoined", spy)
    # Cuts in all places where the lines around allow it: one is behind {"y": ...}.
    cut_and_whole(store, [tmp_path / "a.jsonl"], part_megabytes=1e-6)
    assert joined


def test_lines_are_numbered_in_the_file_and_not_in_the_slice(store, tmp_path):
    records = [f'{{"text": "text {i}"}}' if i % 50 else "{bad" for i in range(1, 1001)]
    records[700] = records[3]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    documents = cut_and_whole(store, [tmp_path / "a.jsonl"])
    assert rejected(documents) == [("a.jsonl", i, "not JSON") for i in range(50, 1001, 50)]
    assert [row["line"] for row in read_duplicates(documents).to_pylist()] == [701]


def test_a_label_that_is_ignored_is_named_with_its_line_in_the_file(store, tmp_path):
    values = [1 if i == 900 else "en" for i in range(1, 1001)]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"{i}", "language": v} for i, v in enumerate(values))))
    ignored = cut_and_whole(store, [tmp_path / "a.jsonl"]).statistics["labels_ignored"]
    assert "a.jsonl, line 900" in ignored["language"]["first"]


def test_parquet_is_cut_between_row_groups_and_keeps_its_row_numbers(store, folder):
    values = [f"text {i} {'x' * (i % 90)}" if i % 97 else None for i in range(800)]
    pq.write_table(pa.table({"id": range(800), "text": values}), folder / "a.parquet", row_group_size=50)
    pq.write_table(pa.table({"text": values[:10]}), folder / "b.parquet")
    pq.write_table(pa.table({"body": values}), folder / "c.parquet", row_group_size=50)
    counts = [len(each) for each in slices_of(folder)]
    assert counts[0] == 16 and counts[1:] == [1, 1]
    documents = cut_and_whole(store, [folder])
    assert rejected(documents)[:3] == [("a.parquet", i, "wrong type") for i in (1, 98, 195)]


def test_a_damaged_row_group_of_a_parquet_file_that_is_cut_costs_itself(store, tmp_path):
    values = [random.Random(i).randbytes(300).hex() for i in range(500)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": values}), path, row_group_size=50, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + 200 : column.data_page_offset + 3000] = bytes(2800)
    path.write_bytes(content)
    documents = cut_and_whole(store, [path], part_megabytes=0.1)
    assert texts(documents) == values[:150] + values[200:]
    assert "151 to 200" in read_rejected(documents)["detail"][0].as_py()


def test_small_sources_are_read_together_in_order(store, folder):
    for i in range(300):
        (folder / f"{i:03d}.jsonl").write_bytes(lines({"text": f"text {i}"}) if i % 7 else b"")
    (folder / "150b.txt").write_text("one of another kind " * 30)
    settings = IngestSettings(sources=[str(folder)], **SMALL)
    found = find_sources(settings.sources, settings.text_suffixes).sources
    together = batches(survey(found, settings.slice_bytes, "text"), settings.slice_bytes)
    assert 20 < len(together) < 150
    assert [source.name for each in together for source, _ in each.reads] == [source.name for source in found]
    cut_and_whole(store, [folder])


@pytest.mark.parametrize("limit", [40, 399, 401, 5000])
def test_a_limit_counts_over_the_slices_and_files_of_an_entry(store, tmp_path, limit):
    for entry in ("a", "b"):
        (tmp_path / entry).mkdir()
        for name in "xyz":
            content = lines(*({"text": f"{entry} {name} {i % 90}"} for i in range(200)))
            (tmp_path / entry / f"{name}.jsonl").write_bytes(content.replace(b"8}", b"8"))
    documents = cut_and_whole(store, [tmp_path / "a", tmp_path / "b"], documents_limit=limit)
    counts = documents.statistics
    taken = counts["documents"] + counts["duplicates"] + counts["rejected"]
    assert taken == 2 * min(limit, 600)


def test_a_line_too_long_to_hold_is_one_fault_of_a_slice(store, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 5_000)
    long = [{"text": "x" * 100_000}, {"text": "y" * 4_000}]
    records = [{"text": f"text {i}"} for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(lines(*records[:100], long[0], *records[100:200], long[1], *records[200:]))
    documents = cut_and_whole(store, [tmp_path / "a.jsonl"])
    assert rejected(documents) == [("a.jsonl", 101, "too long")]
    assert len(slices_of(tmp_path / "a.jsonl")[0]) > 20 and len(texts(documents)) == 301


def test_memory_is_that_of_a_row_group_however_much_a_file_unpacks_to(store, tmp_path):
    peaks = []
    for count in (3_000, 9_000):
        with gzip.open(tmp_path / f"{count}.jsonl.gz", "wb", compresslevel=1) as file:
            for i in range(count):
                file.write(lines({"text": f"{i} " + random.Random(i % 100).randbytes(400).hex()}))
        tracemalloc.start()
        documents = ingested(store, [tmp_path / f"{count}.jsonl.gz"], part_megabytes=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert documents.statistics["bytes"] > 7e6 and peaks[1] < peaks[0] + 1e6
    assert len(parts(documents)) > 3 and len(texts(documents)) == 9_000


def test_exact_duplicates_are_those_of_a_dict_whatever_the_blocks(tmp_path, monkeypatch):
    random_ = np.random.default_rng(0)
    pool = np.concatenate(
        [random_.integers(0, 2**64, (200, 2), np.uint64), np.array([[0, 0], [2**64 - 1, 2**64 - 1]], np.uint64)]
    )
    pool = np.concatenate([pool, pool[:100] ^ np.array([0, 1], np.uint64)])
    paths, rows, every = [], [], []
    for number, count in enumerate((500, 0, 1, 900, 300)):
        keys = pool[random_.integers(0, len(pool), count)]
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        np.save(tmp_path / f"{number}.npy", np.column_stack([keys[order], order.astype(np.uint64)]))
        paths.append(tmp_path / f"{number}.npy")
        rows.append(count)
        every += map(tuple, keys.tolist())
    first, expected = {}, []
    for row, key in enumerate(every):
        if first.setdefault(key, row) != row:
            expected.append((row, first[key]))
    for size in (10**6, 100, 7):
        monkeypatch.setattr(exact_duplicates, "KEYS_PER_BLOCK", size)
        found = exact_duplicates.exact_duplicates(paths, rows)
        assert list(zip(*(each.tolist() for each in found), strict=True)) == expected


def test_parts_hold_what_they_may_and_most_of_them_outlive_what_comes_in_between():
    draw = random.Random(0)
    keys, sizes = [draw.randbytes(32).hex() for _ in range(400)], [draw.randrange(1, 13) for _ in range(400)]
    made = documents_parts.assembled(keys, sizes, 100)
    assert [number for each in made for number in each] == list(range(400))
    held = [sum(sizes[i] for i in each) for each in made]
    assert max(held) <= 100 and min(held[:-1]) >= 50
    names = {tuple(keys[i] for i in each) for each in made}
    keys[40:40], sizes[40:40] = [draw.randbytes(32).hex() for _ in range(3)], [9, 9, 9]
    again = {tuple(keys[i] for i in each) for each in documents_parts.assembled(keys, sizes, 100)}
    assert len(names & again) > 0.8 * len(names)
    assert documents_parts.assembled(keys[:5], [10] * 5, 100) == [range(5)]
    assert documents_parts.assembled(keys[:3], [0, 0, 0], 100) == []


@pytest.fixture
def reads(monkeypatch):
    """Names of what is read, and not found, by every call."""
    seen, over_parts = [], reading.over_parts

    def spy(function, parts, *rest):
        done = over_parts(function, parts, *rest)
        seen.append([part.name.split()[-1] for part, each in zip(parts, done, strict=True) if not each.found])
        return done

    monkeypatch.setattr(reading, "over_parts", spy)
    return seen


def test_of_a_corpus_that_has_grown_only_the_slices_with_news_are_read(run, store, folder, reads):
    for name in "abcdefgh":
        records = ({"id": f"{name}{i}", "text": f"text {name} {i} {'word ' * (i % 30)}"} for i in range(200))
        (folder / f"{name}.jsonl").write_bytes(lines(*records))
    settings = IngestSettings(sources=[str(folder)], part_megabytes=0.05)

    def grown():
        documents = ingest(settings=settings)
        assert everything(documents) == everything(ingested(store, [folder]))
        return documents

    before = grown()
    count = len(reads.pop(0))
    reads.clear()
    with open(folder / "c.jsonl", "ab") as file:
        file.write(lines({"text": "text a 3 word word word"}, {"text": "new"}))
    after = grown()
    assert reads[0] == ["c.jsonl"]
    kept = set(before.digests().values()) & set(after.digests().values())
    assert len(kept) >= len(parts(after)) - 3
    (folder / "d2.jsonl").write_bytes(lines({"text": "in between"}))
    reads.clear()
    grown()
    assert reads[0] == ["d2.jsonl"]
    (folder / "a.jsonl").unlink()
    reads.clear()
    # The first texts of other files are duplicates no more.
    grown()
    assert reads[0] == []
    content = (folder / "h.jsonl").read_bytes()
    (folder / "h.jsonl").write_bytes(
        content.replace(b"text h 189 ", b"TEXT h 189 ").replace(b"text h 3 ", b"TEXT h 3 ")
    )
    reads.clear()
    grown()
    assert reads[0] == ["h.jsonl"] * 2 and count > 20


def test_a_file_that_is_rewritten_while_its_slices_are_read_is_an_error_and_leaves_nothing(run, tmp_path, monkeypatch):
    path, calls = tmp_path / "a.jsonl", []
    path.write_bytes(lines(*({"text": f"text {i:05d}"} for i in range(2000))))
    take = _Intake.take

    def change(self, source, number, line, one):
        calls.append(line)
        if len(calls) % 1500 == 1:
            path.write_bytes(lines(*({"text": f"{len(calls)} {i:05d}"} for i in range(2000))))
        take(self, source, number, line, one)

    monkeypatch.setattr(_Intake, "take", change)
    with pytest.raises(EclectusError, match=r"source\.0\.a\.jsonl twice, and both times it changed meanwhile"):
        ingest(settings=IngestSettings(sources=[str(path)], part_megabytes=0.05))
    monkeypatch.setattr(_Intake, "take", take)
    documents = ingest(settings=IngestSettings(sources=[str(path)], part_megabytes=0.05))
    assert texts(documents) == [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_what_a_file_gets_while_it_is_read_belongs_to_the_next_run(run, tmp_path, monkeypatch):
    path, take = tmp_path / "a.jsonl", _Intake.take
    path.write_bytes(lines(*({"text": f"text {i}"} for i in range(100))))

    def grow(self, source, number, line, one):
        with open(path, "ab") as file:
            file.write(lines({"text": f"later {line}"}))
        take(self, source, number, line, one)

    monkeypatch.setattr(_Intake, "take", grow)
    settings = IngestSettings(sources=[str(path)])
    assert texts(ingest(settings=settings)) == [f"text {i}" for i in range(100)]
    monkeypatch.setattr(_Intake, "take", take)
    assert len(texts(ingest(settings=settings))) == 200


def test_a_digest_is_the_same_by_pieces_side_by_side_and_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "PIECE", 1000)
    path = tmp_path / "a.txt"
    for size in (0, 1, 999, 1000, 1001, 5000):
        path.write_bytes(random.Random(size).randbytes(size).hex().encode()[:size])
        [source] = find_sources([str(path)], [".txt"]).sources
        [surveyed] = survey([source], 10**6, "text")
        position = Position()
        assert len(list(read_records(source, "text", ["text"], 10**6, position))) == 1
        assert surveyed.digest == position.digest and surveyed.slices[0].digest == position.digest
        assert surveyed.digest.startswith("file-" if size <= 1000 else "pieces-")


def test_documents_of_one_part_are_the_same_bytes_however_many_pieces_they_were_read_in(store, folder, monkeypatch):
    """By the rule that a row group ends after 2,000 candidates or 32 MB, duplicates counted."""
    draw = random.Random(0)
    for name in "abc":
        records = ({"text": f"{draw.randrange(4000)} " + "word " * draw.randrange(40)} for _ in range(3000))
        (folder / f"{name}.jsonl").write_bytes(lines(*records))
    monkeypatch.setattr(documents_parts, "FLUSH_BYTES", 150_000)
    documents = ingested(store, [folder])
    assert documents.statistics["duplicates"] > 200 and len(parts(documents)) == 1
    expected, seen, waiting, weight = [0], set(), 0, 0
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            expected[-1] += text.strip() not in seen
            seen.add(text.strip())
            waiting, weight = waiting + 1, weight + len(text) + len("a") + len("a.jsonl")
            if waiting == 2000 or weight >= 150_000:
                expected.append(waiting := 0)
                weight = 0
    metadata = pq.read_metadata(parts(documents)[0])
    found = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert found == [each for each in expected if each]
    monkeypatch.setattr("eclectus.tasks.documents.intake.settings.SLICES_PER_PART", 1000)
    assert ingested(store, [folder]).digest == documents.digest


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_limit_says_how_many_documents_the_whole_would_give(store, folder, name):
    draw = random.Random(0)
    rows = [{"text": f"{i} " + draw.randbytes(draw.randrange(100)).hex()} for i in range(6000)]
    for copy in range(2):
        part, path = rows[copy * 3000 : copy * 3000 + 3000], folder / f"{copy}{name}"
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(part), path, row_group_size=100)
        else:
            path.write_bytes(gzip.compress(lines(*part)) if name.endswith("gz") else lines(*part))
    for limit in (500, 4000):
        for settings in ({}, {"part_megabytes": 0.2}):
            expected = ingested(store, [folder], documents_limit=limit, **settings).statistics["expected_documents"]
            assert abs(expected - 6000) < 700
    assert "expected_documents" not in ingested(store, [folder], documents_limit=6000).statistics
    assert "expected_documents" not in ingested(store, [folder]).statistics
