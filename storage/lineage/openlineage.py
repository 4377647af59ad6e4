"""Lineage as OpenLineage events, for teams with Marquez, DataHub or another catalogue that understands them.

A run is a run of the job `FLOW`; each of its steps is a run of the job `FLOW.LABEL` under it, with its inputs and
output as data sets. An artifact is the data set `KIND-DIGITS` of the home's namespace, with the whole digest as its
version; an outside source has the name of the step's input. Identifiers are derived from ours, so sending twice adds
nothing. The transport is the client library's own setting (OPENLINEAGE_URL, OPENLINEAGE_CONFIG, openlineage.yml), or a
file of one event per line. Needs the extra `openlineage`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import KINDS
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect

if TYPE_CHECKING:
    import duckdb
    from openlineage.client.event_v2 import RunEvent

PRODUCER = "https://pypi.org/project/eclectus"
ENDED = {"completed": "COMPLETE", "reused": "COMPLETE", "failed": "FAIL", "cancelled": "ABORT"}
_STEPS = """
    select s.step, s.run, s.flow, s.label, s.state, s.reason, s.key, s.seed, s.peak_memory, s.started, s.ended,
           (select json_group_object(t.name, t.value) from settings t where t.step = s.step) as settings
    from steps s where s.run = $1 order by s.started"""
_RUN = "select run, flow, state, started, ended, error, code_version, parameters, packages from runs where run = $1"


def export(home: Home, runs: list[str], out: Path | None = None, namespace: str = "eclectus") -> int:
    """Sends the events of these runs, or writes them to `out`; returns their number. runs: whole ids.

    Raises EclectusError without the client library, when `out` exists, and when no transport is configured.
    """
    try:
        from openlineage.client import OpenLineageClient
        from openlineage.client.transport.file import FileConfig, FileTransport
    except ImportError as error:
        raise EclectusError(
            "OpenLineage's client is missing; install the extra: pip install 'eclectus[openlineage]'"
        ) from error
    if out is not None and out.exists():
        raise EclectusError(f"{out} is there already; choose another name, or remove it")
    with connect(home) as connection:
        found = [event for run in runs for event in _events(connection, run, namespace)]
    try:
        file = FileTransport(FileConfig(log_file_path=str(out), append=True)) if out else None
        with contextlib.closing(OpenLineageClient(transport=file)) as client:
            if client.transport.kind in ("console", "noop"):
                raise EclectusError(
                    "no transport for OpenLineage events is configured; set OPENLINEAGE_URL, or name a file with --out"
                )
            for event in found:
                client.emit(event)
    except EclectusError:
        raise
    except Exception as error:
        # The client passes on any error of its transport's library.
        raise EclectusError(f"OpenLineage events cannot be sent ({type(error).__name__}: {error})") from error
    return len(found)


def _events(connection: duckdb.DuckDBPyConnection, run: str, namespace: str) -> Iterator[RunEvent]:
    """START and, where it has ended, COMPLETE, FAIL or ABORT of a run and each of its steps, in that order."""
    from openlineage.client import event_v2 as ol
    from openlineage.client import facet_v2 as facets

    (about,) = _rows(connection, _RUN, run)
    parent = ol.Run(_identifier(run), {"eclectus": _facet(about, "run code_version parameters packages")})
    job = ol.Job(namespace, about["flow"], {"jobType": _job_type("FLOW")})
    yield from _lifecycle(about, parent, job, about["error"], [], [])
    facet = facets.parent_run.ParentRunFacet(
        facets.parent_run.Run(parent.runId), facets.parent_run.Job(namespace, about["flow"])
    )
    inputs = _by_step(connection, "select step, name, artifact, kind from step_inputs where run = $1", run)
    outputs = _by_step(
        connection,
        "select o.step, o.artifact, o.kind, a.rows, a.bytes "
        "from step_outputs o join artifacts a using (artifact, kind) where o.run = $1",
        run,
    )
    for step in _rows(connection, _STEPS, run):
        about_step = {"parent": facet, "eclectus": _facet(step, "step state reason key seed peak_memory settings")}
        read = [ol.InputDataset(namespace=namespace, **_data_set(each)) for each in inputs.get(step["step"], [])]
        made = [_output(each, namespace) for each in outputs.get(step["step"], [])]
        work = ol.Job(namespace, f"{about['flow']}.{step['label']}", {"jobType": _job_type("STEP")})
        fault = step["reason"] if step["state"] == "failed" else None
        yield from _lifecycle(step, ol.Run(_identifier(step["step"]), about_step), work, fault, read, made)


def _lifecycle(
    row: dict[str, Any], run: Any, job: Any, fault: str | None, read: list[Any], made: list[Any]
) -> Iterator[RunEvent]:
    from openlineage.client import event_v2 as ol
    from openlineage.client import facet_v2 as facets

    yield ol.RunEvent(
        eventTime=_time(row["started"]), producer=PRODUCER, run=run, job=job, eventType=ol.RunState.START, inputs=read
    )
    if row["state"] in ENDED:
        error = {"errorMessage": facets.error_message_run.ErrorMessageRunFacet(fault, "PYTHON")} if fault else {}
        yield ol.RunEvent(
            eventTime=_time(row["ended"]),
            producer=PRODUCER,
            run=ol.Run(run.runId, run.facets | error),
            job=job,
            eventType=ol.RunState[ENDED[row["state"]]],
            inputs=read,
            outputs=made,
        )


def _output(row: dict[str, Any], namespace: str) -> Any:
    from openlineage.client import event_v2 as ol
    from openlineage.client import facet_v2 as facets

    statistics = facets.output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(row["rows"], row["bytes"])
    return ol.OutputDataset(namespace=namespace, **_data_set(row), outputFacets={"outputStatistics": statistics})


def _data_set(row: dict[str, Any]) -> dict[str, Any]:
    """Name and facets of an artifact, or of an outside source."""
    from openlineage.client import facet_v2 as facets

    version = facets.dataset_version_dataset.DatasetVersionDatasetFacet(row["artifact"])
    name = f"{row['kind']}-{row['artifact'][:12]}" if row["kind"] in KINDS else row["name"]
    return {"name": name, "facets": {"version": version}}


def _facet(row: dict[str, Any], names: str) -> Any:
    from openlineage.client import facet_v2 as facets

    values = {name: row[name] for name in names.split() if row[name] is not None}
    for name in ("settings", "parameters", "packages"):
        if name in values:
            values[name] = json.loads(values[name])
    return facets.RunFacet(producer=PRODUCER).with_additional_properties(**values)


def _job_type(kind: str) -> Any:
    from openlineage.client import facet_v2 as facets

    return facets.job_type_job.JobTypeJobFacet("BATCH", "ECLECTUS", jobType=kind)


def _identifier(name: str) -> str:
    """A step's own UUID; else one derived from the name."""
    try:
        return str(uuid.UUID(name))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"eclectus:{name}"))


def _time(moment: datetime.datetime) -> str:
    return moment.replace(tzinfo=datetime.UTC).isoformat()


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, run: str) -> list[dict[str, Any]]:
    answer = connection.execute(sql, [run])
    names = [column[0] for column in answer.description]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def _by_step(connection: duckdb.DuckDBPyConnection, sql: str, run: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(connection, sql, run):
        found.setdefault(row["step"], []).append(row)
    return found
