"""`eclectus deploy`: registers the work pool, the deployments of prefect.yaml and the automations with the server.

Safe to repeat: what is registered already is left as it is, with all that operators have changed since (schedules that
they paused or added, parameters, limits). Only a deployment whose declaration has changed since it was last registered
is registered again, and even then keeps the schedules of its operators. `eclectus up` and the deploy job of
docker-compose.yml call it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError

POOL = "eclectus"
# Prefect variable with what was last registered: name of each deployment -> its digest and its schedules.
REGISTERED = "eclectus_deployments"
# A schedule's own fields; the others are ids and times of the server.
SCHEDULE = ("schedule", "active", "parameters", "slug")


def deploy() -> list[str]:
    """Returns the names of the automations. Raises EclectusError when no server is configured or it refuses."""
    if not os.environ.get("PREFECT_API_URL"):
        raise EclectusError(f"no Prefect server is configured; set PREFECT_API_URL, or start one with: {command('up')}")
    os.environ.setdefault("ECLECTUS_DIRECTORY", str(project()))
    from prefect.client.orchestration import get_client

    declared = declarations(project())
    with get_client(sync_client=True) as client:
        _create_pool(client)
        registered = _read_registered(client)
        found = _read_deployments(client, [*declared])
        changed = [
            name for name, each in declared.items() if name not in found or each["digest"] != _digest(registered, name)
        ]
        if changed:
            names = (word for name in changed for word in ("--name", name))
            _prefect("--no-prompt", "deploy", *names)
            for name in changed:
                if name in found:
                    _restore_schedules(client, found[name], registered.get(name), declared[name])
            _write_registered(client, registered | declared)
    from eclectus.flows.services.automations import create_automations

    return create_automations()


def project() -> Path:
    """The folder of prefect.yaml and of the flows: $ECLECTUS_DIRECTORY, or the checkout of this code."""
    folder = Path(os.environ.get("ECLECTUS_DIRECTORY") or Path(__file__).resolve().parents[2])
    if not (folder / "prefect.yaml").is_file():
        raise EclectusError(f"{folder} has no prefect.yaml; set ECLECTUS_DIRECTORY to a checkout of Eclectus")
    return folder


def declarations(folder: Path) -> dict[str, dict[str, Any]]:
    """What prefect.yaml and the flows' parameters declare: name of each deployment -> its digest and its schedules.

    Without Prefect and the flows, which take seconds to import.
    """
    import yaml

    from eclectus.flows.parameters import PARAMETERS

    whole = yaml.safe_load((folder / "prefect.yaml").read_text("utf-8"))
    common = [whole.get("prefect-version"), whole.get("pull"), str(folder)]
    declared = {}
    for each in whole["deployments"]:
        model = PARAMETERS.get(each["entrypoint"].rpartition(":")[2])
        form = model.model_json_schema() if model else None
        text = json.dumps([common, each, form], sort_keys=True, default=str)
        schedules = json.loads(json.dumps(each.get("schedules") or [], default=str))
        declared[each["name"]] = {"digest": hashlib.sha256(text.encode()).hexdigest(), "schedules": schedules}
    return declared


def kept_schedules(
    before: list[dict[str, Any]], now: list[dict[str, Any]], declared_before: list[Any] | None, declared: list[Any]
) -> list[dict[str, Any]]:
    """The schedules that a deployment should have after it was registered again.

    before: those it had. now: those that registering it has made. declared_before: what was declared then, None if that
    is not known. All of `before` when the declaration of schedules is the same. Otherwise the new ones, paused if an
    equal one was paused, and those that operators had added.
    """
    if declared_before is None or declared_before == declared:
        return before
    paused = [_timing(each) for each in before if not each["active"]]
    renewed = [{**each, "active": each["active"] and _timing(each) not in paused} for each in now]
    ours = [_timing({"schedule": each}) for each in declared_before] + [_timing(each) for each in now]
    return renewed + [each for each in before if _timing(each) not in ours]


def _timing(schedule: dict[str, Any]) -> tuple[Any, ...]:
    """When it is due: what makes two schedules the same, whether declared or read from the server."""
    timing = schedule["schedule"]
    every = timing.get("interval")
    return timing.get("cron"), float(every) if every else None, timing.get("rrule"), timing.get("timezone") or "UTC"


def _create_pool(client: Any) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        # `prefect work-pool create` would ask the server for the list of worker types, which asks the internet.
        template = ProcessWorker.get_default_base_job_template()
        # Another `deploy` may have been quicker.
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def _read_deployments(client: Any, names: list[str]) -> dict[str, Any]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    found = client.read_deployments(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=names)))
    return {each.name: each for each in found}


def _restore_schedules(client: Any, before: Any, registered: dict[str, Any] | None, declared: dict[str, Any]) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate

    had = [_fields(each) for each in before.schedules]
    has = [_fields(each) for each in client.read_deployment(before.id).schedules]
    wanted = kept_schedules(had, has, registered["schedules"] if registered else None, declared["schedules"])
    if wanted != has:
        schedules = [DeploymentScheduleUpdate(**each) for each in wanted]
        client.update_deployment(before.id, DeploymentUpdate(schedules=schedules))


def _fields(schedule: Any) -> dict[str, Any]:
    read = schedule.model_dump(mode="json")
    return {name: read.get(name) for name in SCHEDULE}


def _digest(registered: dict[str, Any], name: str) -> str | None:
    known = registered.get(name)
    return known.get("digest") if isinstance(known, dict) else None


def _read_registered(client: Any) -> dict[str, Any]:
    """{} on a server on which nothing was registered, or by a version that kept no note of it."""
    found = client.read_variable_by_name(REGISTERED)
    return found.value if found and isinstance(found.value, dict) else {}


def _write_registered(client: Any, registered: dict[str, Any]) -> None:
    body = {"name": REGISTERED, "value": registered, "tags": ["eclectus"]}
    if client.read_variable_by_name(REGISTERED) is None:
        client.request("POST", "/variables/", json=body).raise_for_status()
    else:
        client.request("PATCH", "/variables/name/{name}", path_params={"name": REGISTERED}, json=body)


def _prefect(*words: str) -> None:
    """Runs one `prefect` command in this process. Raises EclectusError with its output when it fails.

    A process for each command would spend 4 s on importing Prefect again. `prefect.cli.app` only reads `sys.argv`, so
    the command line object behind it is called, which takes the words as an argument.
    """
    from prefect.cli._app import _app as prefect_commands

    output = io.StringIO()
    with contextlib.chdir(project()), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            prefect_commands.meta(words)
            code: object = 0
        except SystemExit as end:
            code = end.code
    if code:
        raise EclectusError(f"`prefect {' '.join(words)}` failed: {output.getvalue().strip()[-500:]}")
