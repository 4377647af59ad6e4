"""Work over parts: in order, found again, damaged results made again, failures named; by Ray's workers the same."""

import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import numpy as np
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks import over_parts as work
from eclectus.tasks.disk_matrix import PartMatrix
from eclectus.tasks.over_parts import DESCRIPTION, Part, forget, key_of, over_parts
from tests.support.part_functions import read, square, square_or_fail

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


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
    (again,) = over_parts(square, squares(calls, [7]), "squaring")
    assert not again.found and again.file("square").read_text() == "49" and len(os.listdir(calls)) == 2


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
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(home), str(calls), repr(fails), str(workers)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow  # 30 s: Ray is started twice
def test_rays_workers_give_the_same_and_a_part_that_kills_its_worker_is_tried_again_or_named(tmp_path, calls):
    done = in_ray(tmp_path / "home", calls, {"4": ["die", 3], "1": ["raise", 2]})
    assert done.returncode and "number 4 failed 3 times" in done.stderr, done.stderr[-3000:]
    made = {name.split("-")[0] for name in os.listdir(calls)}
    assert "4" in made
    before = len(os.listdir(calls))
    done = in_ray(tmp_path / "home", calls, {})
    assert done.stdout.startswith("[0, 1, 4, 9, 16, 25]"), done.stderr[-3000:]
    # What was finished before is not made again.
    assert len(os.listdir(calls)) - before < 6


def test_machines_that_share_no_disk_exchange_files_through_the_object_store(object_store, tmp_path, monkeypatch):
    url = f"s3://models/{uuid.uuid4().hex}"
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")

    def machine(name):
        monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / name))
        work._home_here.cache_clear()
        return Home.open(url)

    driver = machine("driver")
    mine = work._Store.of_home(driver)
    # A file of an artifact, and one of a part that was made in this process.
    with driver.store.draft("report") as draft:
        draft.file("page").write_text("a page")
        draft.file("other").write_text("another")
        artifact = driver.store.commit(draft)
    mine.make(work.key_of("square", 6), square, {"number": 6, "calls": str(tmp_path)})
    part = mine.place(work.key_of("square", 6))
    for path, text in ((artifact.file("page"), "a page"), (part / "square", "36")):
        key, arguments = work.key_of("read", text), {"path": path}
        work._share(arguments, mine, set())
        there = machine("worker")
        about, seconds = work._remotely(read, key, arguments, mine)
        assert about["text"] == text and about["root"].startswith(str(there.root)) and seconds >= 0
        assert not mine.place(key).exists()
        found = mine.find(key)
        assert found and found.about == about and found.folder == mine.place(key)
        # A machine that replaces the driver finds what the workers finished.
        found = work._Store.of_home(machine("another")).find(key)
        assert found and found.about == about
    # On the worker's machine the part is whole, and the artifact is not half there.
    there = machine("worker")
    assert work._Store.of_home(there).find(work.key_of("square", 6))
    assert there.store.find(artifact.name).file("other").read_text() == "another"


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
