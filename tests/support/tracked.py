"""A history to show in trackers, and what their own files say of it."""

import json
import sqlite3
import struct
from pathlib import Path

import duckdb

from eclectus.storage.journal import Journal

KILLED, RESUMED = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb"
TRAINING = f"{KILLED}-train-lory"
# What the curves must be: the second run resumes from a checkpoint at step 20, and logs step 30 again.
LOSS = [(step, 3 - step / 100) for step in range(10, 61, 10)]


def write_tracked(home):
    """Two runs: a training that dies at step 40, and one that resumes it to step 60, evaluates, and reports."""
    with Journal(home.journal, KILLED) as journal:
        journal.event("run_started", flow="main", parameters={"seed": 1}, code_version="abc", packages={})
        log_training(journal, "first", range(10, 41, 10))
        end(journal, "first", "train lory", "failed")
        journal.event("run_ended", state="failed", seconds=1.0)
    with Journal(home.journal, RESUMED) as journal:
        journal.event("run_started", flow="main", parameters={"seed": 1}, code_version="abc", packages={})
        log_training(journal, "second", range(30, 61, 10))
        end(journal, "second", "train lory", "completed")
        begin(journal, "evaluation", "evaluate lory")
        journal.metric("evaluation", "bits_per_byte", 0.9, None, {"language": "el"})
        journal.metric("evaluation", "routing_entropy", 0.7, None, {"layer": "3"})
        end(journal, "evaluation", "evaluate lory", "completed", write_evaluation(home))
        begin(journal, "report", "report")
        end(journal, "report", "report", "completed", write_report(home))
        journal.event("run_ended", state="completed", seconds=1.0)


def begin(journal, step, label):
    journal.event("step_started", step=step, name=label.split()[0], label=label, flow="main", key=f"key of {label}",
                  settings={"seed": 1})  # fmt: skip


def end(journal, step, label, state, made=None):
    output = made and {
        "kind": made.kind, "artifact": made.digest, "rows": 1, "bytes": 9, "created": "2026-01-01T00:00:00Z",
        "path": made.path, "statistics": {},
    }  # fmt: skip
    journal.event(
        "step_ended", step=step, name=label.split()[0], label=label, flow="main", key=f"key of {label}", version=1,
        state=state, reason="first time", seconds=0.5, settings={"seed": 1}, inputs={}, output=output,
    )  # fmt: skip


def log_training(journal, step, steps):
    begin(journal, step, "train lory")
    for at in steps:
        journal.metric(step, "loss", 3 - at / 100, at)
        journal.metric(step, "loss", 3 - at / 90, at, {"domain": "web"})
        journal.metric(step, "learning_rate", 1e-3, at)


def write_evaluation(home):
    with home.store.draft("evaluation") as draft:
        duckdb.sql(
            "copy (select 'language' as level, 'el' as language, null::varchar as domain, 0.9 as bits_per_byte, "
            f"12.5 as perplexity, 7 as documents, 99 as tokens) to '{draft.file('scores.parquet')}'"
        )
        duckdb.sql(
            "copy (select 3 as layer, expert::integer as expert, language, (expert + 1) / 10 as share, "
            "null::double as top_k_share, 5 as routed from range(2) e(expert), (values ('en'), ('el')) l(language)) "
            f"to '{draft.file('routing.parquet')}'"
        )
        return home.store.commit(draft)


def write_report(home):
    with home.store.draft("report") as draft:
        draft.file("report.html").write_text("<h1>What was gained</h1>")
        draft.file("report.md").write_text("# What was gained")
        table = {"title": "Bits per byte", "rows": [{"language": "el", "lory": "0.900"}]}
        draft.file("tables.json").write_text(json.dumps([table]))
        return home.store.commit(draft)


def tensorboard_curves(folder):
    """{run: {tag: [(step, value)]}}, and {run: texts}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves, texts = {}, {}
    for place in sorted({path.parent for path in Path(folder).rglob("events.out*")}):
        read = EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0})
        read.Reload()
        name = place.relative_to(folder).as_posix().replace("/", "-")
        curves[name] = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
        texts[name] = {tag: b"".join(e.tensor_proto.string_val[0] for e in read.Tensors(tag)).decode()
                       for tag in read.Tags()["tensors"]}  # fmt: skip
    return curves, texts


def mlflow_curves(uri):
    """{run: {metric: [(step, value)]}}, and {run: what MLflow has of it}."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    curves = {
        run.data.tags["eclectus.id"]: {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        for run in runs
    }
    return curves, {run.data.tags["eclectus.id"]: run for run in runs}


def trackio_curves(folder):
    """{run: {metric: [(step, value)]}}, and {run: rows as logged}, of the only project."""
    (file,) = Path(folder).glob("*.db")
    curves, logged = {}, {}
    with sqlite3.connect(file) as connection:
        for run, step, text in connection.execute("select run_name, step, metrics from metrics order by id"):
            values = json.loads(text)
            logged.setdefault(run, []).append(values)
            for name, value in values.items():
                curves.setdefault(run, {}).setdefault(name, []).append((step, value))
    return curves, logged


def wandb_curves(folder):
    """{run: {metric: [(step, value)]}}, and {run: its records}, of W&B's offline files."""
    curves, found = {}, {}
    for file in sorted(Path(folder).rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
        name = file.stem.removeprefix("run-")
        for record in wandb_records(file):
            found.setdefault(name, []).append(record)
            if record.WhichOneof("record_type") != "history":
                continue
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            step = record.history.step.num
            for key, value in values.items():
                curves.setdefault(name, {}).setdefault(key, []).append((step, value))
    return curves, found


def wandb_records(file):
    """W&B's own records of a run's file, which is a log in LevelDB's format behind seven bytes of W&B's."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts, at = parts + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
