"""Columns of the files of the lineage: journals by stream, tables beside artifacts, indexes of compacted journals."""

from __future__ import annotations

from eclectus.storage.journal import DECISIONS, EVENTS, METRICS

_OUTPUT = {
    "kind": "VARCHAR",
    "artifact": "VARCHAR",
    "rows": "BIGINT",
    "bytes": "BIGINT",
    "created": "TIMESTAMP",
    "path": "VARCHAR",
    "statistics": "JSON",
}
OUTPUT = f"STRUCT({', '.join(f'{name} {kind}' for name, kind in _OUTPUT.items())})"
# How `json_transform` is told a nested type.
SHAPES = {OUTPUT: _OUTPUT}
COLUMNS = {
    EVENTS: {
        "event": "VARCHAR",
        "logged": "TIMESTAMP",
        "started": "TIMESTAMP",
        "run": "VARCHAR",
        "flow": "VARCHAR",
        "state": "VARCHAR",
        "parameters": "JSON",
        "code_version": "VARCHAR",
        "host": "VARCHAR",
        "python": "VARCHAR",
        "packages": "JSON",
        "prefect_flow_run": "VARCHAR",
        "error": "VARCHAR",
        "step": "VARCHAR",
        "name": "VARCHAR",
        "label": "VARCHAR",
        "key": "VARCHAR",
        "version": "INTEGER",
        "reason": "VARCHAR",
        "seconds": "DOUBLE",
        "peak_memory": "BIGINT",
        "cpu_seconds": "DOUBLE",
        "seed": "BIGINT",
        "prefect_task_run": "VARCHAR",
        "settings": "MAP(VARCHAR, JSON)",
        "inputs": "MAP(VARCHAR, VARCHAR)",
        "output": OUTPUT,
        "forecast": "JSON",
        "by": "VARCHAR",
    },
    METRICS: {
        "logged": "TIMESTAMP",
        "run": "VARCHAR",
        "step": "VARCHAR",
        "name": "VARCHAR",
        "value": "DOUBLE",
        "at_step": "BIGINT",
        "tags": "MAP(VARCHAR, VARCHAR)",
    },
    DECISIONS: {
        "logged": "TIMESTAMP",
        "run": "VARCHAR",
        "line": "VARCHAR",
        "verdict": "VARCHAR",
        "checkpoint": "VARCHAR",
        "reason": "VARCHAR",
        "evaluations": "JSON",
        "gate": "VARCHAR",
        "rules": "JSON",
        "by": "VARCHAR",
    },
}
# Text columns that a line must have to be a row of its stream.
NEEDED = {EVENTS: ("run", "event"), METRICS: ("run", "name"), DECISIONS: ("line", "verdict", "checkpoint")}
DOCUMENTS = {
    "document": "VARCHAR",
    "name": "VARCHAR",
    "language": "VARCHAR",
    "domain": "VARCHAR",
    "source": "VARCHAR",
    "instance": "BIGINT",
    "instance_offset": "INTEGER",
    "tokens": "INTEGER",
    "document_offset": "INTEGER",
}
# What `folded` needs to join the beginning and the end of a run or step.
FOLDED = ("event", "logged", "started", "run", "step", "seconds")
# Which journals are in which part; a part counts once it is listed here.
CONTENTS = {"stream": "VARCHAR", "part": "VARCHAR", "journal": "VARCHAR"}
ROUTING = {
    "layer": "INTEGER",
    "expert": "INTEGER",
    "language": "VARCHAR",
    "domain": "VARCHAR",
    "share": "DOUBLE",
    "top_k_share": "DOUBLE",
    "routed": "BIGINT",
}
FIRST_LOSSES = {"step": "VARCHAR", "instances": "VARCHAR", "span": "BIGINT", "loss": "FLOAT"}
HELD = {"document": "VARCHAR", "name": "VARCHAR"}
