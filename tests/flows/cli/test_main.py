import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from eclectus.flows.cli.main import GROUPS, main
from eclectus.flows.parameters import PARAMETERS
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from tests.support.command_line import run_command

ROOT = Path(__file__).parents[3]
SLOW_IMPORTS = {
    "torch",
    "ray",
    "prefect",
    "sentence_transformers",
    "transformers",
    "pandas",
    "numba",
    "scipy",
    "datasets",
}


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
        (["--pretrain-batch", "7", "--training-workers", "2"], "batch 7 cannot be shared by training_workers 2"),
        (["--extension-top-k", "9"], "extension_top_k 9 is more than extension_experts"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_before_any_work(capsys, tmp_path, source, words, complaint):
    words = words if "--sources" in words else ["--sources", source, *words]
    code, _, output = run_command(capsys, "--home", tmp_path / "home", "run", *words)
    assert code == 2
    assert complaint in output.splitlines()[-1]
    assert not (tmp_path / "home" / "prefect").exists()


def test_an_unknown_setting_in_a_file_is_named_with_the_nearest_one(capsys, tmp_path, source):
    config = tmp_path / "my.yaml"
    config.write_text("neighbours_k: 3\n")
    code, _, output = run_command(capsys, "--home", tmp_path / "home", "run", "--config", config, "--sources", source)
    assert code == 2 and "unknown setting 'neighbours_k'" in output and "did you mean 'neighbors_k'" in output


@pytest.mark.parametrize(
    ("command", "flow"), [("run", "main"), *((name, name) for name in PARAMETERS if name != "main")]
)
def test_help_describes_the_basic_settings_and_help_all_every_setting_by_group(capsys, command, flow):
    model = PARAMETERS[flow]
    helps = {}
    for option in ("--help", "--help-all"):
        code, helps[option], _ = run_command(capsys, command, option)
        assert code == 0
    options = {option: re.findall(r"^  --([a-z-]+) ", text, re.MULTILINE) for option, text in helps.items()}
    basic = [name for name in model.model_fields if model.is_basic(name)]
    assert {name.replace("_", "-") for name in basic} | {"config"} == set(options["--help"]) - {"help-all"}
    assert {name.replace("_", "-") for name in model.model_fields} | {"config"} == set(options["--help-all"]) - {
        "help-all"
    }
    assert len(basic) <= 29
    assert f"{len(model.model_fields) - len(basic)} more settings" in helps["--help"]
    groups = [group for group, names in model.grouped().items() if any(map(model.is_basic, names))]
    assert [
        title for title in re.findall(r"^([a-z -]+):$", helps["--help"], re.MULTILINE) if title != "options"
    ] == groups
    assert all(field.description for field in model.model_fields.values())


def test_every_setting_is_in_one_group_and_every_flow_begins_with_its_input_and_its_own_settings():
    begins = {
        "main": ["sources", "base_model"],
        "curate": ["sources", "original_languages", "expanded_languages"],
        "extend": ["sources", "base_model", "original_languages", "expanded_languages", "extension_method"],
        "retrain": ["sources", "base_model", "original_languages", "expanded_languages", "retrain_documents"],
    }
    for flow, model in PARAMETERS.items():
        names = [name for group in model.grouped().values() for name in group]
        assert sorted(names) == sorted(model.model_fields) and "other" not in model.grouped()
        wanted = begins.get(flow, ["sources"])
        assert names[: len(wanted)] == wanted


def test_an_option_that_help_does_not_show_works(capsys, tmp_path, source):
    code, _, message = run_command(
        capsys, "--home", tmp_path / "home", "run", "--sources", source, "--duplicate-overlap", "lots"
    )
    assert code == 2 and "setting 'duplicate_overlap' in the command line is 'lots'" in message


def test_help_lists_every_command_in_one_of_four_groups(capsys):
    code, output, _ = run_command(capsys, "--help")
    assert code == 0
    titles = [line for line in output.splitlines() if line in ("run:", "models:", "lineage:", "operate:")]
    assert titles == ["run:", "models:", "lineage:", "operate:"]
    listed = [name for names in GROUPS.values() for name in names]
    assert len(listed) == len(set(listed)) == 46
    for name in listed:
        assert re.search(rf"^  {name} +\w", output, re.MULTILINE)
        assert run_command(capsys, name, "--help")[0] == 0


def test_the_version_is_that_of_the_package_and_of_the_image(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run_command(capsys, "--version") == (0, f"eclectus {version}\n", "")
    assert importlib.metadata.version("eclectus") == version
    assert f"image: eclectus:{version}\n" in (ROOT / "docker-compose.yml").read_text()


def test_an_internal_error_is_one_line_that_names_the_file_with_the_traceback(capsys, home, monkeypatch):
    monkeypatch.setattr("eclectus.flows.services.up.down", lambda _: 1 / 0)
    code, _, message = run_command(capsys, "--home", home.root, "down")
    assert code == 1
    log = home.root / "fault.log"
    assert message == f"eclectus: internal error: ZeroDivisionError: division by zero; traceback in {log}\n"
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["sql", "from runs"], ["--version"]])
def test_help_and_sql_import_nothing_that_takes_long(tmp_path, words):
    Home.open(tmp_path / "home")
    program = (
        f"import sys; sys.argv = ['eclectus', '--home', {str(tmp_path / 'home')!r}, *{words}]\n"
        "from eclectus.flows.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({SLOW_IMPORTS} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_home_may_stand_before_or_after_the_command(capsys, home, monkeypatch):
    monkeypatch.delenv("ECLECTUS_HOME", raising=False)
    for words in (
        ["--home", str(home.root), "sql", "select 7 as n"],
        ["sql", "select 7 as n", "--home", str(home.root)],
    ):
        main(words)
        assert "7" in capsys.readouterr().out
        assert os.environ["ECLECTUS_HOME"] == str(home.root)


def test_sql_answers_as_table_and_as_json(capsys, home):
    with Journal(home.journal, "r1") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
    code, output, _ = run_command(capsys, "--home", home.root, "sql", "select run, flow from runs")
    assert code == 0 and "r1" in output and "main" in output
    _, output, _ = run_command(capsys, "--home", home.root, "sql", "--json", "select run, flow from runs")
    assert json.loads(output) == {"run": "r1", "flow": "main"}


def test_why_names_the_steps_of_the_run_when_the_step_is_unknown(capsys, home):
    with Journal(home.journal, "r1") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        journal.event("step_started", step="s", name="group", label="group", flow="main", key="k")
        journal.event(
            "step_ended", step="s", name="group", label="group", flow="main", key="k", state="reused", reason="same"
        )
    assert "reused" in run_command(capsys, "--home", home.root, "why", "last", "group")[1]
    code, _, output = run_command(capsys, "--home", home.root, "why", "r1", "grup")
    assert code == 2 and "its steps are: group" in output
