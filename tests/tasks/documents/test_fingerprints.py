"""A key that is true of what was read, whatever happens to the files meanwhile."""

import errno
import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import hash_file
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.tasks.documents import fingerprints as of
from eclectus.tasks.documents.ingest import IngestSettings, fingerprint, ingest
from eclectus.tasks.documents.intake.read_slices import _Intake
from eclectus.tasks.documents.table import read_table
from tests.support.documents import lines, texts

A, B = {"text": "a"}, {"text": "b"}


def while_reading(monkeypatch, *acts):
    """Runs an act before each reading of the sources, after their fingerprint."""
    function, left = ingest.function, list(acts)

    def read(**arguments):
        if left:
            left.pop(0)()
        function(**arguments)

    monkeypatch.setattr(ingest, "function", read)


def write_parquet(path, *values):
    pq.write_table(pa.table({"text": list(values)}), path)


def test_a_file_that_is_gone_while_it_is_read_is_read_again_and_not_missing_for_ever(run, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_bytes(lines({"text": name}))
    settings = IngestSettings(sources=[str(folder)])
    there, away = folder / "b.jsonl", tmp_path / "away"
    while_reading(monkeypatch, lambda: os.rename(there, away), lambda: os.rename(away, there))
    assert texts(ingest(settings=settings)) == ["a", "b"]
    # Gone for both readings: what was read is the key, so that it is read when it is back.
    (folder / "c.jsonl").write_bytes(lines({"text": "c"}))
    while_reading(monkeypatch, lambda: os.rename(there, away))
    assert texts(ingest(settings=settings)) == ["a", "c"]
    os.rename(away, there)
    assert texts(ingest(settings=settings)) == ["a", "b", "c"]
    assert texts(ingest(settings=settings)) == ["a", "b", "c"]
    assert query("select state from steps order by started", run.home)[1][-1] == ("reused",)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.txt", "a.csv", "a.parquet"])
def test_a_file_that_changes_between_fingerprint_and_reading_has_the_key_of_what_was_read(
    run, tmp_path, monkeypatch, name
):
    path = tmp_path / name

    def write(word):
        if name.endswith("parquet"):
            write_parquet(path, word)
        else:
            content = {"jsonl": lines({"text": word}), "txt": word.encode(), "csv": f"text\n{word}\n".encode()}
            path.write_bytes(content.get(name.split(".")[-1]) or gzip.compress(lines({"text": word}), mtime=0))

    write("one")
    settings = IngestSettings(sources=[str(path)], text_suffixes=[".txt"])
    while_reading(monkeypatch, lambda: write("two"))
    assert texts(ingest(settings=settings)) == ["two"]
    assert texts(ingest(settings=settings)) == ["two"]
    write("one")
    assert texts(ingest(settings=settings)) == ["one"]
    assert query("select state from steps order by started", run.home)[1] == [
        ("completed",), ("reused",), ("completed",),
    ]  # fmt: skip


def test_a_file_that_grows_on_and_on_is_kept_under_what_was_read_of_it(run, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "0"}))

    def grow(word):
        return lambda: path.write_bytes(path.read_bytes() + lines({"text": word}))

    while_reading(monkeypatch, grow("1"), grow("2"))
    settings = IngestSettings(sources=[str(path)])
    assert texts(ingest(settings=settings)) == ["0", "1", "2"]
    [(key,)] = query("select artifact from step_inputs where name = 'source.0.a.jsonl'", run.home)[1]
    assert f"file-{hash_file(path)}" == key or key in f"file-{hash_file(path)}"


def test_parquet_that_changes_while_it_is_read_is_an_error_in_one_line(run, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_parquet(path, *(f"text {i}" for i in range(3000)))
    changes = []
    take = _Intake.take

    def change(self, source, number, line, record):
        if line == 1:
            changes.append(line)
            write_parquet(path, *(f"other {i} {len(changes)}" for i in range(3000)))
        take(self, source, number, line, record)

    monkeypatch.setattr("eclectus.tasks.documents.intake.read_slices._Intake.take", change)
    with pytest.raises(EclectusError, match=r"source\.0\.a\.parquet twice, and both times it changed meanwhile"):
        ingest(settings=IngestSettings(sources=[str(path)]))
    assert len(changes) == 2 and list(run.home.store.all()) == []


def test_a_limit_does_not_change_what_is_hashed(run, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": str(i)} for i in range(50_000))))
    settings = IngestSettings(sources=[str(tmp_path / "a.jsonl")], documents_limit=2)
    assert texts(ingest(settings=settings)) == ["0", "1"]
    ingest(settings=settings)
    assert query("select state from steps order by started", run.home)[1] == [("completed",), ("reused",)]


def test_a_file_rewritten_in_the_same_tick_with_equal_size_has_another_fingerprint(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(A))
    settings, status = IngestSettings(sources=[str(path)]), os.stat(path)
    before = fingerprint(settings)
    path.write_bytes(lines(B))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(settings) != before


def test_an_error_that_may_pass_is_not_in_the_key_of_another_process(tmp_path, monkeypatch):
    def digest():
        return of.unreadable_digest(OSError(errno.EIO, os.strerror(errno.EIO)))

    before = digest()
    assert digest() == before
    monkeypatch.setattr(of, "_THIS_PROCESS", "another")
    assert digest() != before
    assert of.unreadable_digest(FileNotFoundError(errno.ENOENT, "gone")) == "unreadable-gone"


def test_a_folder_whose_name_is_the_domain_is_in_the_key(run, tmp_path):
    (tmp_path / "novels").mkdir()
    (tmp_path / "novels" / "a.txt").write_text("text")
    before = ingest(settings=IngestSettings(sources=[str(tmp_path / "novels")]))
    os.rename(tmp_path / "novels", tmp_path / "letters")
    after = ingest(settings=IngestSettings(sources=[str(tmp_path / "letters" / "*.txt")]))
    assert [read_table(each)["domain"].to_pylist() for each in (before, after)] == [["novels"], ["letters"]]


def test_a_dataset_of_the_hub_is_read_at_the_commit_of_its_key(run, tmp_path, monkeypatch):
    import datasets

    commits, read = iter(["one", "two", "two", "two"]), []

    class Hub:
        def dataset_info(self, name, revision, timeout):
            return type("Info", (), {"sha": next(commits)})

    def load(name, config, split, revision, streaming):
        read.append(revision)
        return datasets.Dataset.from_dict({"text": [f"text of {revision}"]}).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("datasets.load_dataset", load)
    documents = ingest(settings=IngestSettings(sources=["dataset:owner/name"]))
    # The first reading found another commit than its key's, so that the step began again, and found that.
    assert texts(documents) == ["text of two"] and read == ["two"]
