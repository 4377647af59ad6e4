"""Curation gives the same bits in one process, with Ray's workers, and on two machines that share no disk."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eclectus.storage.home import Home
from tests.support.compose import Cluster, missing
from tests.support.curation_digests import digests

ROOT = Path(__file__).parents[2]
# Many parts of few documents, and cells of few.
SETTINGS = {
    "language_detector": "field", "expanded_languages": ["el"], "part_megabytes": 0.02, "neighbors_exact_below": 100,
    "embedding_steps": 2, "embedding_dimension": 16, "tokenizer_vocabulary": 400, "instance_tokens": 64,
    "neighbors_k": 5,
}  # fmt: skip
WORDS = [f"w{number}ord" for number in range(400)]


def write_documents(folder, count=900):
    """Documents of 20 topics in three files, some of them copies, and near-copies."""
    folder.mkdir(parents=True)
    draw, made = random.Random(3), []
    for number in range(count):
        topic, language = draw.randrange(20), "el" if draw.random() < 0.3 else "en"
        text = " ".join(draw.choice(WORDS[topic * 20 : topic * 20 + 40]) for _ in range(60))
        if made and draw.random() < 0.08:
            text = draw.choice(made) + (" again" if draw.random() < 0.7 else "")
        made.append(text)
        with open(folder / f"part-{number % 3}.jsonl", "a") as handle:
            handle.write(json.dumps({"text": text, "language": language, "id": str(number)}) + "\n")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("same") / "documents")


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory):
    """What one process makes of it."""
    home = Home.open(tmp_path_factory.mktemp("same") / "home")
    made = digests(home, sources=[str(sources)], curation_workers=1, **SETTINGS)
    parts = home.store.find(f"documents-{made['documents']}")
    assert len(list(Path(parts.path).glob("documents/part-*"))) >= 8
    return made


def started(sources, home, workers):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.curation_digests", str(sources),
         json.dumps(SETTINGS | {"curation_workers": workers})],
        env=environment | {"PYTHONPATH": str(ROOT), "ECLECTUS_HOME": str(home)},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow  # 60 s: Ray is started twice
@pytest.mark.parametrize("workers", [2, 4])
def test_with_rays_workers(sources, alone, tmp_path, workers):
    process = started(sources, tmp_path / "home", workers)
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert json.loads(said.splitlines()[-1]) == alone


@pytest.mark.slow  # 100 s: one curation, in whose every step a worker of Ray starts anew
def test_with_a_worker_killed_in_every_step_that_spreads_work(sources, alone, tmp_path):
    home = tmp_path / "home"
    process, killed = started(sources, home, 2), {}
    while process.poll() is None:
        time.sleep(0.01)
        step = len(list(home.glob("artifacts/[!.]*/[!.]*")))
        with contextlib.suppress(psutil.Error):
            for worker in psutil.Process(process.pid).children(recursive=True):
                # Ray shows there which part a worker computes.
                title = " ".join(worker.cmdline())
                if title.startswith("ray::") and "IDLE" not in title and "Agent" not in title and step not in killed:
                    worker.kill()
                    killed[step] = title
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert json.loads(said.splitlines()[-1]) == alone
    assert len(killed) >= 5, killed


def damage(path, cut):
    """Changes a byte in the middle of a file, or loses its second half."""
    with open(path, "r+b") as handle:
        handle.seek(path.stat().st_size // 2)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        if cut:
            handle.truncate()
        else:
            handle.write(bytes([byte[0] ^ 1]))


@pytest.mark.slow  # 80 s: curation starts again after every kill
def test_with_the_driver_killed_again_and_again(sources, alone, tmp_path):
    home, kills, seen = tmp_path / "home", 0, set()
    while True:
        process, known = started(sources, home, 1), len(seen)
        while process.poll() is None and len(seen) < known + 40:
            time.sleep(0.01)
            seen |= {place.name for place in home.glob("work/parts/*/[!.]*")}
            seen |= {place.name for place in home.glob("artifacts/[!.]*/*")}
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert json.loads(said.splitlines()[-1]) == alone and kills >= 4
    opened = Home.open(home)
    assert [fault for each in opened.store.all() if (fault := opened.store.faults(each))] == []
    assert len(list(opened.store.root.glob(".drafts/*"))) < kills, "what killed runs began does not pile up"
    # And a byte of every artifact, the end of every third part.
    artifacts = list(opened.store.all())
    for number, artifact in enumerate(artifacts):
        damage(max(Path(artifact.path).rglob("*.*"), key=lambda path: path.stat().st_size), cut=number % 2 == 0)
    for place in sorted(home.glob("work/parts/*/[!.]*"))[::3]:
        damage(max(place.iterdir(), key=lambda path: path.stat().st_size), cut=True)
    process = started(sources, home, 1)
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert json.loads(said.splitlines()[-1]) == alone
    assert len(list(opened.store.root.glob(".damaged/*"))) >= len(artifacts) - 1, "each was found"
    assert [fault for each in opened.store.all() if (fault := opened.store.faults(each))] == []


@pytest.mark.slow  # 90 s: four services are started
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_on_two_machines_that_share_an_object_store_and_no_disk(sources, alone, tmp_path):
    own = {"ECLECTUS_CACHE": "/tmp/own-cache"}
    only = {"minio", "bucket", "ray-head", "ray-worker"}
    with Cluster(tmp_path, scale={"ray-worker": 2}, only=only, environment=own) as cluster:
        head = cluster.instances["ray-head"]
        # Only where the driver runs.
        shutil.copytree(sources, head.folder / "home" / "documents")
        words = ["env", "RAY_ADDRESS=auto", "python", "-m", "tests.support.curation_digests"]
        settings = json.dumps(SETTINGS | {"curation_workers": 4})
        done = head.run([*words, "/home/eclectus/documents", settings], timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1]) == alone
        for name in ("ray-worker-1", "ray-worker-2"):
            listed = cluster.instances[name].run(["bash", "-c", "ls $ECLECTUS_CACHE/*/work/parts | wc -l"])
            assert int(listed.stdout) > 3, f"{name} made no part"
