"""The page that documents the tables says what DuckDB says, and its examples answer."""

import re
from pathlib import Path

import duckdb
import pytest

from storage.journal import Journal
from storage.lineage import connect

PAGE = (Path(__file__).parents[2] / "docs" / "lineage.md").read_text()
SECTIONS = {
    title: body
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    if "| column | type |" in body
}
RUNS = {"20260101-000000-aaaaaa": 20, "20260102-000000-bbbbbb": 32}


def write_table(home, draft_file, sql):
    duckdb.sql(f"copy ({sql}) to '{draft_file}' (format parquet)")


def write_history(home):
    """Two runs, each documents -> instances -> checkpoint -> evaluation, with settings, metrics, and a decision."""
    for run, k in RUNS.items():
        with Journal(home.journal, run) as journal:
            journal.event("run_started", flow="main", parameters={"seed": 1, "k": k}, packages={"torch": "2"})
            before = {"source.0.books.jsonl": f"file-{k:064x}"}
            for kind in ("documents", "instances", "checkpoint", "evaluation"):
                with home.store.draft(kind) as draft:
                    draft.file("about.txt").write_text(f"{kind} {k}")
                    if kind == "documents":
                        write_table(home, draft.file("documents/0.parquet"), "select 'd1' as document, 'mine' as name")
                    if kind == "instances":
                        write_table(
                            home,
                            draft.file("documents.parquet"),
                            "select 'd1' as document, 'mine' as name, 'en' as language, 'law' as domain, 'books' as source, "
                            "0::bigint as instance, 0::integer as instance_offset, 7::integer as tokens, 0::integer as document_offset",
                        )
                    if kind == "evaluation":
                        write_table(
                            home,
                            draft.file("routing.parquet"),
                            "select 0::integer as layer, 0::integer as expert, 'en' as language, 'law' as domain, "
                            "0.5::double as share, null::double as top_k_share, 3::bigint as routed",
                        )
                    made = home.store.commit(draft)
                about = {"step": f"{run}-{kind}", "name": kind, "label": f"make {kind}", "flow": "main", "key": "k"}
                journal.event("step_started", **about)
                journal.metric(about["step"], "loss", 2.5 / k, 10, {"language": "en"})
                journal.event(
                    "step_ended", **about, version=1, state="completed", reason="first time", seconds=0.5, peak_memory=9, seed=1,
                    settings={"seed": 1, "k": k}, inputs=before,
                    output={"kind": kind, "artifact": made.digest, "rows": 1, "bytes": 9, "created": "2026-01-01T00:00:00Z",
                            "path": made.path, "statistics": {"x": 1}},
                )  # fmt: skip
                before = {kind: f"{kind}-{made.digest}"}
                if kind == "checkpoint":
                    journal.decision(
                        line="lory", verdict="promoted", checkpoint=made.digest, reason="better", evaluations={}, gate=None,
                        rules=[], by="gate",
                    )  # fmt: skip
            journal.event("run_ended", state="completed", seconds=1.0)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    from storage.home import Home

    home = Home.open(tmp_path_factory.mktemp("books") / "home")
    write_history(home)
    with connect(home) as connection:
        yield connection


def test_the_page_names_every_table_and_macro():
    names = (
        "runs steps artifacts step_inputs step_outputs settings metrics documents decisions champions routing".split()
    )
    assert list(SECTIONS) == [*names, "upstream(x)", "downstream(x)", "trace(x)", "difference(a, b)"]


@pytest.mark.parametrize("title", SECTIONS)
def test_columns_and_types_are_those_on_the_page(books, title):
    documented = re.findall(r"^\| (\w+) \| ([A-Z][\w(), ]*) \|", SECTIONS[title], re.M)
    source = re.sub(r"\b[xab]\b(?=[,)])", "'nothing'", title)
    found = books.execute(f"describe from {source}").fetchall()
    assert [(name, kind) for name, kind, *_ in found] == documented


@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_on_the_page_answers(books, title):
    (example,) = re.findall(r"```sql\n(.*?)```", SECTIONS[title], re.S)
    assert books.execute(example).fetchall(), example


def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys):
    from storage.home import Home

    write_history(Home.open(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "docs/lineage.md", "exec"), {})
    said = capsys.readouterr().out
    assert all(run in said for run in RUNS) and "2.5" not in said and "0.125" in said
