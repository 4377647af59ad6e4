"""The questions that people ask most, as DuckDB table macros, and the index of who was made from whom that answers them.

    upstream(x), downstream(x)   what an artifact was made from, and what was made from it
    trace(x)                     what holds a document, and what was made from that
    difference(a, b)             what differs between two runs

Compaction writes the index beside each Parquet part: `edges`, two numbers each, and `nodes`, in the order in which they were made,
since what hangs together was made together. Price in a history of a million steps: docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from storage.artifact import KINDS

# A 64-bit number of a digest: a walk joins numbers, not texts. `digits` are a digest's first 15 as a number, to find it by its start.
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
# An input is written `kind-digest`: an artifact's kind, or `file`, `files`, `dataset` for what was read from outside.
_NAMED = "'^([a-z]+)-([0-9a-f]+)$'"
PARTS = (
    f"coalesce(nullif(regexp_extract(entry.value, {_NAMED}, 2), ''), entry.value) as artifact, "
    f"coalesce(nullif(regexp_extract(entry.value, {_NAMED}, 1), ''), 'source') as kind"
)

# Over the journals: live ones are read once a walk, and edges are numbers in memory, so that a level of the walk costs microseconds.
HOME_GRAPH = """
    live as materialized (from live_events),
    live_nodes as materialized ({nodes}),
    e as materialized (select output, input from compacted_edges union all select output, input from ({edges})),
    n as not materialized (from compacted_nodes union all from live_nodes)"""
# Over tables `edges` and `nodes` (storage/bundle.py).
TABLE_GRAPH = "e as not materialized (from edges), n as not materialized (from nodes)"

_TYPED = "regexp_extract(x, '^([a-z]+-)?([0-9a-f]+)$', 2)"
_MATCHES = f"""
    select distinct node from n
    where digits between cast('0x' || rpad({_TYPED}[1:15], 15, '0') as ubigint) and cast('0x' || rpad({_TYPED}[1:15], 15, 'f') as ubigint)
      and {_TYPED} <> '' and starts_with(artifact, {_TYPED}) and (not contains(x, '-') or starts_with(x, kind || '-'))"""
# Times are joined first: they say which row groups hold what was reached, and no text of the others is read.
# The list hides from the planner how many it fears they are, which would have it build its hash table of all nodes.
_WHEN = """
             found as materialized (select unnest(nodes) as node from (select list(node) as nodes from reached)),
             when_placed as materialized (select distinct placed from n where node in (from found))"""
_SHOWN = """
    select kind || '-' || artifact[1:12] as name, kind, artifact, arg_min(made_by, made) as made_by,
           arg_min(step_name, made) as step_name, arg_min(label, placed) as label, arg_min(run, made) as run, min(made) as made
    from n join when_placed using (placed) where node in (from found) group by kind, artifact order by made nulls first, name"""

MACROS = {
    "upstream(x)": f"""
        with recursive GRAPH, start as materialized ({_MATCHES}),
             reached(node) as (from start union select e.input from reached join e on e.output = reached.node),
             {_WHEN}
        {_SHOWN}""",
    "downstream(x)": f"""
        with recursive GRAPH, start as materialized ({_MATCHES}),
             reached(node) as (from start union select e.output from reached join e on e.input = reached.node),
             {_WHEN}
        {_SHOWN}""",
    "trace(x)": f"""
        with recursive GRAPH,
             held as materialized (
                 select 'instances' as kind, instances as artifact, count(distinct instance) as instances, sum(tokens) as tokens
                 from documents where document = x or name = x group by instances
                 union all
                 select distinct 'documents', artifact, null, null from held_documents where document = x or name = x),
             learned(node) as (
                 select {NODE} from held where kind = 'instances'
                 union select e.output from learned join e on e.input = learned.node),
             reached(node) as (select {NODE} from held union select e.output from reached join e on e.input = reached.node),
             {_WHEN},
             shown as materialized ({_SHOWN})
        select case when held.artifact is not null then 'holds it'
                    when shown.kind = 'checkpoint' and shown.node in (from learned) then 'learned from it'
                    else 'made from what holds it' end as relation,
               shown.name, shown.kind, shown.artifact, held.instances, held.tokens, made_by as step, label, run, made
        from (select *, {NODE} as node from shown) shown left join held using (artifact)
        union all
        select 'read it', s.label, 'step', null, null, null, s.step, s.label, s.run, s.ended
        from steps s where s.step in (select step from step_inputs semi join held using (artifact))
        order by made nulls first, relation""",
    "difference(a, b)": """
        with chosen as (from (values (a, 'a'), (b, 'b')) v(run, side)),
             facts as (
                 select side, 'run' as what, '' as label, 'code' as name, code_version as value from runs join chosen using (run)
                 union all select side, 'run', '', 'state', state from runs join chosen using (run)
                 union all select side, 'run', '', 'python', python from runs join chosen using (run)
                 union all select side, 'package', '', p.key, json_extract_string(p.value, '$')
                     from (select side, unnest(map_entries(cast(packages as map(varchar, json)))) as p
                           from runs join chosen using (run))
                 union all select side, 'step', s.label, 'version', s.version::varchar from steps s join chosen using (run)
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
        select what, label, name, any_value(value) filter (side = 'a') as a, any_value(value) filter (side = 'b') as b
        from facts group by what, label, name having a is distinct from b
        order by array_position(['run', 'package', 'step', 'setting', 'input', 'output', 'metric'], what), label, name""",
}


def macros(graph: str) -> Iterator[tuple[str, str]]:
    """(NAME(x), SQL) of every macro. graph: HOME_GRAPH or TABLE_GRAPH."""
    graph = graph.replace("{nodes}", nodes("live")).replace("{edges}", edges("live"))
    for name, body in MACROS.items():
        yield name, "table " + body.replace("GRAPH", graph)


def edges(source: str) -> str:
    """SQL: an edge from every input of a step to its output. source: folded events."""
    return (
        f"select distinct md5_number_lower(output) as output, {NODE} as input from "
        f"(select output, {PARTS} from (select output.artifact as output, unnest(map_entries(inputs)) as entry "
        f"from {source} where event = 'step_ended' and output is not null))"
    )


def nodes(source: str) -> str:
    """SQL: every artifact with the step that made it (or else reused it), and every source outside. source: folded events."""
    made_here = ", ".join(f"'{kind}'" for kind in KINDS)
    made = (
        "select md5_number_lower(output.artifact) as node, try_cast('0x' || output.artifact[1:15] as ubigint) as digits, output.kind as kind, output.artifact as artifact, "
        "arg_min(logged, order_) as placed, arg_min(logged, order_) as made, arg_min(step, order_) as made_by, arg_min(name, order_) as step_name, "
        "arg_min(label, order_) as label, arg_min(run, order_) as run "
        f"from (select *, (state <> 'completed', logged) as order_ from {source} "
        "where event = 'step_ended' and output is not null) group by all"
    )
    outside = (
        f"select {NODE}, {DIGITS}, kind, artifact, min(logged), null::timestamp, null, null, label, null "
        f"from (select entry.key as label, {PARTS}, logged from (select unnest(map_entries(inputs)) as entry, logged from {source} "
        f"where event = 'step_ended')) where kind not in ({made_here}) group by all"
    )
    return f"select * from ({made}) union all select * from ({outside})"
