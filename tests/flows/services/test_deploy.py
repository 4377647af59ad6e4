"""Registering again leaves what is registered as it is: automations, schedules, what operators changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eclectus.flows.services.automations import automations, comparable
from eclectus.flows.services.deploy import declarations, deploy, kept_schedules
from eclectus.flows.services.server import prefect_server
from eclectus.storage.home import Home

ROOT = Path(__file__).parents[3]
NIGHTLY = {"cron": "0 3 * * *", "timezone": "UTC"}


def schedule(timing, active=True):
    return {"schedule": timing, "active": active, "parameters": {}, "slug": None}


def test_two_equal_automations_are_equal_whatever_the_server_adds_and_in_whatever_order():
    for automation in automations():
        sent = automation.model_dump(mode="json")
        read = {**sent, "id": "1", "created": "then", "enabled": False, "owner_resource": None}
        read["trigger"] = {**sent["trigger"], "id": "2", "expect": sorted(sent["trigger"]["expect"], reverse=True)}
        assert comparable(read) == comparable(sent)
        for name, value in (("within", 1.0), ("threshold", 2), ("expect", ["prefect.flow-run.Failed"])):
            assert comparable({**read, "trigger": {**read["trigger"], name: value}}) != comparable(sent), name
        assert comparable({**read, "actions": []}) != comparable(sent)


def test_a_declaration_changes_with_its_entry_and_with_the_settings_of_its_form_only(tmp_path):
    shutil.copy(ROOT / "prefect.yaml", tmp_path)
    first = declarations(tmp_path)
    assert first == declarations(tmp_path) and {"main", "retrain"} < set(first)
    assert [each["cron"] for each in first["retrain"]["schedules"]] == ["0 3 * * *"]
    text = (tmp_path / "prefect.yaml").read_text().replace('cron: "0 3 * * *"', 'cron: "0 4 * * *"')
    (tmp_path / "prefect.yaml").write_text(text)
    changed = declarations(tmp_path)
    assert [name for name in first if changed[name] != first[name]] == ["retrain"]


def test_schedules_of_operators_survive_a_changed_declaration():
    mine, paused = schedule({"interval": 60.0, "timezone": "UTC"}), schedule(NIGHTLY, active=False)
    made = [schedule(NIGHTLY)]
    assert kept_schedules([paused, mine], made, [NIGHTLY], [NIGHTLY]) == [paused, mine]
    assert kept_schedules([paused, mine], made, None, [NIGHTLY]) == [paused, mine], "not known: nothing is lost"
    assert kept_schedules([], made, [NIGHTLY], [NIGHTLY]) == [], "one that was deleted stays so"
    later = {"cron": "0 4 * * *", "timezone": "UTC"}
    renewed = kept_schedules([paused, mine], [schedule(later)], [NIGHTLY], [later])
    assert renewed == [schedule(later), mine], "the one of before is replaced, the operator's is not"
    both = [schedule(NIGHTLY), schedule(later)]
    assert kept_schedules([paused, mine], both, [NIGHTLY], [NIGHTLY, later]) == [paused, schedule(later), mine]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_second_deploy_changes_nothing_on_a_real_server(tmp_path, monkeypatch):
    """Slow: a Prefect server, and `prefect deploy`, which imports the flows."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate

    project = tmp_path / "project"
    project.mkdir()
    for name in ("flows", "tasks", "models", "storage", "eclectus"):
        (project / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "prefect.yaml", project)
    monkeypatch.setenv("ECLECTUS_DIRECTORY", str(project))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with prefect_server(Home.open(tmp_path / "home")):
        names = deploy()
        with get_client(sync_client=True) as client:

            def state():
                triggers = client.request("POST", "/automations/filter", json={}).json()
                found = {each.name: each.model_dump(mode="json") for each in client.read_deployments()}
                return {each["name"]: each["trigger"]["id"] for each in triggers}, found

            (ids, first) = state()
            assert set(names) == set(ids) and len(ids) == 3
            retrain = first["retrain"]
            nightly, mine = retrain["schedules"][0], DeploymentScheduleUpdate(schedule={"interval": 60}, active=True)
            paused = DeploymentScheduleUpdate(schedule=nightly["schedule"], active=False)
            changes = DeploymentUpdate(schedules=[paused, mine], parameters={"parameters": {"sources": ["elsewhere"]}})
            client.update_deployment(retrain["id"], changes)
            client.update_deployment(first["main"]["id"], DeploymentUpdate(paused=True))
            client.request("PATCH", "/work_pools/eclectus", json={"is_paused": True})
            before = state()
            assert deploy() == names and state() == before
            assert client.read_work_pool("eclectus").is_paused

            text = (project / "prefect.yaml").read_text().replace("Scheduled daily:", "Every night:")
            (project / "prefect.yaml").write_text(text)
            client.delete_deployment(first["curate"]["id"])
            deploy()
            after_ids, after = state()
            assert after_ids == ids and "curate" in after and after["curate"]["id"] != first["curate"]["id"]
            assert after["retrain"]["description"].startswith("Every night:")
            timing = [(each["active"], each["schedule"].get("interval")) for each in after["retrain"]["schedules"]]
            assert sorted(timing, key=repr) == [(False, None), (True, 60.0)]
            assert after["main"]["paused"] and after["main"]["updated"] == before[1]["main"]["updated"]
