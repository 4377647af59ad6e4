"""Which trainings saw a document, and at which step first.

A training reads its instances in an order that is a function of the step (models/training/instances.py), so the steps
that read a document follow from its instances and the training's settings. A model that goes on from a checkpoint saw
what that saw. Cost: one query of the lineage, and for each training its instances' numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.storage.lineage.costs import settings_by_step
from eclectus.storage.lineage.sql.macros import named_documents

TRAININGS = ("pretrain", "extend")
_TRAINED = """
    select o.artifact, s.label, s.run, s.name, s.step, s.ended
    from step_outputs o join steps s using (step)
    where s.state = 'completed' and o.kind = 'checkpoint' and list_contains($1, s.name) order by s.ended"""


@dataclass(frozen=True)
class Exposure:
    """A training that read some of the documents. checkpoint: digest. step: the first that did, of `steps`; None where
    the order mixes two sets of instances. before: the digest of the checkpoint that it began from, if any. documents:
    how many of them it read.
    """

    checkpoint: str
    label: str
    run: str
    step: int | None
    steps: int
    before: str | None
    documents: int


def find_documents(home: Home, named: Collection[str], columns: Mapping[str, str]) -> list[str]:
    """The ids of documents that are named, or have these values in `source`, `language` or `domain`, sorted.

    Raises EclectusError for a name that no document has or that several ids begin with, and where nothing is found.
    """
    found: set[str] = set()
    with connect(home) as connection:
        for each in named:
            ids = sorted({document for document, _ in named_documents(connection, each)})
            if not ids:
                raise EclectusError(
                    f"no document that is kept here is called '{each}'; expected its id, at least 8 digits of it, or "
                    "its name"
                )
            if len(ids) > 1 and each not in ids:
                raise EclectusError(f"'{each}' is {len(ids)} documents, such as {', '.join(ids[:3])}; name ids")
            found |= {each} if each in ids else set(ids)
        if columns:
            wanted = {name: columns.get(name) for name in ("source", "language", "domain")}
            rows = connection.execute(
                "select distinct document from documents where ($1 is null or source = $1) "
                "and ($2 is null or language = $2) and ($3 is null or domain = $3)",
                list(wanted.values()),
            ).fetchall()
            if not rows:
                asked = " and ".join(f"{name} '{value}'" for name, value in columns.items())
                known = connection.execute("select distinct source, language, domain from documents limit 5").fetchall()
                shown = "; ".join(", ".join(map(str, row)) for row in known) or "none"
                raise EclectusError(f"no packed document has {asked}; there are (source, language, domain): {shown}")
            found |= {row[0] for row in rows}
    return sorted(found)


def exposures(home: Home, documents: Collection[str]) -> list[Exposure]:
    """The trainings of a home whose own steps read one of the documents, in the order in which they ended."""
    with connect(home) as connection:
        rows = connection.execute(
            "select instances, instance, document from documents where list_contains($1, document)", [list(documents)]
        ).fetchall()
        held: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for instances, instance, document in rows:
            held[instances].append((instance, document))
        trained = connection.execute(_TRAINED, [list(TRAININGS)]).fetchall()
        steps = [row[4] for row in trained]
        settings = settings_by_step(connection, steps)
        inputs: dict[str, dict[str, str]] = defaultdict(dict)
        query = "select step, name, artifact from step_inputs where list_contains($1, step)"
        for step, name, artifact in connection.execute(query, [steps]).fetchall():
            inputs[step][name] = artifact
        counts = dict(
            connection.execute("select artifact, \"rows\" from artifacts where kind = 'instances'").fetchall()
        )
    found = []
    for checkpoint, label, run, name, step, _ in trained:
        given = inputs[step]
        read = {each: held[given[each]] for each in ("instances", "review") if held.get(given.get(each, ""))}
        if not read:
            continue
        start, stop, batch, seed, skipped = _order(name, settings[step])
        before = given.get("start") or given.get("checkpoint")
        whole = counts.get(given["instances"]) or 0
        if "review" in given or not whole:
            first, count = None, len({document for each in read.values() for _, document in each})
        else:
            first, count = _first(read["instances"], whole, (start * batch, stop * batch), seed, skipped)
            if first is None:
                continue
            first //= batch
        found.append(Exposure(checkpoint, label, run, first, stop, before, count))
    return found


def _order(name: str, settings: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """(first step, last step, batch, seed, epochs that the order skips) of a training by its settings."""
    if name == "pretrain":
        from eclectus.tasks.training.pretrain import plan_of
        from eclectus.tasks.training.pretrain_settings import PretrainStageSettings

        chosen: Any = PretrainStageSettings.recorded(settings)
        plan = plan_of(chosen)
    else:
        from eclectus.tasks.training.extend_settings import ExtendStageSettings
        from eclectus.tasks.training.extend_stage import plan_of as plan_of_stage

        chosen = ExtendStageSettings.recorded(settings)
        plan = plan_of_stage(chosen, chosen.budget.steps)
    return plan.start, plan.stop, plan.batch, plan.seed, int(chosen.reordered)


def _first(
    held: list[tuple[int, str]], count: int, positions: tuple[int, int], seed: int, skipped: int
) -> tuple[int | None, int]:
    """(the first position at which one of these instances is read, of how many documents); None if none is.

    positions: [first, end) of the training, of an endless reading of `count` instances.
    """
    from eclectus.models.training.instances import rows_at

    rows = np.array([row for row, _ in held])
    begin, end = positions
    seen: set[int] = set()
    first = None
    # Epoch by epoch: none holds more numbers than there are instances.
    while begin < end and len(seen) < len(set(rows.tolist())):
        stop = min(end, (begin // count + 1) * count)
        read = rows_at(np.arange(begin, stop) + skipped * count, count, seed)
        hits = np.flatnonzero(np.isin(read, rows))
        if len(hits) and first is None:
            first = begin + int(hits[0])
        seen |= set(read[hits].tolist())
        begin = stop
    return first, len({document for row, document in held if row in seen})
