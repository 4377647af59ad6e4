"""The page that documents the tables says what DuckDB says, and its examples answer."""

import re
from pathlib import Path

import pytest

from eclectus.storage.lineage.connection import connect
from tests.support.history import RUNS, write_history, write_names

PAGE = (Path(__file__).parents[4] / "docs" / "lineage.md").read_text()
SECTIONS = {
    title: body
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    if "| column | type |" in body
}


@pytest.fixture(scope="module")
def lineage(tmp_path_factory):
    from eclectus.storage.home import Home

    home = Home.open(tmp_path_factory.mktemp("lineage") / "home")
    write_history(home)
    write_names(home)
    with connect(home) as connection:
        yield connection


def test_the_page_names_every_table_and_macro():
    names = (
        "runs steps artifacts step_inputs step_outputs settings metrics forecasts documents decisions champions tags "
        "adoptions routing first_losses"
    ).split()
    assert list(SECTIONS) == [*names, "upstream(x)", "downstream(x)", "trace(x)", "difference(a, b)"]


@pytest.mark.parametrize("title", SECTIONS)
def test_columns_and_types_are_those_on_the_page(lineage, title):
    documented = re.findall(r"^\| (\w+) \| ([A-Z][\w(), ]*) \|", SECTIONS[title], re.M)
    source = re.sub(r"\b[xab]\b(?=[,)])", "'nothing'", title)
    found = lineage.execute(f"describe from {source}").fetchall()
    assert [(name, kind) for name, kind, *_ in found] == documented


@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_on_the_page_answers(lineage, title):
    (example,) = re.findall(r"```sql\n(.*?)```", SECTIONS[title], re.S)
    assert lineage.execute(example).fetchall(), example


def test_the_example_in_python_runs(tmp_path, monkeypatch, capsys):
    from eclectus.storage.home import Home

    write_history(Home.open(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "docs/lineage.md", "exec"), {})
    said = capsys.readouterr().out
    assert all(run in said for run in RUNS) and "2.5" not in said and "0.125" in said
