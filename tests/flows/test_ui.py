"""The factory as people meet it: `eclectus up`, a form in the browser, kill -9, cancelling, `eclectus down`.

Screenshots are kept under build/screenshots/.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest
from browser import BROWSER, Browser
from dense_bases import write_base

from flows.parameters import PARAMETERS

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Factory:
    """A home with everything up."""

    def __init__(self, home: Path) -> None:
        self.home = home
        began = time.monotonic()
        self.said = self.eclectus("up").stdout
        self.seconds = time.monotonic() - began
        self.notes = json.loads((home / "prefect" / "services.json").read_text())

    def eclectus(self, *words: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "--home", str(self.home), *words],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    def call(self, method: str, path: str, body=None):
        request = urllib.request.Request(
            self.notes["api"] + path, json.dumps(body).encode() if body is not None else None, method=method
        )
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def deployment(self, name: str) -> str:
        return next(each["id"] for each in self.call("POST", "/deployments/filter", {}) if each["name"] == name)

    def run(self, identifier: str) -> dict:
        return self.call("GET", f"/flow_runs/{identifier}")

    def labels(self, *states: str) -> set[str]:
        runs = self.call("POST", "/task_runs/filter", {"limit": 200})
        return {each["name"] for each in runs if each["state"] and each["state"]["type"] in states}

    def family(self) -> list[psutil.Process]:
        """Every process of every service."""
        found = []
        for service in self.notes["services"]:
            if psutil.pid_exists(service["pid"]):
                leader = psutil.Process(service["pid"])
                found += [leader, *leader.children(recursive=True)]
        return found

    def named(self, *marks: str) -> list[psutil.Process]:
        return [each for each in self.family() if any(mark in command(each) for mark in marks)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def until(true, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, f"it never came to: {what}"
        time.sleep(0.5)
    return value


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    running = Factory(tmp_path_factory.mktemp("factory") / "home")
    family = running.family()
    try:
        yield running
    finally:
        family += running.family()
        ended = running.eclectus("down").stdout
        _, left = psutil.wait_procs(family, timeout=10)
        assert "Ray" in ended and "worker" in ended and left == [], [command(each) for each in left]
        assert not Path(running.notes["ray"]).exists()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert BROWSER, "this test needs a browser: apt-get install chromium"
    opened = Browser(tmp_path_factory.mktemp("profile"))
    opened.call("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1, mobile=False)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Parameters of an extension of seconds: a tiny dense model, 160 documents in two languages."""
    folder = tmp_path_factory.mktemp("small")
    write_base(folder / "base", "llama")
    lines = [
        json.dumps({"text": f"{text} {number} w{number % 40} w{number % 7}", "language": language})
        for number in range(80)
        for language, text in (("en", "the ship left the harbour"), ("tr", "gemi limandan ayrildi"))
    ]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return {
        "sources": [str(folder / "documents.jsonl")], "base_model": str(folder / "base"), "language_detector": "field",
        "expanded_languages": ["tr"], "embedding_steps": 2, "embedding_dimension": 16, "instance_tokens": 32,
        "post_pretrain_steps": 40, "post_pretrain_warmup_steps": 2, "review_steps": 4, "review_warmup_steps": 1,
        "heldout_minimum": 2, "checkpoint_every": 2, "log_every": 1,
    }  # fmt: skip


def screenshot(browser: Browser, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    data = browser.call("Page.captureScreenshot")["data"]
    (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(data))


def test_up_says_one_line_with_the_address_and_has_every_deployment_and_automation(factory):
    (line,) = factory.said.splitlines()
    assert factory.notes["ui"] in line
    deployments = {each["name"]: each for each in factory.call("POST", "/deployments/filter", {})}
    assert deployments.keys() == {"main", "curate", "pretrain", "extend", "evaluate", "retrain"}
    assert all(each["tags"] and each["description"] and each["pull_steps"] for each in deployments.values())
    (schedule,) = deployments["retrain"]["schedules"]
    assert schedule["schedule"]["cron"] and schedule["schedule"]["timezone"]
    assert deployments["retrain"]["concurrency_limit"] == 1
    automations = {each["name"] for each in factory.call("POST", "/automations/filter", {})}
    assert automations == {"eclectus: zombie runs", "eclectus: crashed runs"}
    assert factory.eclectus("up").stdout == factory.said


def test_a_person_runs_extend_from_its_form_and_a_killed_driver_goes_on_by_itself(factory, browser, small):
    ui, deployment = factory.notes["ui"], factory.deployment("extend")
    browser.call("Page.navigate", url=f"{ui}/deployments")
    browser.wait("[...document.querySelectorAll('a')].some(a => a.textContent.trim() == 'extend')")
    screenshot(browser, "1-deployments")
    browser.evaluate("[...document.querySelectorAll('a')].find(a => a.textContent.trim() == 'extend').click()")
    browser.wait(f"location.href.includes('{deployment}')")
    # The address that "Custom run" leads to; values in it are filled into the form.
    filled = urllib.parse.quote(json.dumps({"parameters": small}))
    browser.call("Page.navigate", url=f"{ui}/deployments/deployment/{deployment}/run?parameters={filled}")
    browser.wait("document.body.innerText.includes('Ray Train workers')")
    shown = " ".join(browser.evaluate("document.body.innerText").split())
    for name, field in PARAMETERS["extend"].model_fields.items():
        assert " ".join(field.description.split()) in shown, f"the form does not explain {name}"
    screenshot(browser, "2-form")
    button = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() == 'Submit')"
    browser.wait(f"!!{button} && !{button}.disabled")
    browser.evaluate(f"{button}.click()")
    until(lambda: factory.call("POST", "/flow_runs/filter", {}), 180, "a run")
    run = next(
        each["id"] for each in factory.call("POST", "/flow_runs/filter", {}) if each["deployment_id"] == deployment
    )
    browser.call("Page.navigate", url=f"{ui}/runs/flow-run/{run}")
    until(lambda: "train stage 1" in factory.labels("RUNNING"), 300, "the training of stage 1")
    screenshot(browser, "3-running")
    until(lambda: factory.named("prefect.engine"), 10, "a driver")[0].kill()
    until(
        lambda: factory.run(run)["state"]["type"] == "COMPLETED",
        400,
        f"completion, instead of {factory.run(run)['state']}",
    )
    assert factory.run(run)["run_count"] == 2
    keys = {each["key"]: each for each in factory.call("POST", "/artifacts/filter", {"limit": 200})}
    assert keys["train-stage-1-progress"]["data"] == 100
    assert keys["train-stage-2-loss"]["data"].startswith("data:image/png;base64,")
    assert "| steps |" in keys["train-stage-2"]["data"]
    with urllib.request.urlopen(keys["data-report-data"]["data"].partition("(")[2].rstrip(")")) as page:
        assert b"Where every record went" in page.read()
    assert "ray-dashboard" in keys
    browser.call("Page.navigate", url=f"{ui}/runs/flow-run/{run}")
    tab = "[...document.querySelectorAll('button,a,[role=tab]')].find(x => x.textContent.trim() == 'Artifacts')"
    browser.wait(f"!!{tab}")
    browser.evaluate(f"{tab}.click()")
    browser.wait("document.body.innerText.includes('train-stage-')")
    screenshot(browser, "4-artifacts")


def test_cancelling_ends_rays_work_within_30_seconds_and_leaves_no_orphan(factory, small):
    deployment = factory.deployment("extend")
    parameters = {**small, "post_pretrain_steps": 100_000}
    run = factory.call(
        "POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"parameters": parameters}}
    )["id"]
    work = ("RayTrainWorker", "TrainController", "ray::Desk", "prefect.engine")
    until(lambda: factory.named("RayTrainWorker") and "train stage 1" in factory.labels("RUNNING"), 300, "training")
    # What the button "Cancel" of the run's page sends.
    factory.call("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    until(lambda: not factory.named(*work), 30, f"the end of {[command(each)[:60] for each in factory.named(*work)]}")
    until(lambda: factory.run(run)["state"]["type"] == "CANCELLED", 180, "cancelled")
    time.sleep(5)
    assert factory.run(run)["state"]["type"] == "CANCELLED" and not factory.named(*work)
    stopped = factory.eclectus("sql", "--json", "select state from runs order by started desc limit 1").stdout
    assert json.loads(stopped) == {"state": "cancelled"}
