"""One DuckDB file for a colleague: a run with everything that it was made from, as real tables, readable without the home.

The tables and macros have the names and columns of docs/lineage.md. Steps of other runs are in it where the run reused what they
made, with those runs' rows. It is written in the storage format of DuckDB 1.0, so any later shell opens it.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import duckdb

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import STORAGE_VERSION
from eclectus.storage.lineage.macros import BUNDLE, NODE, macros
from eclectus.storage.lineage.tables import create_views, plant, text

_REACHED = f"""
    create temp table reached as
    with recursive e as materialized (from edges),
         start as (select artifact from step_outputs where run = $1 union select artifact from step_inputs where run = $1),
         reached(node) as (select {NODE} from start union select e.input from reached join e on e.output = reached.node)
    select node, any_value(artifact) as artifact, min(made_by) as made_by from nodes where node in (from reached) group by node"""
_CHOSEN_STEPS = """
    create temp table chosen as
    select step, run from steps where run = $1 or step in (select made_by from reached where made_by is not null)"""
TABLES = {
    "runs": "from runs where run = $1 or run in (select run from chosen) order by started",
    "steps": "from steps where step in (select step from chosen) order by started",
    "step_inputs": "from step_inputs where step in (select step from chosen)",
    "step_outputs": "from step_outputs where step in (select step from chosen)",
    "settings": "from settings where step in (select step from chosen)",
    "metrics": "from metrics where step in (select step from chosen) order by logged",
    "artifacts": "from artifacts where artifact in (select artifact from reached)",
    "documents": "from documents where instances in (select artifact from reached)",
    "held_documents": "from held_documents where artifact in (select artifact from reached)",
    "routing": "from routing where evaluation in (select artifact from reached)",
    "decisions": "from decisions where checkpoint in (select artifact from reached) order by logged",
    "champions": "from champions where checkpoint in (select artifact from reached)",
    "edges": "from edges where output in (select node from reached) and input in (select node from reached)",
    "nodes": "from nodes where node in (select node from reached)",
}


def bundle(home: Home, run: str, out: Path) -> Path:
    """Writes the bundle of a run. run: its whole name. Raises EclectusError when `out` is there already or cannot be written."""
    if out.exists():
        raise EclectusError(f"{out} is there already; choose another name, or remove it")
    home.refresh()
    plant(home)
    beside = out.with_name(f".{out.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        with duckdb.connect() as connection:
            connection.execute("set enable_progress_bar = false")
            create_views(connection, home)
            connection.execute(_REACHED, [run])
            connection.execute(_CHOSEN_STEPS, [run])
            connection.execute(f"attach {text(beside)} as bundle (storage_version '{STORAGE_VERSION}')")
            for name, sql in TABLES.items():
                connection.execute(f"create table bundle.{name} as {sql}", [run] if "$1" in sql else [])
            connection.execute("use bundle")
            for name, body in macros(BUNDLE):
                connection.execute(f"create macro {name} as {body}")
        os.replace(beside, out)
    except (OSError, duckdb.IOException) as error:
        raise EclectusError(f"{out} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        beside.unlink(missing_ok=True)
    return out
