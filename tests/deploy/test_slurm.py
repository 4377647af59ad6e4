"""deploy/slurm/eclectus.sbatch in a Slurm cluster: Ray on two nodes, SIGTERM, a checkpoint, a requeued job."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.support.compose import PATH
from tests.support.slurm import missing, slurm_cluster

WHY_NOT = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
SCRIPT = "/opt/eclectus/deploy/slurm/eclectus.sbatch"
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# Ray whose head gives up its start as often as a file says.
GIVES_UP = """#!/bin/bash
left=$(cat /shared/left)
if [[ $1 == start && $2 == --head ]] && ((left > 0)); then echo $((left - 1)) > /shared/left; exit 1; fi
exec {ray} "$@"
"""
# One worker on each node, and a training that takes minutes.
SETTINGS = """
language_detector: field
expanded_languages: []
embedding_steps: 2
embedding_dimension: 16
tokenizer_vocabulary: 300
instance_tokens: 32
lory_segment: 16
model_width: 16
model_layers: 1
model_heads: 2
model_key_value_heads: 2
model_feed_forward: 16
lory_experts: 2
pretrain_steps: 500
dense_warmup: 0.9
pretrain_warmup_steps: 2
lory_rewarm_steps: 2
log_every: 5
checkpoint_every: 100000
training_workers: 2
training_placement: STRICT_SPREAD
training_forecast: never
sources: [/shared/documents.jsonl]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def slurm(cluster, *words):
    answer = cluster.instances["control"].run(list(words))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def about(cluster, job):
    """What Slurm says of a job, by field."""
    return dict(each.split("=", 1) for each in slurm(cluster, "scontrol", "show", "job", job).split() if "=" in each)


def wait_until(cluster, condition, log, longest=600):
    end = time.monotonic() + longest
    while not (found := condition()):
        assert time.monotonic() < end, log.read_text() if log.exists() else "the job has not begun"
        cluster.watch()
        time.sleep(1)
    return found


def wait_for(cluster, job, state, log):
    """Until the job has ended; it must be in this state."""
    end = wait_until(cluster, lambda: (found := about(cluster, job)["JobState"]) in ENDS and found, log)
    assert end == state, log.read_text()


def steps_logged(home):
    """Training steps of the dense warm-up with a row of metrics, in the order of the journals' rows, by run."""
    found = {}
    for path in sorted((home / "journal" / "metrics").glob("*.ndjson"), key=lambda path: path.stat().st_ctime_ns):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("name") == "loss":
                found.setdefault(path.name.split(".")[0], []).append(row["at_step"])
    return found


def test_a_job_that_gets_sigterm_writes_a_checkpoint_and_goes_on_from_it_when_it_is_requeued(cluster):
    shared = cluster.folder / "volumes" / "shared"
    rows = ({"text": f"Document {n} is about ship {n % 7} on day {n}.", "language": "en"} for n in range(120))
    (shared / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (shared / "settings.yaml").write_text(SETTINGS)
    submitted = slurm(
        cluster, "env", "ECLECTUS_HOME=/shared/home", "sbatch", "--parsable", "--output=/shared/job.log", SCRIPT,
        "pretrain", "--config", "/shared/settings.yaml",
    )  # fmt: skip
    job, home, log = submitted.strip(), shared / "home", shared / "job.log"

    def trains():
        assert about(cluster, job)["JobState"] not in ENDS, log.read_text()
        return sum(map(len, steps_logged(home).values())) > 3

    wait_until(cluster, trains, log)
    slurm(cluster, "scancel", "--batch", "--signal=TERM", job)
    wait_until(cluster, lambda: about(cluster, job)["Restarts"] == "1", log)
    stopped = re.search(r"stopped at training step (\d+), whose checkpoint", log.read_text())
    assert stopped, log.read_text()
    wait_for(cluster, job, "COMPLETED", log)
    first, second = steps_logged(home).values()
    assert max(first) <= int(stopped[1]) < min(second) <= int(stopped[1]) + 5, "it went on where it stood"
    sql = "select state from runs where flow = 'pretrain' order by started"
    assert slurm(cluster, "eclectus", "--home", "/shared/home", "sql", sql).split()[-2:] == ["crashed", "completed"]


def test_where_ray_does_not_start_the_job_tries_again_and_never_ends_as_if_it_had_run(cluster):
    """Ray's own `symmetric-run` ends with 0 then."""
    shared = cluster.folder / "volumes" / "shared"
    ray, log = shared / "bin" / "ray", shared / "tries.log"
    ray.parent.mkdir()
    ray.write_text(GIVES_UP.format(ray=Path(sys.executable).with_name("ray")))
    ray.chmod(0o755)
    for failures, longest, state in ((1, 60, "COMPLETED"), (3, 10, "FAILED")):
        (shared / "left").write_text(str(failures))
        job = slurm(
            cluster, "env", f"PATH=/shared/bin:{PATH}", f"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={longest}",
            "sbatch", "--parsable", f"--output=/shared/{log.name}", SCRIPT, "--version",
        )  # fmt: skip
        wait_for(cluster, job.strip(), state, log)
        said = log.read_text()
        assert said.count("Ray did not start, so the command did not run") == failures, said
        assert ("eclectus 0" in said) == (state == "COMPLETED"), said
        log.unlink()


def test_a_job_without_a_command_is_refused(cluster):
    job = slurm(cluster, "sbatch", "--parsable", "--output=/shared/none.log", SCRIPT).strip()
    shared = cluster.folder / "volumes" / "shared"
    wait_for(cluster, job, "FAILED", shared / "none.log")
    assert "give the command: sbatch" in (shared / "none.log").read_text()
