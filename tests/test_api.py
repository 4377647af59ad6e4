"""`import eclectus`: flows as functions, their results as objects, errors as one sentence."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eclectus
from eclectus.api import _scores
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from tests.support.history import write_step
from tests.support.made_up_steps import settings_of, write_inputs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLECTUS_HOME", str(tmp_path / "home"))
    return write_inputs(tmp_path)


def test_a_flow_is_a_function_and_its_result_names_models_states_and_run(world, steps, capsys):
    given = settings_of(world, "extend", {"base_model": "BASE"})
    made = eclectus.extend(**given)
    assert set(made.states.values()) == {"completed"} and "upcycle" in steps
    assert list(made.models) == ["base", "upcycled", "stage 1", "stage 2"]
    assert all((path / "config.json").exists() for path in made.models.values())
    assert list(eclectus.sql("select state from runs where run = ?", [made.run])) == [{"state": "completed"}]
    assert "+ upcycle" in capsys.readouterr().out
    again = eclectus.extend(**given, show=False)
    assert set(again.states.values()) == {"reused"} and again.models == made.models
    assert capsys.readouterr().out == ""


def test_scores_are_rows_and_a_data_frame(world, steps):
    made = eclectus.evaluate(**settings_of(world, "evaluate", {"gate": ""}), show=False)
    frame = made.df()
    assert list(frame.columns) == ["model", "kind", "name", "measure", "value"]
    text = frame[(frame.model == "stage 2") & (frame.kind == "language")]
    assert text.name.tolist() == ["en"] and text.value.tolist() == [1.25]
    assert made.report.name == "report.html"
    similar = eclectus.similarity(**settings_of(world, "similarity", {"base_model": "BASE"}), show=False)
    assert list(similar.rows()) == [
        {"layer": 0, "similarity": 0.5, "new_experts": 1}, {"layer": 1, "similarity": 0.25, "new_experts": 2}
    ]  # fmt: skip


def test_answers_to_tasks_are_scores_too():
    answers = SimpleNamespace(statistics={"scores": {"arc_easy acc": 0.5, "page_choice_el acc_norm": 0.25}})
    assert list(_scores(SimpleNamespace(benchmarks={"dense": answers}))) == [
        {"model": "dense", "kind": "task", "name": "arc_easy", "measure": "acc", "value": 0.5},
        {"model": "dense", "kind": "task", "name": "page_choice_el", "measure": "acc_norm", "value": 0.25},
    ]


def test_results_that_were_imported_for_a_model_are_read_by_the_gate_and_the_report(world, steps):
    given = settings_of(world, "evaluate", {})
    first, home = eclectus.evaluate(**given, show=False), Home.existing()
    checkpoint = home.store.find(str(first.models["stage 2"]))
    with home.store.draft("evaluation") as draft:
        draft.file("content").write_text("imported")
        draft.statistics = {"scores": {"arc_easy acc": 0.5}, "imported": {"date": 1.0}}
        made = home.store.commit(draft)
    with Journal(home.journal, "an-import") as journal:
        inputs = [f"checkpoint-{checkpoint.digest}"]
        write_step(journal, "s1", made.digest, inputs, kind="evaluation", name="import_results")
    again = eclectus.evaluate(**given, show=False)
    assert [label for label, state in again.states.items() if state == "completed"] == ["gate extended", "report"]
    names = eclectus.sql("select name from step_inputs where artifact = ? and run = ?", [made.digest, again.run])
    assert sorted(row["name"] for row in names) == ["candidate.imported", "imported.stage 2.imported"]
    assert [row["value"] for row in again.rows() if row["kind"] == "task"] == [0.5]
    assert set(eclectus.evaluate(**given, show=False).states.values()) == {"reused"}


def test_a_model_goes_on_by_its_tag(world, steps):
    made = eclectus.extend(**settings_of(world, "extend", {"base_model": "BASE"}), show=False)
    home = Home.existing()
    with home.store.draft("checkpoint") as draft:
        (draft.path / "config.json").write_text((world / "base/config.json").read_text())
        for path in (world / "base").iterdir():
            draft.file(path.name).write_bytes(path.read_bytes())
        base = home.store.commit(draft)
    assert eclectus.tag(made.models["stage 2"], "greek") == "greek@1"
    assert eclectus.tag(base, "base") == "base@1"
    settings = settings_of(world, "evaluate", {"gate": ""})
    assert set(eclectus.evaluate("base@latest", **settings, show=False).df().model) == {"base@latest"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"instance_token": 64}, "unknown setting 'instance_token' in the arguments of curate; did you mean"),
        ({"instance_tokens": "many"}, "setting 'instance_tokens' in the arguments of curate is 'many'"),
        ({"config": "nowhere.yaml"}, "config file nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_argument_is_one_sentence(world, arguments, message):
    with pytest.raises(EclectusError, match=message):
        eclectus.curate(sources=world / "documents.jsonl", **arguments)
    assert not (world / "home").exists()


def test_a_path_a_text_and_a_list_are_sources(world, steps, tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("original_languages: [en]\nexpanded_languages: [tr]\nbase_model: unused by curate\n")
    runs = [
        eclectus.curate(config, sources=each, show=False)
        for each in (world / "documents.jsonl", str(world / "documents.jsonl"), [world / "documents.jsonl"])
    ]
    assert len({json.dumps(each.value.original.digest) for each in runs}) == 1
    with pytest.raises(EclectusError, match=r"the query failed: .*no_such_table"):
        eclectus.sql("from no_such_table")
    with pytest.raises(EclectusError, match="the query '-- runs' asks for nothing"):
        eclectus.sql("-- runs")


def test_importing_it_costs_nothing():
    code = "import sys, eclectus; eclectus.__version__; print(len({'torch', 'duckdb', 'prefect'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "0\n"
    with pytest.raises(AttributeError, match="has no attribute 'extent'"):
        eclectus.extent  # noqa: B018
    assert {"extend", "evaluate", "sql"} <= set(dir(eclectus))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[each.stem for each in NOTEBOOKS])
def test_every_cell_of_a_notebook_runs(notebook, tmp_path, monkeypatch):
    from eclectus.tasks.corpus import CorpusSettings, write_corpus

    write_corpus(tmp_path / "data/corpus", CorpusSettings())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ECLECTUS_HOME", raising=False)
    names = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
            assert not cell["outputs"], "outputs are not kept: they would be out of date"
    assert not names["scores"].df().empty


def test_cells_of_notebooks_import_what_exists():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                compile("".join(cell["source"]), notebook.name, "exec")
    assert importlib.util.find_spec("eclectus.api")
