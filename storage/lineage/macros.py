"""The questions that people ask most, as DuckDB table macros, and the index of who was made from whom that answers them.

    upstream(x), downstream(x)   what an artifact was made from, and what was made from it
    trace(x)                     what holds a document, and what was made from that
    difference(a, b)             what differs between two runs

Compaction writes the index beside each Parquet part: `edges`, two numbers each, and `nodes`, in the order in which they were made,
since what hangs together was made together. A connection of ours walks in `eclectus.storage.lineage.graph`'s copy of it; where only DuckDB is at hand (the
shell, a bundle) a recursive query does. Price in a history of a million steps: docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from eclectus.storage.artifact import KINDS

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

_LIVE = """
    live as materialized (from live_events),
    live_nodes as materialized ({nodes}),
    live_edges as materialized ({edges}),
    n as not materialized (from compacted_nodes union all from live_nodes)"""
_GONE_BY = "union select e.{gives} from {name} join e on e.{has} = {name}.node"
# The list hides from the planner how many it fears they are, which would have it build its hash table of all nodes.
_FOUND = "found as materialized (select unnest(nodes) as node from (select list(node) as nodes from reached))"
_PLACED = "select distinct placed from n where node in (from found)"


@dataclass(frozen=True)
class Walk:
    """How a graph is walked. tables: SQL of `n`, the nodes, and what else the walk needs.

    step: SQL of a table `name` of everything that is reached from the nodes that `seed` gives. placed: SQL of the times at which what was
    reached was made.
    """

    tables: str
    step: str
    placed: str = _PLACED

    def from_(self, name: str, seed: str, up: bool) -> str:
        gives, has = ("input", "output") if up else ("output", "input")
        return self.step.format(name=name, seed=seed, gives=gives, has=has, up=str(up).lower())


# Over the journals: live ones are read once a walk, and edges are numbers in memory, so that a level of the walk costs microseconds.
SHELL = Walk(
    _LIVE + ", e as materialized (select output, input from compacted_edges union all from live_edges)",
    "{name}(node) as ({seed} " + _GONE_BY + ")",
)
# In connections that have `eclectus.storage.lineage.graph.reached`, which knows the compacted edges, and when their nodes were made.
OURS = Walk(
    _LIVE,
    "{name} as materialized (select unnest(reached((select coalesce(list(node), []) from ({seed}) seed(node)), "
    "(select coalesce(list([output, input]), []) from live_edges), {up}), recursive := true))",
    "select distinct placed from reached union select placed from live_nodes where node in (from found)",
)
# Over tables `edges` and `nodes` (storage/lineage/bundle.py).
BUNDLE = Walk(
    "e as not materialized (from edges), n as not materialized (from nodes)",
    "{name}(node) as ({seed} " + _GONE_BY + ")",
)

_TYPED = "regexp_extract(x, '^([a-z]+-)?([0-9a-f]+)$', 2)"
_MATCHES = f"""
    select distinct node from n
    where digits between cast('0x' || rpad({_TYPED}[1:15], 15, '0') as ubigint) and cast('0x' || rpad({_TYPED}[1:15], 15, 'f') as ubigint)
      and {_TYPED} <> '' and starts_with(artifact, {_TYPED}) and (not contains(x, '-') or starts_with(x, kind || '-'))"""
# Times are joined first: they say which row groups hold what was reached, and no text of the others is read.
_SHOWN = """
    select kind || '-' || artifact[1:12] as name, kind, artifact, arg_min(made_by, made) as made_by,
           arg_min(step_name, made) as step_name, arg_min(label, placed) as label, arg_min(run, made) as run, min(made) as made
    from n join when_placed using (placed) where node in (from found) group by kind, artifact order by made nulls first, name"""

_DIFFERENCE = """table
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
        order by array_position(['run', 'package', 'step', 'setting', 'input', 'output', 'metric'], what), label, name"""


def macros(walk: Walk) -> Iterator[tuple[str, str]]:
    """(NAME(x), SQL) of every macro."""
    tables = walk.tables.replace("{nodes}", nodes("live")).replace("{edges}", edges("live"))
    when = f"{_FOUND}, when_placed as materialized ({walk.placed})"
    for name, up in (("upstream", True), ("downstream", False)):
        yield (
            f"{name}(x)",
            f"""table
        with recursive {tables}, start as materialized ({_MATCHES}), {walk.from_("reached", "from start", up)}, {when}
        {_SHOWN}""",
        )
    yield (
        "trace(x)",
        f"""table
        with recursive {tables},
             held as materialized (
                 select 'instances' as kind, instances as artifact, count(distinct instance) as instances, sum(tokens) as tokens
                 from documents where document = x or name = x group by instances
                 union all
                 select distinct 'documents', artifact, null, null from held_documents where document = x or name = x),
             {walk.from_("learned", f"select {NODE} from held where kind = 'instances'", up=False)},
             {walk.from_("reached", f"select {NODE} from held", up=False)}, {when},
             shown as materialized ({_SHOWN})
        select case when held.artifact is not null then 'holds it'
                    when shown.kind = 'checkpoint' and shown.node in (select node from learned) then 'learned from it'
                    else 'made from what holds it' end as relation,
               shown.name, shown.kind, shown.artifact, held.instances, held.tokens, made_by as step, label, run, made
        from (select *, {NODE} as node from shown) shown left join held using (artifact)
        union all
        select 'read it', s.label, 'step', null, null, null, s.step, s.label, s.run, s.ended
        from steps s where s.step in (select step from step_inputs semi join held using (artifact))
        order by made nulls first, relation""",
    )
    yield "difference(a, b)", _DIFFERENCE


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
