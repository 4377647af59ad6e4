"""What must hold of README and docs: every command and every piece of Python in them works.

Commands that only ask (`sql`, `runs`, `lineage` ...) run against a small history. Commands that train or deploy are
read by the real parser, down to the check of their settings; tests/flows runs them. The slow test runs what works on
checkpoints.
"""

import argparse
import ast
import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

import eclectus.flows.run
from eclectus.flows.cli.main import main
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from tests.support import fasttext_files
from tests.support.chats import chat, chat_tokenizer
from tests.support.history import RUNS, write_history

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FLOWS = ("run", "curate", "pretrain", "extend", "similarity", "evaluate", "retrain")
ASKING = ("sql", "runs", "lineage", "trace", "diff", "why", "bundle", "verify", "keep", "gc", "champions")


class Parsed(BaseException):
    """Ends a command once its words are understood."""


def blocks(page, language):
    """(line, text) of the fenced blocks in a language."""
    text = page.read_text("utf-8")
    for block in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, block.start()) + 2, block[1]


def commands():
    """(page:line, words) of every command in the bash blocks, and of the indented ones, as benchmarks.md has them."""
    for page in PAGES:
        found = list(blocks(page, "bash"))
        if page.name == "benchmarks.md":
            indented = re.findall(r"^    (?:python|eclectus) (?:.*\\\n)*.*", page.read_text("utf-8"), re.MULTILINE)
            found += [(0, text) for text in indented]
        for line, text in found:
            for command in re.sub(r"\\\n\s*", "", text).splitlines():
                if words := shlex.split(command, comments=True):
                    yield pytest.param(words, id=f"{page.relative_to(ROOT)}:{line} {' '.join(words)[:60]}")


def eclectus_commands(wanted):
    for parameter in commands():
        words = parameter.values[0]
        words = words[1:] if "=" in words[0] else words
        if Path(words[0]).name == "eclectus" and wanted(words[1:]):
            yield pytest.param(words[1:], id=parameter.id)


def helps(words):
    return words[-1] in ("--help", "--help-all")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A home with two runs."""
    home = Home.open(tmp_path_factory.mktemp("history") / "home")
    write_history(home)
    return home


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working folder with all that the commands name, and a home that nothing is written to."""
    document = '{"text": "a document that is long enough to be kept by every filter there is", "language": "en"}\n'
    for name in ("my-documents.jsonl", "my-documents/one.jsonl", "data/corpus/en.legal.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(document)
    (tmp_path / "my-task.yaml").write_text("task: my-task\ndataset_path: json\n")
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions/arc_easy.jsonl").write_text("{}\n")
    (tmp_path / "path/to").mkdir(parents=True, exist_ok=True)
    (tmp_path / "path/to/glotlid.bin").write_bytes(fasttext_files.written())
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat("Hello", "Hi"), "language": "en"}))
    chat_tokenizer(tmp_path / "path/to/chat-model")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECLECTUS_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("words", eclectus_commands(helps))
def test_help_is_shown(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("words", eclectus_commands(lambda words: words[0] in ASKING and not helps(words)))
def test_a_command_that_asks_is_answered(words, history, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = query("select min(name) from artifacts where kind = 'checkpoint'", history)[1][0][0]
    first, second = sorted(RUNS)
    known = {"DOCUMENT": "mine", "RUN": second, "RUN_A": first, "RUN_B": second, "STEP": "make checkpoint"}
    known |= {"train lory": "make checkpoint", "checkpoint-1a2b3c4d5e6f": checkpoint, "CHECKPOINT": checkpoint}
    main(["--home", str(history.root), *(known.get(word, word) for word in words)])
    assert capsys.readouterr().out


@pytest.mark.parametrize("words", eclectus_commands(lambda words: words[0] in FLOWS and not helps(words)))
def test_a_flow_gets_to_its_first_step(words, workspace, monkeypatch):
    def stop(*_):
        raise Parsed

    monkeypatch.setattr(eclectus.flows.run, "served_run", stop)
    with pytest.raises(Parsed):
        main(words)


@pytest.mark.parametrize(
    "words", eclectus_commands(lambda words: words[0] not in (*FLOWS, *ASKING) and not helps(words))
)
def test_options_of_other_commands_are_known(words, workspace, monkeypatch):
    read, depth = argparse.ArgumentParser.parse_known_args, itertools.count()

    def parse(self, *arguments, **options):
        outermost = next(depth) == 0
        chosen, unknown = read(self, *arguments, **options)
        if outermost:
            assert not unknown
            raise Parsed
        return chosen, unknown

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        main(words)


def test_commands_named_in_text_exist_with_their_options(capsys):
    """`eclectus COMMAND --option ...` between backticks; capitals stand for anything."""
    named = {}
    for page in PAGES:
        for text in re.findall(r"`eclectus ([a-z][^`]*)`", page.read_text("utf-8")):
            command, *rest = text.replace("\n", " ").split()
            options = {word for word in rest if word.startswith("--")} - {"--help", "--help-all"}
            named.setdefault(command, set()).update(options)
    missing = []
    for command, options in named.items():
        with pytest.raises(SystemExit) as end:
            main([command, "--help-all" if command in FLOWS else "--help"])
        shown = capsys.readouterr().out
        missing += [command] if end.value.code else []
        missing += [f"{command} {option}" for option in options if option not in shown]
    assert named and not missing


def test_every_other_command_names_files_targets_and_options_that_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong = []
    for parameter in commands():
        words = [word for word in parameter.values[0] if not re.match(r"[A-Z_]+=", word)]
        tool = Path(words[0]).name
        if tool == "make":
            wrong += [parameter.id for target in words[1:] if target not in targets and "=" not in target]
        elif tool == "python" and words[1].startswith("benchmarks/"):
            family = words[1].rsplit(".", 1)[0].rsplit("_", 1)[0]
            scripts = [ROOT / words[1], *ROOT.glob(f"{family}*.py")]
            code = "".join(script.read_text() for script in scripts if script.exists())
            options = [word for word in words[2:] if word.startswith("--")]
            wrong += [parameter.id for option in options if f'"{option}"' not in code]
            wrong += [] if (ROOT / words[1]).exists() else [parameter.id]
        elif tool == "sbatch":
            (script,) = [word for word in words if word.endswith(".sbatch")]
            wrong += [] if (ROOT / script).exists() else [parameter.id]
        elif tool not in ("eclectus", "docker", "pip", "cp", "duckdb", "git", "kubectl", "helm", "tensorboard"):
            wrong.append(f"{parameter.id}: no test knows '{tool}'")
        files = [word for word in words if word.startswith(("configs/", "constraints/", "docs/"))]
        wrong += [f"{parameter.id}: {file}" for file in files if not (ROOT / file).exists()]
    assert not wrong


def python_blocks():
    for page in PAGES:
        for line, text in blocks(page, "python"):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("text", python_blocks())
def test_python_is_valid_and_imports_what_exists(text):
    """Without importing: torch and transformers would take longer than all other tests here."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("eclectus."):
            origin = importlib.util.find_spec(node.module).origin
            names = {getattr(each, "name", None) for each in ast.walk(ast.parse(Path(origin).read_text()))}
            assert not {alias.name for alias in node.names} - names
        elif isinstance(node, ast.ImportFrom):
            assert importlib.util.find_spec(node.module)


@pytest.mark.slow
def test_the_usage_page_works_on_real_checkpoints_and_instances(workspace, tmp_path):
    from eclectus.tasks.packing.pack import PackSettings, pack
    from tests.support.dense_bases import dense
    from tests.support.small_world import make_world

    dense(workspace / "path/to/model")
    for parameter in eclectus_commands(lambda words: words[0] in ("upcycle", "export") and "--domain" not in words):
        main(["my-mixture" if word.startswith("checkpoint-") else word for word in parameter.values[0]])
    assert all((workspace / name / "config.json").exists() for name in ("my-mixture", "my-export", "my-base"))

    world = make_world(tmp_path / "world")
    with world.store.draft("instances") as draft:
        pack.function(world.documents, world.tokenizer, PackSettings(instance_tokens=32), draft)
        packed = world.store.commit(draft)
    names = {}
    for _, text in blocks(ROOT / "docs/usage.md", "python"):
        text = text.replace("home/artifacts/checkpoint/...", world.models["lory"].path)
        exec(text.replace("home/artifacts/instances/...", packed.path), names)
    assert names["tokens"].tolist() == names["instances"]["input_ids"]


def test_the_step_of_the_architecture_page_works(run, tmp_path):
    from eclectus.tasks.documents.ingest import IngestSettings, ingest

    (_, text), *_ = blocks(ROOT / "docs/architecture.md", "python")
    names = {}
    exec(text, names)
    source = tmp_path / "documents.jsonl"
    source.write_text('{"text": "one two two"}\n')
    documents = ingest(settings=IngestSettings(sources=[str(source)]))
    made = names["count_words"](documents=documents, settings=names["CountWordsSettings"](count_words_top=1))
    assert made.file("words.tsv").read_text() == "2\ttwo\n"
    assert made.statistics == {"words": 3}


def test_the_figures_are_drawn_from_the_tables_of_the_benchmarks(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks/figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    monkeypatch.setattr("sys.argv", ["figures.py", str(tmp_path)])
    figures.main()
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(drawn) == sorted(path.name for path in (ROOT / "docs/figures").iterdir())
    for name, text in drawn.items():
        labels = re.findall(r"<text[^>]*>([^<]*)</text>", text)
        assert labels == re.findall(r"<text[^>]*>([^<]*)</text>", (ROOT / "docs/figures" / name).read_text())


def test_the_package_has_no_version_but_that_of_pyproject():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()
