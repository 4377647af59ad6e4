"""Table macros for the questions that users ask most, and the index of edges and nodes that answers them.

    reached(start, up)           nodes that can be reached from a list of nodes, with the fewest steps to each
    upstream(x), downstream(x)   what an artifact was made from, and what was made from it
    trace(x)                     which artifacts hold a document, and what was made from them
    difference(a, b)             what differs between two runs

`reached` is one breadth-first recursive query, which the others hold, in Python connections, in `eclectus.duckdb` and
in bundles alike. It keeps one row per node (`using key`), so a diamond is visited once; this needs DuckDB 1.3 or later.
Compaction writes the index next to each Parquet part of events: `edges`, two 64-bit numbers each, and `nodes`, ordered
by time, since artifacts of one lineage were made at about the same time. Cost: one scan of the edges, then one hash
join per level; docs/benchmarks.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eclectus.storage.artifact import KINDS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# A 64-bit hash of a digest: joins compare numbers, not texts. `digits`: a digest's first 15 as a number, for prefixes.
NODE = "md5_number_lower(artifact)"
DIGITS = "try_cast('0x' || artifact[1:15] as ubigint)"
EDGES = {"output": "UBIGINT", "input": "UBIGINT"}
NODES = {
    "node": "UBIGINT",
    "digits": "UBIGINT",
    "kind": "VARCHAR",
    "artifact": "VARCHAR",
    "placed": "TIMESTAMP",
    "made": "TIMESTAMP",
    "made_by": "VARCHAR",
    "step_name": "VARCHAR",
    "label": "VARCHAR",
    "run": "VARCHAR",
}
# An input is written `kind-digest`: an artifact's kind, or `file`, `files`, `dataset` for sources outside the home.
_INPUT = "'^([a-z]+)-([0-9a-f]+)$'"
PARTS = (
    f"coalesce(nullif(regexp_extract(entry.value, {_INPUT}, 2), ''), entry.value) as artifact, "
    f"coalesce(nullif(regexp_extract(entry.value, {_INPUT}, 1), ''), 'source') as kind"
)

_WALK = """
    with recursive
        e as materialized (
            select case when {up} then output else input end as here, case when {up} then input else output end as there
            from edges),
        walk(node, steps_away) using key (node) as (
            select unnest({start}) as node, 0 as steps_away
            union all
            select e.there, min(walk.steps_away) + 1 from walk join e on e.here = walk.node
                left join recurring.walk as seen on seen.node = e.there where seen.node is null group by e.there)
    select node, steps_away from walk"""
_REACHED = "table" + _WALK.format(start="start", up="up")

# The user's text `x`: an optional kind, then the first digits of a digest.
_TYPED = "regexp_extract(lower(x), '^([a-z_]+-)?([0-9a-f]+)$', 2)"
_MATCHES = f"""
    select distinct node from nodes
    where digits between cast('0x' || rpad({_TYPED}[1:15], 15, '0') as ubigint)
                     and cast('0x' || rpad({_TYPED}[1:15], 15, 'f') as ubigint)
      and {_TYPED} <> '' and starts_with(artifact, {_TYPED})
      and (not contains(x, '-') or starts_with(x, kind || '-'))"""
# The list hides DuckDB's overestimated row count, so that the join builds its hash table of the rows found, not of all.
# Times are joined first: they select the row groups that hold what was found, and no text of the others is read.
_FOUND = f"""
    found as materialized (select unnest(pairs, recursive := true) from (select list(r) as pairs from (
        {_WALK.format(start="(select list(node) from start)", up="{up}")}) r)),
    when_placed as materialized (select distinct placed from nodes where node in (select node from found))"""
_SHOWN = """
    select kind || '-' || artifact[1:12] as name, kind, artifact, arg_min(made_by, made) as made_by,
           arg_min(step_name, made) as step_name, arg_min(label, placed) as label, arg_min(run, made) as run,
           min(made) as made, min(steps_away) as steps_away
    from nodes join when_placed using (placed) join found using (node)
    group by kind, artifact order by made nulls first, name"""

_LINEAGE = f"""table
    with {{once}}start as materialized ({_MATCHES}), {_FOUND}
    {_SHOWN}"""

# A document's name in its source, its id, or at least 8 digits of the SHA-256 of its text, of which its id has the
# first 32.
_CALLED = (
    "(document = {x} or name = {x} "
    "or (length({x}) between 8 and 64 and regexp_full_match({x}, '[0-9a-fA-F]+') "
    "and starts_with(document, lower({x})[1:32])))"
)
_CALLED_X = _CALLED.format(x="x")
_NAMED = (
    "select distinct document, name from (select document, name from documents union all "
    f"select document, name from held_documents) where {_CALLED.format(x='$1')} order by document"
)

# What holds the document, and the steps that read it: in a bundle, and in a home, where the journals are read once.
_HELD = f"""
             select 'instances' as kind, {{instances}} as artifact,
                    count(distinct instance) as instances, sum(tokens) as tokens
             from {{of_instances}} where {_CALLED_X} group by all
             union all
             select distinct 'documents', {{documents}}, null, null from {{of_documents}} where {_CALLED_X}"""
_WHOLE = "{rows} left join (select distinct artifact from nodes where kind = '{kind}') on digits = artifact[1:32]"
_READ = """
    select 'read it', s.label, 'step', null, null, null, s.step, s.label, s.run, s.ended
    from steps s where s.step in (select step from step_inputs semi join held using (artifact))"""
_READ_ONCE = f"""
    select distinct 'read it', label, 'step', null, null, null, step, label, run, logged from (
        select step, label, run, logged, {PARTS} from (
            select step, label, run, logged, unnest(map_entries(inputs)) as entry
            from (from compacted_ended union all from ends))) semi join held using (artifact)"""

_TRACE = f"""table
    with {{once}}held as materialized ({{held}}),
         start as materialized (select {NODE} as node, kind from held),
         learned as materialized (
             {_WALK.format(start="(select list(node) from start where kind = 'instances')", up="false")}), {_FOUND},
         shown as materialized ({_SHOWN})
    select case when held.artifact is not null then 'holds it'
                when shown.kind = 'checkpoint' and shown.node in (select node from learned) then 'learned from it'
                else 'made from what holds it' end as relation,
           shown.name, shown.kind, shown.artifact, held.instances, held.tokens, made_by as step, label, run, made
    from (select *, {NODE} as node from shown) shown left join held using (artifact)
    union all
    {{read}}
    order by made nulls first, relation"""

_DIFFERENCE = """table
        with chosen as (from (values (a, 'a'), (b, 'b')) v(run, side)),
             facts as (
                 select side, 'run' as what, '' as label, 'code' as name, code_version as value
                     from runs join chosen using (run)
                 union all select side, 'run', '', 'state', state from runs join chosen using (run)
                 union all select side, 'run', '', 'python', python from runs join chosen using (run)
                 union all select side, 'package', '', p.key, json_extract_string(p.value, '$')
                     from (select side, unnest(map_entries(cast(packages as map(varchar, json)))) as p
                           from runs join chosen using (run))
                 union all select side, 'step', s.label, 'version', s.version::varchar
                     from steps s join chosen using (run)
                 union all select side, 'setting', s.label, t.name, t.value::varchar
                     from settings t join chosen using (run) join steps s using (step)
                 union all select side, 'input', s.label, i.name, i.kind || '-' || i.artifact[1:12]
                     from step_inputs i join chosen using (run) join steps s using (step)
                 union all select side, 'output', s.label, o.name, o.kind || '-' || o.artifact[1:12]
                     from step_outputs o join chosen using (run) join steps s using (step)
                 union all select side, 'metric', s.label,
                     m.name || coalesce(nullif(' ' || array_to_string(map_values(m.tags), ' '), ' '), ''),
                     last(m.value order by m.logged)::varchar
                     from metrics m join chosen using (run) join steps s using (step) group by all)
        select * from (
            select what, label, name,
                   any_value(value) filter (side = 'a') as a, any_value(value) filter (side = 'b') as b
            from facts group by what, label, name) d
        where d.a is distinct from d.b  -- plain a and b are the parameters
        order by list_position(['run', 'package', 'step', 'setting', 'input', 'output', 'metric'], what), label, name"""


def named_documents(connection: DuckDBPyConnection, asked: str) -> list[tuple[str, str]]:
    """(id, name) of the documents that `trace(asked)` is about, packed or not, by id."""
    return connection.execute(_NAMED, [asked]).fetchall()


def macros(bundled: bool = False) -> dict[str, str]:
    """Name and parameters -> SQL, in the order of creation. bundled: `nodes` and `edges` are tables, not views."""
    once, read = ("", _READ) if bundled else (_ONCE, _READ_ONCE)
    held = _HELD.format(
        instances="instances" if bundled else "coalesce(artifact, digits)",
        of_instances="documents" if bundled else _WHOLE.format(rows="instance_rows", kind="instances"),
        documents="artifact" if bundled else "coalesce(artifact, digits)",
        of_documents="held_documents" if bundled else _WHOLE.format(rows="held_rows", kind="documents"),
    )
    return {
        "reached(start, up)": _REACHED,
        "upstream(x)": _LINEAGE.format(once=once, up=True),
        "downstream(x)": _LINEAGE.format(once=once, up=False),
        "trace(x)": _TRACE.format(once=once, held=held, read=read, up=False),
        "difference(a, b)": _DIFFERENCE,
    }


def edges(source: str) -> str:
    """SQL: an edge from every input of a step to its output. source: the steps that ended."""
    return (
        f"select distinct md5_number_lower(output) as output, {NODE} as input from "
        f"(select output, {PARTS} from (select output.artifact as output, unnest(map_entries(inputs)) as entry "
        f"from {source} where output is not null))"
    )


def nodes(source: str) -> str:
    """SQL: every artifact with the step that made (else reused) it, and every outside source. source: as in `edges`."""
    made_here = ", ".join(f"'{kind}'" for kind in KINDS)
    made = (
        f"select {NODE} as node, {DIGITS} as digits, kind, artifact, arg_min(logged, order_) as placed, "
        "arg_min(logged, order_) as made, arg_min(step, order_) as made_by, arg_min(name, order_) as step_name, "
        "arg_min(label, order_) as label, arg_min(run, order_) as run "
        "from (select output.kind as kind, output.artifact as artifact, logged, step, name, label, run, "
        f"(state <> 'completed', logged) as order_ from {source} where output is not null) "
        "group by kind, artifact"
    )
    outside = (
        f"select {NODE}, {DIGITS}, kind, artifact, min(logged), null::timestamp, null, null, label, null "
        f"from (select entry.key as label, {PARTS}, logged from (select unnest(map_entries(inputs)) as entry, logged "
        f"from {source})) where kind not in ({made_here}) group by all"
    )
    return f"select * from ({made}) union all select * from ({outside})"


# In place of the views, so that the journals, which are not compacted yet, are read once per question.
_ONCE = f"""ends as materialized (from live_ended), new_nodes as materialized ({nodes("ends")}),
         nodes as not materialized (from compacted_nodes union all from new_nodes),
         edges as not materialized (from compacted_edges union all {edges("ends")}), """
