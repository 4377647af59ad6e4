"""Work over parts: in order, found again, damaged results made again, failures named; by Ray's workers the same."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from eclectus.storage.disk_full import NoRoom, no_room
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks import over_parts as work
from eclectus.tasks.disk_matrix import PartMatrix
from eclectus.tasks.over_parts import DESCRIPTION, Part, forget, key_of, over_parts
from eclectus.tasks.part_store import DamagedInput, PartStore
from tests.support.part_functions import read, square, square_on_full_disk, square_or_fail

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


class Shown:
    """A display that keeps what it is notified of."""

    def __init__(self):
        self.notices = []

    def step_progressed(self, *_):
        pass

    def notified(self, name, text):
        self.notices.append((name, text))


def squares(calls, numbers):
    return [
        Part(key_of("square 1", number), {"number": number, "calls": str(calls)}, name=f"number {number}")
        for number in numbers
    ]


def test_results_come_in_order_and_are_made_once(run, calls):
    done = over_parts(square, squares(calls, [3, 1, 2]), "squaring", "numbers")
    assert [each.about["square"] for each in done] == [9, 1, 4]
    assert [each.file("square").read_text() for each in done] == ["9", "1", "4"]
    assert not any(each.found for each in done) and len(os.listdir(calls)) == 3
    again = over_parts(square, squares(calls, [2, 5, 3]), "squaring", "numbers")
    assert [(each.about["square"], each.found) for each in again] == [(4, True), (25, False), (9, True)]
    assert len(os.listdir(calls)) == 4
    forget(again)
    assert not over_parts(square, squares(calls, [2]), "squaring")[0].found


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "description"])
def test_a_damaged_result_is_made_again(run, calls, damage):
    (done,) = over_parts(square, squares(calls, [7]), "squaring")
    path = done.file("square")
    if damage == "flip":
        path.write_text("48")
    elif damage == "cut":
        path.write_text("4")
    elif damage == "lose":
        path.unlink()
    else:
        done.file(DESCRIPTION).write_text("{")
    shown = Shown()
    run.displays.append(shown)
    (again,) = over_parts(square, squares(calls, [7]), "squaring")
    assert not again.found and again.file("square").read_text() == "49" and len(os.listdir(calls)) == 2
    ((name, text),) = shown.notices
    what = {"flip": "square changed", "cut": "square changed", "lose": "square is gone"}.get(damage, "cannot be read")
    assert name == "damaged parts" and text.startswith(f"{done.folder} is damaged: ") and what in text


def test_a_function_that_raises_leaves_no_result_and_what_was_finished_is_kept(run, calls):
    parts = [
        Part(key_of("fail", number), {"number": number, "calls": str(calls), "fails": {"2": ["refuse", 1]}})
        for number in (1, 2, 3)
    ]
    with pytest.raises(EclectusError, match="part 2 is refused"):
        over_parts(square_or_fail, parts, "squaring")
    done = over_parts(square_or_fail, parts, "squaring")
    assert [each.found for each in done] == [True, False, False]
    assert not list(Path(run.home.work).rglob(".*")), "what was begun is left"


def test_a_full_disk_is_one_line_with_folder_and_disk_and_the_work_resumes(run, calls, tmp_path):
    full = tmp_path / "full"
    parts = [Part(key_of("full", number), {"number": number, "full": full}) for number in (2, 3)]
    over_parts(square_on_full_disk, parts[:1], "squaring")
    full.touch()
    with pytest.raises(NoRoom) as raised:
        over_parts(square_on_full_disk, parts, "squaring")
    folder = run.home.work / "parts"
    assert str(raised.value).startswith(f"no space left on device: {folder} on {socket.gethostname()} (disk /")
    assert "GB free)" in str(raised.value) and "\n" not in str(raised.value)
    assert not list(folder.glob("*/.*")), "what was begun is left"
    full.unlink()
    assert [each.found for each in over_parts(square_on_full_disk, parts, "squaring")] == [True, False]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError("40 requested and 12 written"), True),
        (RuntimeError("SafetensorError: Error while serializing: No space left on device (os error 28)"), True),
        (pa.ArrowInvalid("Error writing bytes to file. Detail: [errno 28] No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (ValueError("there is room"), False),
    ],
)
def test_whoever_meets_a_full_disk_it_is_one(error, full, tmp_path):
    found = no_room(error, tmp_path / "not" / "yet")
    assert (found is not None) is full
    assert not full or f"{tmp_path}/not/yet on " in str(found)


def test_a_result_that_is_damaged_while_it_is_made_again_is_replaced(run, calls):
    (done,) = over_parts(square, squares(calls, [7]), "squaring")
    store, key = PartStore.of_run(), key_of("square 1", 7)
    done.file("square").write_text("48")
    store.make(key, square, {"number": 7, "calls": str(calls)})
    assert done.file("square").read_text() == "49" and store.find(key)


def test_what_a_killed_process_began_is_removed_when_the_part_is_made_and_what_lives_stays(run, calls, tmp_path):
    store, key = PartStore.of_run(), key_of("square 1", 7)
    place = store.place(key)
    program = """
import sys, time
from pathlib import Path
from eclectus.storage.atomic_write import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("4")
    print("begun", flush=True)
    time.sleep(60)
"""
    place.parent.mkdir(parents=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(place)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        assert [process.stdout.readline() for process in processes] == ["begun\n"] * 2
        processes[0].kill()
        processes[0].wait()
        assert len(list(place.parent.glob(".*"))) == 2
        over_parts(square, squares(calls, [7]), "squaring")
        (left,) = place.parent.glob(".*")
        assert str(processes[1].pid) in left.name
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_fewer_calls_run_at_a_time_after_workers_that_died_and_more_again_when_none_does(monkeypatch):
    slots = work._Slots(16)
    began = time.monotonic()
    for _ in range(16):
        # A node that left took 16 of them along.
        slots.died(began)
    assert slots.now() == 8
    slots.died(time.monotonic())
    assert slots.now() == 4
    for _ in range(32):
        slots.went_well()
    assert slots.now() == 8
    for _ in range(64):
        slots.went_well()
    assert slots.now() == 16
    # Without a number: the CPUs that the cluster has at the moment.
    cpus = iter([4, 2, 6])
    monkeypatch.setattr(work, "_cluster_cpus", lambda: next(cpus))
    every = work._Slots(0)
    assert [every.now() for _ in range(3)] == [4, 2, 6]


def test_a_cluster_without_a_node_that_can_compute_is_said_once(run, monkeypatch):
    shown = Shown()
    run.displays.append(shown)
    calls = work._Calls(square, [], PartStore.of_run(), gpus=0)
    able = iter([True, False, False])
    monkeypatch.setattr(work._Calls, "_others_have_room", lambda self: next(able))
    calls.report_waiting()
    assert shown.notices == []
    calls.report_waiting()
    calls.report_waiting()
    assert shown.notices == [("waiting", "no node of the Ray cluster has a CPU; waiting for one to join")]


# In processes of their own: Ray is started once in a process.
PROGRAM = """
import sys
from pathlib import Path
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.over_parts import Part, key_of, over_parts
from eclectus.tasks.run import Run, activate
from tests.support.part_functions import square_or_fail
home, calls, fails, workers = Home.open(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), int(sys.argv[4])
parts = [
    Part(key_of("ray", number), {"number": number, "calls": calls, "fails": fails}, name=f"number {number}")
    for number in range(6)
]
with Journal(home.journal, "run") as journal:
    with activate(Run("run", home, journal, KnownKeys(home.keys, home.store), [], "test")):
        done = over_parts(square_or_fail, parts, "squaring", workers=workers)
print([each.about["square"] for each in done], len({each.about["process"] for each in done}))
"""


def in_ray(home, calls, fails, workers=2):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Where Ray tells a machine of its clusters: one that is gone.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:9")
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(home), str(calls), repr(fails), str(workers)],
            env=environment | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )


@pytest.mark.slow  # 30 s: Ray is started twice
def test_rays_workers_give_the_same_and_a_part_that_kills_its_worker_is_tried_again_or_named(tmp_path, calls):
    done = in_ray(tmp_path / "home", calls, {"4": ["die", 3], "1": ["raise", 2]})
    assert done.returncode and "number 4 failed 3 times (WorkerCrashedError" in done.stderr, done.stderr[-3000:]
    assert "fewer curation_workers" in done.stderr
    made = {name.split("-")[0] for name in os.listdir(calls)}
    assert "4" in made
    before = len(os.listdir(calls))
    done = in_ray(tmp_path / "home", calls, {})
    assert done.stdout.startswith("[0, 1, 4, 9, 16, 25]"), done.stderr[-3000:]
    # What was finished before is not made again.
    assert len(os.listdir(calls)) - before < 6


@pytest.fixture
def machine(object_store, tmp_path, monkeypatch):
    """A function that makes this process one of several machines of a cluster, by name; it returns the home there."""
    url = f"s3://models/{uuid.uuid4().hex}"
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")

    def be(name):
        monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / name))
        work._home_here.cache_clear()
        return Home.open(url)

    return be


def test_machines_that_share_no_disk_exchange_files_through_the_object_store(machine, tmp_path):
    driver = machine("driver")
    mine = PartStore.of_home(driver)
    # A file of an artifact, and one of a part that was made in this process.
    with driver.store.draft("report") as draft:
        draft.file("page").write_text("a page")
        draft.file("other").write_text("another")
        artifact = driver.store.commit(draft)
    mine.make(work.key_of("square", 6), square, {"number": 6, "calls": str(tmp_path)})
    part = mine.place(work.key_of("square", 6))
    for path, text in ((artifact.file("page"), "a page"), (part / "square", "36")):
        key, arguments = work.key_of("read", text), {"path": path}
        mine.share(arguments, set())
        there = machine("worker")
        about, seconds = work._remotely(read, key, arguments, mine)
        assert about["text"] == text and about["root"].startswith(str(there.root)) and seconds >= 0
        assert not mine.place(key).exists()
        found = mine.find(key)
        assert found and found.about == about and found.folder == mine.place(key)
        # A machine that replaces the driver finds what the workers finished.
        found = PartStore.of_home(machine("another")).find(key)
        assert found and found.about == about
    # On the worker's machine the part is whole, and the artifact is not half there.
    there = machine("worker")
    assert PartStore.of_home(there).find(work.key_of("square", 6))
    assert there.store.find(artifact.name).file("other").read_text() == "another"


def test_a_file_that_is_damaged_on_its_way_to_a_worker_is_fetched_again_or_named(machine, tmp_path):
    driver = machine("driver")
    mine = PartStore.of_home(driver)
    with driver.store.draft("report") as draft:
        draft.file("page").write_text("a page")
        artifact = driver.store.commit(draft)
    mine.make(key_of("square", 6), square, {"number": 6, "calls": str(tmp_path)})
    inputs = {"a page": artifact.file("page"), "36": mine.place(key_of("square", 6)) / "square"}
    for text, path in inputs.items():
        mine.share(path, set())
        there = machine("worker")
        arguments = {"path": path}
        about, _ = work._remotely(read, key_of("read", text), arguments, mine)
        # What lies there is damaged later: it is fetched again.
        Path(about["root"]).write_text("nonsense")
        again, _ = work._remotely(read, key_of("read again", text), arguments, mine)
        assert again["text"] == text and Path(about["root"]).read_text() == text
        # What the store has is damaged: never used, and uploaded again by the driver.
        there.mirror._files.pipe_file(there.mirror._key(there.root / path.relative_to(driver.root)), b"nonsense")
        machine("another")
        with pytest.raises(DamagedInput, match=f"{path.name}.* (changed|is not as it was made)"):
            work._remotely(read, key_of("read once more", text), arguments, mine)
        machine("driver")
        mine.share(path, set(), again=True)
        machine("another")
        assert work._remotely(read, key_of("read once more", text), arguments, mine)[0]["text"] == text
    machine("driver")
    mine.forget(mine.place(key_of("square", 6)))
    assert not driver.mirror.has(mine.place(key_of("square", 6)))


def test_a_workers_cache_loses_what_nobody_used_for_four_weeks(object_store, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / "worker"))
    home = Home.open(f"s3://models/{uuid.uuid4().hex}")
    places = [home.work / "parts" / "ab" / "old", home.work / "downloaded" / "artifacts" / "documents" / "older"]
    places.append(places[0].with_name("new"))
    for place in places:
        place.mkdir(parents=True)
        (place / "file").touch()
    for path in (each for place in places[:2] for each in (place / "file", place)):
        os.utime(path, (time.time() - 29 * 86_400,) * 2)
    work._home_here.cache_clear()
    work._home_here(home.mirror.url)
    assert [place.exists() for place in places] == [False, False, True]


def test_a_matrix_in_parts_reads_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("eclectus.tasks.disk_matrix.RESIDENT_BYTES", 100)
    random = np.random.default_rng(0)
    parts = [random.normal(size=(count, 3)).astype(np.float16) for count in (4, 0, 1, 7)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    whole = np.concatenate(parts)
    matrix = PartMatrix([tmp_path / f"{number}.npy" for number in range(4)])
    assert matrix.shape == whole.shape and matrix.dtype == whole.dtype and len(matrix) == 12
    for rows in (np.array([11, 0, 4, 4, 3]), np.array([[0, 5], [-1, 11]]), np.empty(0, np.int64)):
        assert np.array_equal(matrix[rows], whole[rows])
    for rows in (slice(2, 9), slice(None), slice(5, 5)):
        assert np.array_equal(matrix[rows], whole[rows])
