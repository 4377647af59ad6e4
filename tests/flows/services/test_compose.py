"""docker-compose.yml, read as an operator reads it."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
import yaml

from tests.support.compose import FILE, ROOT, SECRETS, interpolate

OURS = ("bucket", "prefect-server", "prefect-services", "ray-head", "ray-worker", "ray-gpu-worker", "deploy", "worker")


@pytest.fixture(scope="module")
def written():
    return yaml.safe_load(FILE.read_text())


def test_only_the_ui_is_published_and_only_on_loopback(written):
    published = {name: service["ports"] for name, service in written["services"].items() if "ports" in service}
    assert published == {"prefect-server": ["127.0.0.1:4200:4200"]}
    assert all(service["networks"] == ["eclectus"] for service in written["services"].values())


def test_every_service_is_limited_and_every_lasting_one_is_restarted_and_watched(written):
    for name, service in written["services"].items():
        assert "mem_limit" in service, name
        lasting = service["restart"] == "unless-stopped"
        assert lasting or name in ("bucket", "deploy")
        # The services of Prefect answer no port.
        assert not lasting or "healthcheck" in service or name == "prefect-services", name
        assert service["logging"]["options"]["max-size"] and service["security_opt"] == ["no-new-privileges:true"]
        assert "build" not in service or service["cap_drop"] == ["ALL"]


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
    assert interpolate("${A:-b}${C:?d}${E}$$(f)", {"C": "c", "E": "e"}) == "bce$(f)"
