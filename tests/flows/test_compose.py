"""docker-compose.yml: read as an operator reads it, and run for real without a container engine (compose.py)."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from compose import ROOT, Compose, interpolate

SECRETS = {
    "POSTGRES_PASSWORD": "postgres-secret",
    "REDIS_PASSWORD": "redis-secret",
    "MINIO_USER": "eclectus",
    "MINIO_PASSWORD": "minio-secret",
    "PREFECT_AUTH": "admin:prefect-secret",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
}
OURS = ("bucket", "prefect-server", "prefect-services", "ray-head", "ray-worker", "deploy", "worker")


@pytest.fixture(scope="module")
def written():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_only_the_ui_is_published_and_only_on_loopback(written):
    published = {name: service["ports"] for name, service in written["services"].items() if "ports" in service}
    assert published == {"prefect-server": ["127.0.0.1:4200:4200"]}
    assert all(service["networks"] == ["eclectus"] for service in written["services"].values())


def test_every_service_is_limited_and_every_lasting_one_is_restarted_and_watched(written):
    for name, service in written["services"].items():
        assert "mem_limit" in service, name
        lasting = service["restart"] == "unless-stopped"
        assert lasting or name in ("bucket", "deploy")
        # Ray's workers end with their raylet, and the services of Prefect answer no port.
        assert not lasting or "healthcheck" in service or name in ("ray-worker", "prefect-services"), name


def test_images_are_pinned_and_ours_does_not_run_as_root(written):
    for name, service in written["services"].items():
        tag = service["image"].partition(":")[2]
        assert tag and tag != "latest" and ("build" in service) == (name in OURS), name
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert lines[-1] == "USER eclectus" and "python:3.11.13-slim-bookworm" in lines[1]
    assert all("-r " in line or "-c constraints" in line for line in lines if "pip install" in line)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_is_not_set_stops_everything_and_no_secret_has_a_default(written, name):
    with pytest.raises(AssertionError, match=name):
        interpolate(written, {**SECRETS, name: ""})
    assert f"\n{name}=" in (ROOT / ".env.example").read_text()


def test_docker_accepts_the_file_where_its_client_can_read_one():
    """The client on a machine may lack the compose plugin; the file's own reader above stands in there."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        read = subprocess.run(
            [docker, "compose", "config", "--quiet"],
            cwd=ROOT,
            env=os.environ | SECRETS,
            capture_output=True,
            text=True,
            check=False,
        )
        assert read.returncode == 0, read.stderr
    assert interpolate("${A:-b}${C:?d}${E}", {"C": "c", "E": "e"}) == "bce"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    for program, package in (("redis-server", "redis-server"), ("ip", "iproute2"), ("setpriv", "util-linux")):
        assert shutil.which(program), f"this test needs {program}: apt-get install {package}"
    assert list(Path("/usr/lib/postgresql").glob("*/bin/initdb")), "apt-get install postgresql"
    assert os.geteuid() == 0, "this test makes network namespaces: run it as root"
    with Compose(tmp_path_factory.mktemp("compose"), random.randrange(10, 250), SECRETS) as running:
        yield running


def call(cluster, method, path, body=None, auth=SECRETS["PREFECT_AUTH"]):
    address = cluster.address(list(cluster.services).index("prefect-server") + 2)
    request = urllib.request.Request(
        f"http://{address}:4200/api{path}", json.dumps(body).encode() if body is not None else None, method=method
    )
    request.add_header("content-type", "application/json")
    request.add_header("authorization", "Basic " + base64.b64encode(auth.encode()).decode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_same_commands_and_environment_run_a_flow_on_two_ray_nodes_with_everything_on_s3(cluster):
    corpus = cluster.folder / "volumes" / "cache" / "corpus.jsonl"
    corpus.parent.mkdir(parents=True)
    corpus.write_text("".join(
        json.dumps({"text": f"Document {n} tells of ship {n % 7}, which left the harbour on day {n}.", "language": "en"}) + "\n"
        for n in range(120)
    ))  # fmt: skip
    cluster.up()
    cluster.scale("ray-worker", "ray-worker-2")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        call(cluster, "POST", "/deployments/filter", {}, auth="admin:wrong")
    deployments = {each["name"]: each["id"] for each in call(cluster, "POST", "/deployments/filter", {})}
    assert deployments.keys() >= {"main", "curate", "pretrain", "extend", "evaluate", "retrain"}
    automations = {each["name"] for each in call(cluster, "POST", "/automations/filter", {})}
    assert automations == {"eclectus: zombie runs", "eclectus: crashed runs"}
    parameters = {
        "sources": ["/home/eclectus/cache/corpus.jsonl"], "language_detector": "field", "expanded_languages": [],
        "embedding_steps": 2, "embedding_dimension": 16, "tokenizer_vocabulary": 300, "instance_tokens": 32, "lory_segment": 16,
        "model_width": 16, "model_layers": 1, "model_heads": 2, "model_key_value_heads": 2, "model_feed_forward": 16,
        "lory_experts": 2, "pretrain_steps": 4, "pretrain_warmup_steps": 1, "lory_rewarm_steps": 1, "training_workers": 2,
    }  # fmt: skip
    run = call(
        cluster,
        "POST",
        f"/deployments/{deployments['pretrain']}/create_flow_run",
        {"parameters": {"parameters": parameters}},
    )
    ended = wait_for_end(cluster, run["id"])
    assert ended["type"] == "COMPLETED", f"{ended}\n{cluster.log('worker')[-4000:]}"
    artifacts = call(cluster, "POST", "/artifacts/filter", {"limit": 200})
    assert "ray-dashboard" in {each["key"] for each in artifacts}
    nodes = cluster.run("ray-head", ["ray", "list", "nodes", "--format", "json", "--address", "http://ray-head:8265"])
    capacity = sorted(
        node["resources_total"].get("CPU", 0) for node in json.loads(nodes.stdout[nodes.stdout.index("[") :])
    )
    # Head and worker without capacity, and two that compute.
    assert capacity[:2] == [0, 0] and capacity[2] > 0 and len(capacity) == 4
    asked = cluster.run("worker", ["eclectus", "sql", "--json", "select flow, state from runs"])
    assert json.loads(asked.stdout) == {"flow": "pretrain", "state": "completed"}, asked.stderr
    listing = cluster.run("worker", ["python", "-c", LIST_BUCKET]).stdout
    assert (
        "home/artifacts/checkpoint/" in listing
        and "home/journal/events/" in listing
        and "home/keys/records/" in listing
    )


LIST_BUCKET = "import s3fs; print(*s3fs.S3FileSystem().find('eclectus'), sep='\\n')"


def wait_for_end(cluster, run):
    end = time.monotonic() + 400
    while True:
        state = call(cluster, "GET", f"/flow_runs/{run}")["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") or time.monotonic() > end:
            return state
        time.sleep(1)
