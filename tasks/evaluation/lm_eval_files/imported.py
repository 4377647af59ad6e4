"""Which results of `lm_eval` were imported for a checkpoint, by lineage, and its evaluations of tasks together."""

from __future__ import annotations

import contextlib
from collections import defaultdict

from eclectus.storage.artifact import Artifact, ArtifactStore
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.run import Run

# The step of import_results.py.
STEP = "import_results"
IMPORTED = "imported"


def read_imports(home: Home, writes: bool = True) -> dict[str, list[str]]:
    """By digest of a checkpoint: digests of the evaluations that were imported for it. writes: as in `connect`."""
    found: dict[str, list[str]] = defaultdict(list)
    if not home.journal.is_dir():
        return found
    with connect(home, writes) as connection:
        rows = connection.execute(
            """
            select distinct i.artifact, o.artifact from steps s join step_inputs i using (step)
            join step_outputs o using (step)
            where s.name = ? and i.kind = 'checkpoint' and s.state in ('completed', 'reused') order by all
            """,
            [STEP],
        ).fetchall()
    for checkpoint, evaluation in rows:
        found[checkpoint].append(evaluation)
    return found


def imported_for(store: ArtifactStore, imports: dict[str, list[str]], checkpoint: Artifact) -> dict[str, Artifact]:
    """The evaluations imported for a checkpoint, latest first by the dates in their files: "imported", "imported 2" ...

    Those that were deleted are left out.
    """
    found = []
    for digest in imports.get(checkpoint.digest, ()):
        with contextlib.suppress(EclectusError):
            found.append(store.find(f"evaluation-{digest}"))
    found.sort(key=lambda each: (-each.statistics[IMPORTED]["date"], each.digest))
    return {IMPORTED if not number else f"{IMPORTED} {number + 1}": each for number, each in enumerate(found)}


def imported_in_run(run: Run, checkpoint: Artifact) -> dict[str, Artifact]:
    """The same in a run, which reads the lineage once."""
    imports = run.once_read("imports", lambda: read_imports(run.home, run.writes))
    return imported_for(run.home.store, imports, checkpoint)


def latest_tasks(home: Home, checkpoint: Artifact) -> list[Artifact]:
    """Evaluations of tasks of a checkpoint: the last that was made here, and those that were imported."""
    if not home.journal.is_dir():
        return []
    with connect(home) as connection:
        rows = connection.execute(
            """
            select o.artifact from steps s join step_inputs i using (step) join step_outputs o using (step)
            where s.name = 'benchmark' and i.artifact = ? and s.state in ('completed', 'reused')
            order by s.ended desc limit 1
            """,
            [checkpoint.digest],
        ).fetchall()
    own = [home.store.find(f"evaluation-{digest}") for (digest,) in rows]
    return [*own, *imported_for(home.store, read_imports(home), checkpoint).values()]
