import json
import subprocess
import sys

import pytest

from eclectus.flows.cli.main import main
from eclectus.flows.parameters import PARAMETERS
from eclectus.storage.journal import Journal


def run(capsys, *words):
    """(exit code, stdout, stderr) of one command in this process."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text(
        json.dumps({"text": "one document in English, which is long enough to be kept by every filter"}) + "\n"
    )
    return path


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sources", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--neighbour-k", "3"], "unknown option '--neighbour-k'; did you mean '--neighbors-k'?"),
        (["--neighbors-k", "many"], "setting 'neighbors_k' in the command line is 'many'"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml cannot be read"),
        (["--expanded-languages", "en"], "language 'en' is both original and expanded"),
        (["--model-width", "65"], "model_width 65"),
        (["--pretrain-batch", "7"], "pretrain_batch 7 cannot be shared by training_workers 2"),
        (["--extension-top-k", "9"], "extension_top_k 9 is more than extension_experts"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_before_any_work(capsys, tmp_path, source, words, complaint):
    words = words if "--sources" in words else ["--sources", source, *words]
    code, _, said = run(capsys, "--home", tmp_path / "home", "run", *words)
    assert code == 2
    assert complaint in said.splitlines()[-1]
    assert not (tmp_path / "home" / "prefect").exists()


def test_an_unknown_setting_in_a_file_is_named_with_the_nearest_one(capsys, tmp_path, source):
    config = tmp_path / "my.yaml"
    config.write_text("neighbours_k: 3\n")
    code, _, said = run(capsys, "--home", tmp_path / "home", "run", "--config", config, "--sources", source)
    assert code == 2 and "unknown setting 'neighbours_k'" in said and "did you mean 'neighbors_k'" in said


def test_every_setting_of_every_flow_has_a_description_and_an_option(capsys):
    for command, flow in (("run", "main"), ("curate", "curate"), ("extend", "extend")):
        code, said, _ = run(capsys, command, "--help")
        assert code == 0
        for name, field in PARAMETERS[flow].model_fields.items():
            assert field.description, name
            assert f"--{name.replace('_', '-')}" in said


def test_forms_and_help_begin_with_what_every_run_must_be_told_and_go_on_with_the_flows_own(capsys):
    begins = {
        "extend": "base_model original_languages expanded_languages extension_method",
        "main": "base_model",
    }
    begins |= {"curate": "original_languages expanded_languages", "retrain": "base_model original_languages"}
    for flow, names in begins.items():
        fields = PARAMETERS[flow].model_json_schema()["properties"]
        shown = sorted(fields, key=lambda name: fields[name]["position"])
        assert shown[: len(names.split()) + 1] == ["sources", *names.split()]
        assert set(shown) == set(PARAMETERS[flow].model_fields)
    _, said, _ = run(capsys, "extend", "--help")
    places = [
        said.index(f"  --{name} ") for name in ("sources", "extension-method", "training-workers", "pretrain-steps")
    ]
    assert places == sorted(places)


def test_help_and_sql_load_nothing_heavy(tmp_path):
    program = (
        "import sys; sys.argv = ['eclectus', *{words}]\n"
        "from eclectus.flows.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({{'torch', 'ray', 'prefect', 'sentence_transformers'}} & set(sys.modules)), file=sys.stderr)\n"
    )
    for words in (["--help"], ["--home", str(tmp_path / "home"), "sql", "from runs"]):
        done = subprocess.run(
            [sys.executable, "-c", program.format(words=words)], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == "[]"


def test_sql_answers_as_table_and_as_json(capsys, home):
    with Journal(home.journal, "r1") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
    code, said, _ = run(capsys, "--home", home.root, "sql", "select run, flow from runs")
    assert code == 0 and "r1" in said and "main" in said
    _, said, _ = run(capsys, "--home", home.root, "sql", "--json", "select run, flow from runs")
    assert json.loads(said) == {"run": "r1", "flow": "main"}


def test_why_names_the_steps_of_the_run_when_the_step_is_unknown(capsys, home):
    with Journal(home.journal, "r1") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        journal.event("step_started", step="s", name="group", label="group", flow="main", key="k")
        journal.event(
            "step_ended", step="s", name="group", label="group", flow="main", key="k", state="reused", reason="same"
        )
    assert "reused" in run(capsys, "--home", home.root, "why", "last", "group")[1]
    code, _, said = run(capsys, "--home", home.root, "why", "r1", "grup")
    assert code == 2 and "its steps are: group" in said
