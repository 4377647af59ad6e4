"""Which files a setting names, and what is passed over."""

import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.flows.cli.main import make_parser
from eclectus.flows.cli.options import read_parameters
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.tasks.documents.ingest import IngestSettings, check_sources, fingerprint, ingest
from eclectus.tasks.documents.sources import find_sources, parse_dataset, split_entries
from eclectus.tasks.documents.table import read_table
from tests.support.displays import NullDisplay
from tests.support.documents import GREEK, TURKISH, ingested, lines, rejected


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
    assert read_table(ingested(store, [tmp_path / "in"]))["domain"].to_pylist() == [domain]


def test_a_dataset_that_cannot_be_reached_is_an_error_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EclectusError, match="data set 'nobody/nothing' cannot be reached on the hub"):
        fingerprint(IngestSettings(sources=["dataset:nobody/nothing"]))


def test_what_does_not_exist_is_one_error_that_names_it_and_the_fix(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"pdf")
    for sources, message in (
        ([], "no sources are set"),
        ([" "], "entry 1 of 'sources' is empty"),
        ([tmp_path / "gone.jsonl"], "gone.jsonl' does not exist"),
        (["someone/something"], "dataset:someone/something"),
        (["s3://bucket/x.jsonl"], "is a URL"),
        ([tmp_path / "*.jsonl"], r"glob .* matches no file"),
        ([tmp_path / "empty"], "holds no file"),
        ([tmp_path / "a.pdf"], "suffix that cannot be read; these can: .jsonl"),
    ):
        with pytest.raises(EclectusError, match=message):
            check_sources(IngestSettings(sources=[str(each) for each in sources]))


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


A, B = {"text": "a"}, {"text": "b"}


def names(*entries, suffixes=(".txt",)):
    return [source.name for source in find_sources([str(each) for each in entries], list(suffixes)).sources]


def test_a_name_with_a_comma_is_one_source_on_every_way_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "a.jsonl", "b.jsonl", "x,1.jsonl", "x,2.jsonl"):
        (tmp_path / name).write_bytes(lines(A))
    (tmp_path / "c, d").mkdir()
    (tmp_path / "a.yaml").write_text("sources: a,b.jsonl, c, d\n")
    assert split_entries("a,b.jsonl") == ["a,b.jsonl"]
    assert split_entries("a.jsonl,b.jsonl,gone.jsonl") == ["a.jsonl", "b.jsonl", "gone.jsonl"]
    assert split_entries("a.jsonl,a,b.jsonl,b.jsonl") == ["a.jsonl", "a,b.jsonl", "b.jsonl"]
    assert split_entries("a,b.jsonl,x,*.jsonl,dataset:c, d::train") == ["a,b.jsonl", "x,*.jsonl", "dataset:c, d::train"]
    for words in (["--sources", "a,b.jsonl,c, d"], ["--config", "a.yaml"]):
        chosen = make_parser("curate").parse_args(["curate", *words])
        assert [each.strip() for each in read_parameters(chosen).sources] == ["a,b.jsonl", "c, d"]
    assert IngestSettings(sources=["a,b.jsonl"]).sources == ["a,b.jsonl"]


def test_names_are_taken_as_they_stand_if_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("x[1].jsonl", "*.jsonl", "~x.jsonl", " blank .jsonl", "end.jsonl "):
        (tmp_path / name).write_bytes(lines(A))
    assert names("x[1].jsonl", "*.jsonl", "~x.jsonl", " blank .jsonl") == [
        "x[1].jsonl", "*.jsonl", "~x.jsonl", " blank .jsonl",
    ]  # fmt: skip
    assert names(" x[1].jsonl ", "~/x[1].jsonl") == ["x[1].jsonl"]
    with pytest.raises(EclectusError, match="does not exist"):
        names("~nobody-of-this-name/x.jsonl")
    with pytest.raises(EclectusError, match="suffix that cannot be read"):
        names("end.jsonl ")


def test_suffixes_are_recognised_in_any_case(tmp_path):
    expected = ["A.JSON", "a.JsonL.ZST", "b.json.GZ", "c.Parquet", "d.CSV", "e.Tsv.Bz2", "f.TXT.XZ", "g.ndjson.zstd"]
    for name in expected:
        (tmp_path / name).write_bytes(b"x")
    assert names(tmp_path) == sorted(expected)


def test_what_is_not_read_in_a_folder_is_listed_with_the_reason(store, tmp_path):
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    for name in (
        ".git/x.jsonl",
        ".hidden.jsonl",
        "cover.png",
        "a.zip",
        "b.tar.gz",
        "c.parquet.gz",
        "README",
        "d.pdf",
        "e.jsonl.lz4",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "good.jsonl").write_bytes(lines(A))
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "link.jsonl").symlink_to(folder / "gone.jsonl")
    documents = ingested(store, [folder], text_suffixes=[".txt"])
    passed = documents.statistics["passed_over"]
    assert {name: why.split(";")[0] for name, why in passed["files"].items()} == {
        ".git/": "is hidden",
        ".hidden.jsonl": "is hidden",
        "README": "has no suffix that can be read",
        "a.zip": "is an archive of files",
        "b.tar.gz": "is an archive of files",
        "c.parquet.gz": "is compressed Parquet",
        "cover.png": "has a suffix that cannot be read",
        "d.pdf": "has a suffix that cannot be read",
        "e.jsonl.lz4": "is compressed as .lz4",
        "empty.jsonl": "is empty",
        "link.jsonl": "cannot be read (No such file or directory)",
        "pipe.jsonl": "is no regular file",
    }
    assert passed["counts"]["is hidden"] == 2 and sum(passed["counts"].values()) == 12
    assert "add .pdf to 'text_suffixes'" in passed["files"]["d.pdf"]
    assert documents.statistics["ignored_files"] == {
        ".gz": 2, ".jsonl": 1, ".lz4": 1, ".pdf": 1, ".png": 1, ".zip": 1, "README": 1,
    }  # fmt: skip


def test_the_terminal_and_artifacts_list_what_is_not_read(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(A))
    (tmp_path / "in" / "b.pdf").write_bytes(b"x")
    display = NullDisplay()
    run.displays.append(display)
    ingest(settings=IngestSettings(sources=[str(tmp_path / "in")]))
    assert any("b.pdf" in text for text in display.texts)
    sql = "select json_extract_string(statistics, '$.passed_over.files.\"b.pdf\"') from artifacts"
    assert "text_suffixes" in query(sql, run.home)[1][0][0]


def test_linked_folders_are_followed_each_once_and_loops_end(tmp_path):
    for name in ("in/real", "in/other", "outside/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_bytes(lines({"text": name}))
    (tmp_path / "in" / "0link").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "1out").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "real" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "real" / "parent").symlink_to(tmp_path)
    (tmp_path / "outside" / "deep" / "loop").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "z.jsonl").symlink_to(tmp_path / "in" / "real" / "a.jsonl")
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    found = find_sources([str(tmp_path / "in")], [])
    assert [source.name for source in found.sources] == ["1out/deep/a.jsonl", "other/a.jsonl", "real/a.jsonl"]
    assert {name for name, why in found.passed_over.items() if "link to a folder" in why} == {
        "0link/", "1out/deep/loop/", "real/parent/", "real/up/",
    }  # fmt: skip


def test_a_folder_that_a_glob_matches_is_listed(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "a.jsonl").write_bytes(lines(A))
    found = find_sources([f"{tmp_path}/*.jsonl"], [])
    assert [each.name for each in found.sources] == ["a.jsonl"] and "is a folder" in found.passed_over["x.jsonl/"]
    with pytest.raises(EclectusError, match=r"matches no file that can be read \('x.jsonl/' is a folder\)"):
        find_sources([f"{tmp_path}/x*.jsonl"], [])


def test_a_glob_over_all_folders_ends_where_links_make_loops(tmp_path):
    for name in ("a/deep", "b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jsonl").write_bytes(lines(A))
        (tmp_path / name / "up").symlink_to(tmp_path)
        (tmp_path / name / "other").symlink_to(tmp_path / "b")
    (tmp_path / "y.jsonl").write_bytes(lines(A))
    assert names(tmp_path / "**" / "*.jsonl") == ["a/deep/x.jsonl", "b/x.jsonl", "y.jsonl"]
    assert names(tmp_path / "a" / "**" / "x.*") == ["deep/other/x.jsonl", "deep/x.jsonl"]
    assert names(tmp_path / "*" / "**" / "x.jsonl") == ["a/deep/x.jsonl", "b/x.jsonl"]


def test_a_linked_folder_outside_the_allowed_ones_is_not_entered(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").mkdir()
    for folder in ("in", "secret"):
        (tmp_path / folder / f"{folder}.jsonl").write_bytes(lines(A))
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    monkeypatch.setenv("ECLECTUS_ROOTS", str(tmp_path / "in"))
    found = find_sources([str(tmp_path / "in")], [])
    assert [source.name for source in found.sources] == ["in.jsonl"] and "outside" in found.passed_over["link/"]


def test_a_file_that_entries_name_by_links_and_dots_is_read_once(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(A))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert names(tmp_path / "a.jsonl", tmp_path / "link.jsonl", f"{tmp_path}/./a.jsonl", tmp_path) == ["a.jsonl"]


def test_a_name_that_is_not_utf8_is_read_and_written_in_escapes(run, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jsonl")
    with open(path, "wb") as file:
        file.write(lines(A) + b"bad\n")
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "b.parquet")
    os.rename(tmp_path / "b.parquet", os.path.join(os.fsencode(tmp_path), b"caf\xe9.parquet"))
    os.mkdir(os.path.join(os.fsencode(tmp_path), b"d\xea"))
    with open(os.path.join(os.fsencode(tmp_path), b"d\xea", b"\xe9.txt"), "w") as file:
        file.write("text")
    documents = ingest(settings=IngestSettings(sources=[f"{tmp_path}/d*/*.txt"]))
    assert read_table(documents)["domain"].to_pylist() == ["d\\xea"]
    with pytest.raises((EclectusError, ValueError), match="sources"):
        IngestSettings.read({"sources": ["caf\udce9.jsonl"]}, "the command line")
    documents = ingest(settings=IngestSettings(sources=[f"{tmp_path}/*.jsonl", f"{tmp_path}/*.parquet"]))
    assert read_table(documents)["source"].to_pylist() == ["caf\\xe9.jsonl", "caf\\xe9.parquet"]
    assert rejected(documents) == [("caf\\xe9.jsonl", 2, "not JSON")]
    assert query("select count(*) from step_inputs where name like '%caf%'", run.home)[1] == [(2,)]


def test_a_dataset_folder_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a@b:c").mkdir()
    assert parse_dataset(f"dataset:{tmp_path}/a@b:c::test") == (f"{tmp_path}/a@b:c", None, None, "test")
    assert parse_dataset("dataset:~/a@b:c") == (f"{tmp_path}/a@b:c", None, None, "train")
    assert parse_dataset("dataset:owner/name@main:config:test") == ("owner/name", "main", "config", "test")
