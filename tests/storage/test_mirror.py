"""A home on an object store: a real S3 server; two machines are two cache folders."""

import json
import shutil
import uuid

import pytest

from eclectus.storage.artifact import MANIFEST
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage import compact as compaction
from eclectus.storage.lineage import connection as lineage
from eclectus.storage.lineage.compact import compact, faults
from eclectus.storage.lineage.connection import query
from eclectus.storage.lineage.garbage import free, keep, plan
from eclectus.storage.step_keys import KnownKeys, Record
from tests.support.history import RUNS, everything, write_chain, write_history


@pytest.fixture
def machine(object_store, tmp_path, monkeypatch):
    """Opens the same home from a machine of the given name."""
    url = f"s3://models/{uuid.uuid4().hex}"

    def opened(name):
        monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / name))
        return Home.open(url)

    return opened


def make(home, content="weights"):
    with home.store.draft("checkpoint") as draft:
        draft.file("deep/model.txt").write_text(content)
        draft.file("config.txt").write_text("{}")
        return home.store.commit(draft)


def test_what_one_machine_made_another_finds_by_key_by_name_and_whole(machine):
    one = machine("one")
    made = make(one)
    done = Record("train", 1, {"lr": 1}, {}, {"out": f"checkpoint-{made.digest}"})
    KnownKeys(one.keys, one.store).remember(done, "train")
    two = machine("two")
    assert two.root != one.root and not (two.store.root / "checkpoint").exists()
    found, reason = KnownKeys(two.keys, two.store).find(Record("train", 1, {"lr": 1}, {}), "train")
    assert found["out"].digest == made.digest and "same settings" in reason
    assert found["out"].file("deep/model.txt").read_text() == "weights"
    assert machine("three").store.find(made.name).digest == made.digest
    assert [artifact.digest for artifact in machine("four").store.all()] == [made.digest]


def test_a_changed_key_says_why_on_another_machine(machine):
    one = machine("one")
    made = make(one)
    KnownKeys(one.keys, one.store).remember(
        Record("train", 1, {"lr": 1}, {}, {"out": f"checkpoint-{made.digest}"}), "train"
    )
    two = machine("two")
    found, reason = KnownKeys(two.keys, two.store).find(Record("train", 1, {"lr": 2}, {}), "train")
    assert found is None and reason == "settings.lr 1 -> 2"


def test_a_copy_that_is_damaged_here_comes_again_from_the_store(machine):
    home = machine("one")
    made = make(home)
    made.file("config.txt").write_text("{!")
    assert home.store.faults(made) is None
    assert made.file("config.txt").read_text() == "{}"


def test_an_artifact_without_its_manifest_on_the_store_is_absent_and_made_again(machine):
    one = machine("one")
    made = make(one)
    one.mirror.remove(made.file(MANIFEST))
    two = machine("two")
    KnownKeys(two.keys, two.store)
    assert "gone" in two.store.faults(two_reference(two, made))
    assert make(two).digest == made.digest
    three = machine("three")
    assert three.store.faults(two_reference(three, made)) is None


def two_reference(home, artifact):
    """The same artifact where `home` would keep it."""
    return type(artifact)(artifact.kind, artifact.digest, str(home.store.root / artifact.kind / artifact.digest[:32]))


def test_an_artifact_damaged_on_the_store_is_replaced_by_the_one_made_again(machine):
    one = machine("one")
    made = make(one)
    made.file("config.txt").write_text("{!")
    one.mirror.push(made.file("config.txt"))
    assert "config.txt changed" in one.store.faults(made)
    make(one)
    two = machine("two")
    assert two.store.find(made.name).file("config.txt").read_text() == "{}"
    assert two.store.faults(two_reference(two, made)) is None


def test_the_journal_can_be_queried_from_another_machine_while_the_run_goes_on(machine):
    one = machine("one")
    with Journal(one.journal, "r1", one.mirror) as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        assert query("select run, state from runs", machine("two"))[1] == [("r1", "unfinished")]
        journal.metric("s", "loss", 2.5, 1)
        journal.event("run_ended", state="completed", seconds=1)
    assert query("select run, state from runs", machine("two"))[1] == [("r1", "completed")]
    assert query("select name, value from metrics", machine("two"))[1] == [("loss", 2.5)]


def test_a_missing_bucket_and_a_dead_server_are_one_line_that_names_the_home(object_store, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path))
    with pytest.raises(EclectusError, match=r"s3://nowhere/x: bucket 'nowhere' does not exist"):
        Home.open("s3://nowhere/x")
    with pytest.raises(EclectusError, match="home wrong://x/y"):
        Home.open("wrong://x/y")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(EclectusError, match="home s3://models/x cannot be used"):
        Home.open("s3://models/x")
    fsspec.filesystem("s3").clear_instance_cache()


def test_the_local_copy_may_go_at_any_time(machine):
    home = machine("one")
    made = make(home)
    shutil.rmtree(home.root)
    again = machine("one")
    assert again.store.faults(made) is None
    assert json.loads(made.file(MANIFEST).read_text())["digest"] == made.digest


def test_each_machine_compacts_its_own_copy_of_the_journals(machine, monkeypatch):
    monkeypatch.setattr(compaction, "MANY", 2)
    monkeypatch.setattr(compaction, "GRACE", -1.0)
    monkeypatch.setattr(lineage, "GRACE", 0.0)
    one = machine("one")
    for number in range(3):
        write_chain(one, f"r{number}", range(number * 3, number * 3 + 3))
    before = everything(one)
    for _ in range(3):
        compact(one, 1)
        assert everything(one) == before
    compact(one)
    journals = {path.name for path in one.journal.glob("events/r*.ndjson")}
    assert len(journals) == 3, "they are the store's, and stay"
    assert {f"events/{name}" for name in journals} <= compaction.replaced(one, 0), "and are not read again"
    parts = [*one.journal.glob("*/[1-9]-*.parquet")]
    assert any(part.name.startswith("2-") for part in parts) and faults(one) == []
    assert not [path for path, _ in one.mirror.listing(one.journal, ".parquet") if path in parts]
    assert everything(machine("two")) == before == everything(machine("one"))


def test_what_one_machine_frees_is_gone_from_the_store_and_what_is_needed_stays(machine):
    old, new = RUNS
    one = machine("one")
    write_history(one, promote=new)
    asked = ["from artifacts order by artifact", "from trace('d1')", "from documents order by instances"]
    before = [query(sql, one)[1] for sql in asked]
    keep(one, old)
    two = machine("two")
    assert plan(two, 1).unneeded == [], "kept on another machine"
    keep(two, old, False)
    planned = plan(two, 1)
    kinds = sorted(each.name.split("-")[0] for each in planned.unneeded)
    assert kinds == ["checkpoint", "documents", "evaluation", "instances"]
    assert free(two, planned) > 0
    three = machine("three")
    assert len(list(three.store.all())) == 4 and plan(three, 1).unneeded == []
    assert [query(sql, three)[1] for sql in asked] == before
    ((champion,),) = query("select checkpoint from champions", three)[1]
    assert three.store.faults(three.store.find(f"checkpoint-{champion}")) is None
