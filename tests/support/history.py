"""Small histories: one with everything that lineage answers questions about, and plain chains of steps."""

import duckdb

from eclectus.storage.journal import Journal
from eclectus.storage.lineage.connection import connect
from eclectus.storage.lineage.sql.files import text

RUNS = {"20260101-000000-aaaaaa": 20, "20260102-000000-bbbbbb": 32}


def write_table(home, draft_file, sql):
    duckdb.sql(f"copy ({sql}) to {text(draft_file)} (format parquet)")


def write_history(home, promote=None, document="d1"):
    """Two runs, each documents -> instances -> checkpoint -> evaluation, with settings and metrics.

    promote: the run whose checkpoint becomes champion (default: that of both).
    """
    for run, k in RUNS.items():
        with Journal(home.journal, run, home.mirror) as journal:
            journal.event("run_started", flow="main", parameters={"seed": 1, "k": k}, packages={"torch": "2"})
            before = {"source.0.books.jsonl": f"file-{k:064x}"}
            for kind in ("documents", "instances", "checkpoint", "evaluation"):
                with home.store.draft(kind) as draft:
                    draft.file("about.txt").write_text(f"{kind} {k}")
                    if kind == "documents":
                        write_table(
                            home, draft.file("documents/0.parquet"), f"select '{document}' as document, 'mine' as name"
                        )
                    if kind == "instances":
                        write_table(
                            home,
                            draft.file("documents.parquet"),
                            f"select '{document}' as document, 'mine' as name, 'en' as language, 'law' as domain,"
                            " 'books' as source,"
                            " 0::bigint as instance, 0::integer as instance_offset, 7::integer as tokens,"
                            " 0::integer as document_offset",
                        )
                    if kind == "evaluation":
                        write_table(
                            home,
                            draft.file("routing.parquet"),
                            "select 0::integer as layer, 0::integer as expert, 'en' as language, 'law' as domain, "
                            "0.5::double as share, null::double as top_k_share, 3::bigint as routed",
                        )
                    made = home.store.commit(draft)
                instances = made.digest if kind == "instances" else before.get("instances", "-").partition("-")[2]
                about = {"step": f"{run}-{kind}", "name": kind, "label": f"make {kind}", "flow": "main", "key": "k"}
                journal.event("step_started", **about)
                if kind == "checkpoint":
                    (home.journal / "first_losses").mkdir(exist_ok=True)
                    first = (
                        "'{run}-checkpoint' as step, '{instances}' as instances, 0::bigint as span, 2.5::float as loss"
                    )
                    losses = f"select {first.format(run=run, instances=instances)}"
                    write_table(home, home.journal / f"first_losses/{run}-checkpoint.parquet", losses)
                    said, true = {"seconds": 2.0, "steps": 4, "memory": 90}, {"seconds": 1.0, "steps": 2, "memory": 100}
                    journal.event("forecast", step=about["step"], label=about["label"], forecast=said)
                    journal.event("came_true", step=about["step"], label=about["label"], forecast=true)
                journal.metric(about["step"], "loss", 2.5 / k, 10, {"language": "en"})
                journal.event(
                    "step_ended", **about, version=1, state="completed", reason="first time",
                    seconds=0.5, peak_memory=9,
                    seed=1,
                    settings={"seed": 1, "k": k}, inputs=before,
                    output={"kind": kind, "artifact": made.digest, "rows": 1, "bytes": 9,
                            "created": "2026-01-01T00:00:00Z",
                            "path": made.path, "statistics": {"x": 1}},
                )  # fmt: skip
                before = {kind: f"{kind}-{made.digest}"}
                if kind == "checkpoint" and promote in (None, run):
                    journal.decision(
                        line="lory", verdict="promoted", checkpoint=made.digest, reason="better", evaluations={},
                        gate=None,
                        rules=[], by="gate",
                    )  # fmt: skip
            journal.event("run_ended", state="completed", seconds=1.0)


def write_names(home):
    """A tag and an adoption of the last run's checkpoint."""
    with connect(home) as connection:
        ((made,),) = connection.execute(
            "select artifact from step_outputs where kind = 'checkpoint' order by run desc limit 1"
        ).fetchall()
    about = {"output": {"kind": "checkpoint", "artifact": made}, "by": "ana", "reason": "as good"}
    with Journal(home.journal, "names", home.mirror) as journal:
        journal.event("tagged", name="greek@1", **about)
        journal.event("adopted", name="checkpoint", label="make checkpoint", key="k", **about)


def digest(number):
    return f"{number:064x}"


def write_step(journal, step, output, inputs=(), kind="documents", state="completed", name="work", **settings):
    journal.event("step_started", step=step, name=name, label=f"label {step}", flow="main", key="k")
    journal.event(
        "step_ended", step=step, name=name, label=f"label {step}", flow="main", key="k", version=1, state=state,
        reason="first time", seconds=0.5, settings=settings, inputs={f"in{n}": name for n, name in enumerate(inputs)},
        output={
            "kind": kind, "artifact": output, "rows": 5, "bytes": 9, "created": "2026-11-22T05:10:13Z", "path": "p",
        },
    )  # fmt: skip


def write_chain(home, run, numbers, start="file-" + "ab" * 32):
    """A run whose steps each read what the step before wrote."""
    with Journal(home.journal, run, home.mirror) as journal:
        journal.event("run_started", flow="main", parameters={}, code_version="abc", packages={"torch": "2"})
        before = start
        for number in numbers:
            write_step(journal, f"s{number}", digest(number), [before], k=number)
            journal.metric(f"s{number}", "loss", number)
            before = f"documents-{digest(number)}"
        journal.event("run_ended", state="completed", seconds=1.0)


def everything(home):
    """{table: its rows as sorted texts}."""
    tables = ("runs", "steps", "artifacts", "step_inputs", "step_outputs", "settings", "metrics")
    with connect(home) as connection:
        return {table: sorted(map(str, connection.execute(f"from {table}").fetchall())) for table in tables}
