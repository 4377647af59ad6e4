"""One DuckDB file for a colleague: a run with everything it was made from, as real tables, readable without the home.

The tables and macros have the names and columns of docs/lineage.md. Steps of other runs are included where the run
reused their artifacts, with the rows of those runs. The file is in the storage format of DuckDB 1.0.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import new_database
from eclectus.storage.lineage.sql.macros import NODE, macros
from eclectus.storage.lineage.sql.placeholders import create_placeholders
from eclectus.storage.lineage.sql.tables import create_views

_UPSTREAM = f"""
    create temp table upstream_nodes as
    with start as (
        select artifact from step_outputs where run = $1 union select artifact from step_inputs where run = $1)
    select node, any_value(artifact) as artifact, arg_min(made_by, made) as made_by
    from nodes where node in (select node from reached((select list({NODE}) from start), true)) group by node"""
_CHOSEN_STEPS = """
    create temp table chosen as
    select step, run from steps
    where run = $1 or step in (select made_by from upstream_nodes where made_by is not null)
       or step in (select a.made_by from artifacts a semi join upstream_nodes using (artifact))"""
TABLES = {
    "runs": "from runs where run = $1 or run in (select run from chosen) order by started",
    "steps": "from steps where step in (select step from chosen) order by started",
    "step_inputs": "from step_inputs where step in (select step from chosen)",
    "step_outputs": "from step_outputs where step in (select step from chosen)",
    "settings": "from settings where step in (select step from chosen)",
    "metrics": "from metrics where step in (select step from chosen) order by logged",
    "forecasts": "from forecasts where step in (select step from chosen) order by made",
    "artifacts": "from artifacts where artifact in (select artifact from upstream_nodes)",
    "documents": "from documents where instances in (select artifact from upstream_nodes)",
    "held_documents": "from held_documents where artifact in (select artifact from upstream_nodes)",
    "routing": "from routing where evaluation in (select artifact from upstream_nodes)",
    "decisions": "from decisions where checkpoint in (select artifact from upstream_nodes) order by logged",
    "champions": "from champions where checkpoint in (select artifact from upstream_nodes)",
    "edges": """from edges
        where output in (select node from upstream_nodes) and input in (select node from upstream_nodes)""",
    "nodes": """from nodes where node in (select node from upstream_nodes)
        and (made_by is null or made_by in (select step from chosen))""",
}


def bundle(home: Home, run: str, out: Path) -> Path:
    """Writes the bundle of a run. run: its whole name. Raises EclectusError when `out` exists or cannot be written."""
    if out.exists():
        raise EclectusError(f"{out} is there already; choose another name, or remove it")
    home.refresh()
    create_placeholders(home)
    try:
        with new_database(out, replaced=False) as connection:
            # The home's views and helper tables are left behind in the connection's own, temporary database.
            connection.execute("use memory")
            create_views(connection, home)
            connection.execute(_UPSTREAM, [run])
            connection.execute(_CHOSEN_STEPS, [run])
            for name, sql in TABLES.items():
                connection.execute(f"create table made.{name} as {sql}", [run] if "$1" in sql else [])
            connection.execute("use made")
            for name, body in macros(bundled=True).items():
                connection.execute(f"create macro {name} as {body}")
    except FileExistsError as error:
        raise EclectusError(f"{out} was written by another process meanwhile; it stays as it is") from error
    except (OSError, duckdb.IOException) as error:
        raise EclectusError(f"{out} cannot be written: {str(error).splitlines()[0]}") from error
    return out
