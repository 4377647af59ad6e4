"""What the whole corpus would cost, told from a sample: for a data report of a run with `documents_limit`.

A step's rate is its CPU seconds on the sample, from the lineage; the whole is that rate times all documents, divided by
the CPUs of this cluster where the step works part by part. Steps that read a sample of bounded size (`CONSTANT`) cost
what they cost here. How many documents the whole has: from the bytes of the sources that were read and were not. So
it is as good as the sample is like the rest, and too high for a small one, which pays the imports of libraries.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.ray_cluster import ensure_ray, local_cpus
from eclectus.tasks.report.formatting import count, size
from eclectus.tasks.report.tables import Cell, Table
from eclectus.tasks.run import current_run

CONSTANT = {"train_embedding", "tokenizer"}
LEFT_OUT = {"data_report"}
DRIVER_BYTES = 60
"""Per document, in the driver: arrays of ids, labels and orders."""

_STEPS = """
    select s.name, s.label, coalesce(s.cpu_seconds, s.seconds) as cpu, s.peak_memory, a.bytes
    from (select distinct o.artifact from step_outputs o join steps t using (step) where t.run = $run) mine
    join artifacts a using (artifact) join steps s on s.step = a.made_by
    order by s.started, s.label
"""


def whole_cost(ingested: Artifact) -> Table | None:
    """The estimate as a table; None unless `documents_limit` left documents out, or outside a run."""
    run, whole = current_run(), ingested.statistics.get("expected_documents")
    if run is None or not whole:
        return None
    with connect(run.home, run.writes) as connection:
        steps = connection.execute(_STEPS, {"run": run.id}).fetchall()
    return table_of(steps, ingested.statistics["documents"], whole, cluster_cpus())


def table_of(steps: list[tuple[Any, ...]], sample: int, whole: int, cpus: int) -> Table | None:
    """steps: name, label, CPU seconds, peak memory and bytes of the artifact. sample, whole: documents."""
    rows, total, seconds, stored, peak = [], 0.0, 0.0, 0.0, 0
    for name, label, cpu, memory, stored_here in steps:
        if name in LEFT_OUT or cpu is None:
            continue
        factor = 1.0 if name in CONSTANT else whole / sample
        wall = cpu * factor / (1 if name in CONSTANT else cpus)
        rate = "" if name in CONSTANT else count(sample / max(cpu, 1e-3))
        rows.append([Cell(label), Cell(rate), Cell(hours(cpu * factor)), Cell(hours(wall))])
        rows[-1].append(Cell(size((stored_here or 0) * factor)))
        total, seconds, stored = total + cpu * factor, seconds + wall, stored + (stored_here or 0) * factor
        peak = max(peak, memory or 0)
    if not rows:
        return None
    rows.append([Cell("all"), Cell(""), Cell(hours(total)), Cell(hours(seconds)), Cell(size(stored))])
    note = (
        f"From {count(sample)} documents, for about {count(whole)}, on {cpus} CPUs. Memory: {size(peak)} on the "
        f"sample; a process of the whole holds a few parts, this one {DRIVER_BYTES} bytes per document more "
        f"({size(DRIVER_BYTES * whole)}). Disk counts files once per artifact, though some share them."
    )
    head = ["step", "documents per CPU second", "CPU time", "time", "stored"]
    return Table("What the whole would cost", head, rows, last=True, note=note)


def hours(seconds: float) -> str:
    """A duration in the unit that fits: 90 is '1.5 min'."""
    for factor, unit in ((3600, "h"), (60, "min")):
        if seconds >= factor:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds:.1f} s"


def cluster_cpus() -> int:
    """CPUs that parts can use: of the cluster that is configured, or running, else of this machine."""
    ray = sys.modules.get("ray")
    if os.environ.get("RAY_ADDRESS"):
        ensure_ray()
        ray = sys.modules["ray"]
    if ray is not None and ray.is_initialized():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return local_cpus()
