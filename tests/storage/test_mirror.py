"""A home on an object store: a real S3 server; two machines are two cache folders."""

import errno
import json
import os
import shutil
import uuid
from time import time as clock

import pytest
from s3fs import S3FileSystem

from eclectus.storage import mirror
from eclectus.storage.artifact import MANIFEST
from eclectus.storage.disk_full import NoRoom
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage import compact as compaction
from eclectus.storage.lineage import connection as lineage
from eclectus.storage.lineage.compact import compact, faults
from eclectus.storage.lineage.connection import query
from eclectus.storage.lineage.garbage import free, keep, plan
from eclectus.storage.step_keys import KnownKeys, Record
from tests.support.bad_store import BadStore
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


@pytest.fixture
def bad(object_store, monkeypatch):
    """The same store behind a proxy that disturbs requests; a client asks once, so that the mirror's own tries show."""
    import fsspec

    store = BadStore(object_store)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    fsspec.filesystem("s3").clear_instance_cache()
    waits = []
    monkeypatch.setattr(mirror.time, "sleep", waits.append)
    store.waits = waits
    yield store
    store.close()
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_store_that_is_overloaded_slow_or_cuts_answers_short_is_asked_again(bad, machine):
    one = machine("one")
    bad.faults = ["503"] * 5 + ["slow", None, "503", "slow"]
    made = make(one, "weights " * 5_000)
    assert bad.faults == [] and len(bad.waits) >= 4 and max(bad.waits) <= 32
    bad.faults = ["503"] * 3
    two = machine("two")
    assert bad.faults == []
    bad.only = {"GET"}
    bad.faults = ["503", "cut", "503", "503", "cut", "cut"]
    assert two.store.find(made.name).file("deep/model.txt").read_text() == "weights " * 5_000
    assert bad.faults == [] and two.store.faults(two_reference(two, made)) is None
    assert not list(two.store.root.rglob(".*.txt*")), "what was begun is left"


@pytest.fixture
def with_get_file(monkeypatch):
    """Replaces how the client downloads a file."""

    def replace(function):
        monkeypatch.setattr(S3FileSystem, "_get_file", function)
        S3FileSystem.clear_instance_cache()

    yield replace
    S3FileSystem.clear_instance_cache()


def test_an_answer_that_ends_too_early_without_an_error_is_not_taken_for_the_file(machine, with_get_file, monkeypatch):
    made, two = make(machine("one"), "weights " * 5_000), machine("two")
    whole, cut = S3FileSystem._get_file, []

    async def short(files, name, target, **options):
        await whole(files, name, target, **options)
        if name.endswith("model.txt") and len(cut) < 2:
            cut.append(name)
            os.truncate(target, 100)

    with_get_file(short)
    monkeypatch.setattr(mirror.time, "sleep", lambda seconds: None)
    assert two.store.find(made.name).file("deep/model.txt").read_text() == "weights " * 5_000 and len(cut) == 2
    cut.clear()
    monkeypatch.setattr(mirror, "WAITS", ())
    with pytest.raises(EclectusError, match=r"came 100 of 40000 bytes.*run again when the store answers"):
        machine("three").store.find(made.name)
    assert not list(machine("three").store.root.glob("checkpoint/*"))


def test_a_store_that_refuses_for_good_is_one_line_and_what_is_there_is_kept(bad, machine):
    one = machine("one")
    made = make(one)
    bad.always = "503"
    with pytest.raises(EclectusError, match=r"cannot be used .*; what is finished is kept: run again"):
        make(one, "new weights")
    assert len(bad.waits) == 2 * len(mirror.WAITS), "two files, which go at once"
    bad.always, asked = "403", bad.requests
    with pytest.raises(EclectusError, match=r"PermissionError.*check the bucket, AWS_ENDPOINT_URL") as refused:
        make(one, "other weights")
    assert "run again" not in str(refused.value) and bad.requests - asked < 5, "a refusal is no overload"
    bad.always = None
    again = make(one, "new weights")
    two = machine("two")
    for each in (made, again):
        assert two.store.faults(two_reference(two, each)) is None
    assert two.store.find(again.name).file("deep/model.txt").read_text() == "new weights"


def test_a_disk_that_is_full_is_not_blamed_on_the_store(machine, with_get_file):
    made, two = make(machine("one")), machine("two")

    async def full(files, name, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    with_get_file(full)
    with pytest.raises(NoRoom, match=f"no space left on device: {two.root} on .*disk /.* GB free"):
        two.store.find(made.name)
    assert not list(two.store.root.rglob("*.txt"))


def test_parts_on_the_store_that_no_machine_has_are_freed_after_a_week(machine, monkeypatch):
    one = machine("one")
    places = [one.work / "parts" / "ab" / name for name in ("old", "here")]
    for place in places:
        place.mkdir(parents=True)
        (place / "part.json").write_text("{}")
        one.mirror.push(place, "part.json")
    shutil.rmtree(places[0])
    assert plan(one, 1).unneeded == []
    monkeypatch.setattr(mirror.time, "time", lambda: 8 * 86_400 + clock())
    monkeypatch.setattr("eclectus.storage.unused.quiet", lambda place: 0.0)
    planned = plan(one, 1)
    assert [each.place for each in planned.unneeded] == places[:1]
    free(one, planned)
    assert not one.mirror.has(places[0]) and one.mirror.has(places[1])
