"""The services of docker-compose.yml as processes (tests/support/compose.py): runs through the API, and shutdown."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.compose import DOCKERS_GRACE, SECRETS, Cluster, missing, processes_in, seconds

WHY_NOT = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
DEPLOYMENTS = {"main", "curate", "pretrain", "extend", "evaluate", "retrain", "similarity"}
AUTOMATIONS = {"eclectus: crashed runs", "eclectus: pending runs", "eclectus: zombie runs"}
ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
# Two workers, each on a Ray node of its own.
SETTINGS = {
    "language_detector": "field", "expanded_languages": [], "embedding_steps": 2, "embedding_dimension": 16,
    "tokenizer_vocabulary": 300, "instance_tokens": 32, "lory_segment": 16, "model_width": 16, "model_layers": 1,
    "model_heads": 2, "model_key_value_heads": 2, "model_feed_forward": 16,
    "lory_experts": 2, "pretrain_steps": 10, "dense_warmup": 0.3,
    "pretrain_warmup_steps": 2, "lory_rewarm_steps": 2, "log_every": 2, "training_workers": 2,
    "training_placement": "STRICT_SPREAD",
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), scale={"ray-worker": 2}) as cluster:
        yield cluster


def ask(cluster, service, port, path, body=None, authorization=""):
    request = urllib.request.Request(
        f"http://{cluster.instances[service].address}:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json", **({"authorization": authorization} if authorization else {})},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)


def prefect(cluster, path, body=None):
    password = base64.b64encode(SECRETS["PREFECT_AUTH"].encode()).decode()
    return ask(cluster, "prefect-server", 4200, f"/api/{path}", body, f"Basic {password}")


def ray(cluster, what):
    """Rows of what Ray's dashboard lists."""
    answer = ask(
        cluster, "ray-head", 8265, f"/api/v0/{what}?detail=1", authorization=f"Bearer {SECRETS['RAY_AUTH_TOKEN']}"
    )
    return answer["data"]["result"]["result"]


def wait_until(condition, cluster, longest):
    end = time.monotonic() + longest
    while not (found := condition()):
        assert time.monotonic() < end, f"not in {longest} s; the worker's log ends with\n{log_of(cluster)}"
        cluster.watch()
        time.sleep(0.5)
    return found


def wait_until_gone(namespaces, uplink, longest=30):
    """The kernel removes namespaces and their devices a moment after their last process has ended."""
    end = time.monotonic() + longest
    while (left := processes_in(namespaces)) or uplink in os.listdir("/sys/class/net"):
        assert time.monotonic() < end, left or uplink
        time.sleep(0.05)


def log_of(cluster):
    return cluster.instances["worker"].log[-4000:]


def start_run(cluster, deployment, **parameters):
    found = prefect(cluster, "deployments/filter", {"deployments": {"name": {"any_": [deployment]}}})
    made = prefect(cluster, f"deployments/{found[0]['id']}/create_flow_run", {"parameters": {"parameters": parameters}})
    return made["id"]


def end_of(cluster, run, longest=600):
    """The state in which a flow run ends."""

    def ended():
        state = prefect(cluster, f"flow_runs/{run}")["state"]
        return state["type"] in ENDS and state

    return wait_until(ended, cluster, longest)


def write_documents(cluster):
    """Writes documents where only the worker can read them; returns their path there."""
    rows = ({"text": f"Document {n} is about ship {n % 7} on day {n}.", "language": "en"} for n in range(120))
    (cluster.instances["worker"].folder / "home" / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "/home/eclectus/documents.jsonl"


@pytest.mark.parametrize(
    ("service", "port", "path"),
    [("prefect-server", 4200, "/api/deployments/count"), ("ray-head", 8265, "/api/v0/nodes")],
)
def test_requests_without_authentication_are_refused(cluster, service, port, path):
    for authorization in ("", "Basic YWRtaW46d3Jvbmc=", "Bearer wrong"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(cluster, service, port, path, {} if "count" in path else None, authorization)
        assert refused.value.code in (401, 403)


def test_deployments_and_automations_are_registered_and_retraining_is_scheduled(cluster):
    assert {each["name"] for each in prefect(cluster, "deployments/filter", {})} == DEPLOYMENTS
    assert {each["name"] for each in prefect(cluster, "automations/filter", {})} == AUTOMATIONS
    scheduled = {
        "deployments": {"name": {"any_": ["retrain"]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    planned = wait_until(lambda: prefect(cluster, "flow_runs/filter", scheduled), cluster, 180)
    assert all(each["auto_scheduled"] and "T03:00:00" in each["next_scheduled_start_time"] for each in planned)


def test_only_rays_workers_have_capacity_and_object_stores_fit_into_shared_memory(cluster):
    nodes = {node["node_ip"]: node for node in ray(cluster, "nodes") if node["state"] == "ALIVE"}
    named = {
        name: nodes[cluster.instances[name].address] for name in ("ray-head", "ray-worker-1", "ray-worker-2", "worker")
    }
    assert len(nodes) == 4 and named["ray-head"]["is_head_node"]
    assert {name for name, node in named.items() if node["resources_total"].get("CPU")} == {
        "ray-worker-1",
        "ray-worker-2",
    }
    assert not [name for name in named if "instead of /dev/shm" in cluster.instances[name].log]


def test_a_run_trains_on_rays_workers_and_leaves_artifacts_and_lineage_in_the_bucket(cluster):
    run = start_run(cluster, "pretrain", **SETTINGS, sources=[write_documents(cluster)])
    assert end_of(cluster, run)["type"] == "COMPLETED", log_of(cluster)
    address = {node["node_id"]: node["node_ip"] for node in ray(cluster, "nodes")}
    trained = {address[actor["node_id"]] for actor in ray(cluster, "actors") if actor["class_name"] == "RayTrainWorker"}
    assert trained == {cluster.instances[name].address for name in ("ray-worker-1", "ray-worker-2")}

    worker = cluster.instances["worker"]
    listed = worker.run(["python", "-c", "import s3fs; print(*s3fs.S3FileSystem().find('eclectus/home'), sep='\\n')"])
    kinds = [name.split("/")[3] for name in listed.stdout.splitlines() if name.endswith("/manifest.json")]
    assert kinds.count("checkpoint") >= 3 and {"documents", "grouping", "instances", "tokenizer"} <= set(kinds)
    assert any("/journal/" in name for name in listed.stdout.splitlines())
    # What a machine with an empty cache reads comes from the bucket.
    sql = (
        "select state, host, (select count(*) from steps where name = 'pretrain') as trained from runs"
        " where flow = 'pretrain'"
    )
    for cache in ("/home/eclectus/cache", "/tmp/cache"):
        shown = worker.run(["env", f"ECLECTUS_CACHE={cache}", "eclectus", "sql", sql])
        assert shown.stdout.split()[-3:] == ["completed", "worker", "3"], shown


def test_a_source_outside_the_allowed_paths_is_refused(cluster):
    state = end_of(cluster, start_run(cluster, "curate", sources=["/etc/passwd"]))
    assert state["type"] == "FAILED" and "outside /opt/eclectus and /home/eclectus (ECLECTUS_ROOTS)" in state["message"]


def test_no_service_came_near_its_memory_limit(cluster):
    cluster.watch()
    for name, most in cluster.most_memory.items():
        limit = cluster.instances[name].service["mem_limit"]
        assert most < 0.8 * int(limit[:-1]) * {"m": 2**20, "g": 2**30}[limit[-1]], f"{name}: {most >> 20} MB of {limit}"


def test_a_run_whose_worker_is_stopped_has_crashed_and_is_scheduled_again(cluster):
    long = SETTINGS | {"pretrain_steps": 1_000_000, "training_workers": 0}
    run = start_run(cluster, "pretrain", **long, sources=[write_documents(cluster)])
    training = {
        "flow_runs": {"id": {"any_": [run]}},
        "task_runs": {"name": {"any_": ["train dense warm-up"]}, "state": {"type": {"any_": ["RUNNING"]}}},
    }
    wait_until(lambda: prefect(cluster, "task_runs/filter", training), cluster, 600)
    (took,) = cluster.stop({"worker"}).values()
    assert took is not None, f"the worker had to be killed\n{log_of(cluster)}"
    assert "CRASHED" in {state["type"] for state in prefect(cluster, f"flow_run_states/?flow_run_id={run}")}
    end = time.monotonic() + 180
    while (state := prefect(cluster, f"flow_runs/{run}")["state"]["name"]) != "AwaitingRetry":
        assert time.monotonic() < end, state
        time.sleep(0.5)


def test_everything_stops_in_its_time_and_leaves_nothing(cluster):
    namespaces = cluster.namespaces()
    assert len(processes_in(namespaces)) > 20 and cluster.uplink in os.listdir("/sys/class/net")
    took = cluster.stop()
    assert took.keys() == cluster.names.keys() - {"bucket", "deploy"}
    for name, each in took.items():
        allowed = seconds(cluster.instances[name].service.get("stop_grace_period"), DOCKERS_GRACE)
        assert each is not None and each < allowed, f"{name} had to be killed\n{cluster.instances[name].log[-2000:]}"
    cluster.close()
    wait_until_gone(namespaces, cluster.uplink)


def test_a_killed_test_leaves_nothing(tmp_path):
    code = (
        "import json, pathlib, signal, sys; from tests.support.compose import Cluster\n"
        "with Cluster(pathlib.Path(sys.argv[1]), only={'redis'}) as cluster:\n"
        "    print(json.dumps(sorted(cluster.namespaces())), flush=True); signal.pause()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
    )
    namespaces = set(json.loads(child.stdout.readline()))
    assert len(processes_in(namespaces)) >= 2
    child.send_signal(signal.SIGKILL)
    child.communicate()
    wait_until_gone(namespaces, f"ecl{child.pid}")
