"""The layout: one importable name, imports that only run down, no circles, folders small enough to read."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST

ROOT = Path(__file__).resolve().parents[1]
# An import may only lead to a package of a lower rank, or stay in its own.
RANKS = {"flows": 3, "tasks": 2, "models": 1, "storage": 1}
MOST_MODULES = 16
# transformers needs the other two itself.
LORY_MAY_IMPORT = {"torch", "transformers", "safetensors"}
FOREIGN = ("models", "tasks", "flows", "storage")


def module_name(path):
    parts = ("eclectus", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for top in RANKS for path in sorted((ROOT / top).rglob("*.py"))}


def imported(name):
    """Every module of ours that a module imports, at its top or inside its functions."""
    path, found = FILES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in FILES else base)
    return (found & FILES.keys()) - {name}


@pytest.fixture(scope="module")
def imports():
    return {name: imported(name) for name in FILES}


def test_no_import_runs_up_and_models_and_storage_do_not_know_each_other(imports):
    wrong = []
    for name, others in imports.items():
        own = name.split(".")[1]
        wrong += [(name, other) for other in others if (top := other.split(".")[1]) != own and RANKS[top] >= RANKS[own]]
    assert not wrong


def test_there_is_no_circle_between_modules(imports):
    """Removes modules that import nothing of ours until none is left; the rest is in a circle or leads to one."""
    left = {name: set(others) for name, others in imports.items()}
    while free := {name for name, others in left.items() if not others}:
        left = {name: others - free for name, others in left.items() if name not in free}
    # Modules that no other imports only lead to a circle.
    while outer := left.keys() - set().union(*left.values()):
        left = {name: others for name, others in left.items() if name not in outer}
    assert not left


def test_no_folder_holds_more_modules_than_one_reads_at_a_glance():
    counts = {}
    for path in FILES.values():
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert not {str(folder): count for folder, count in counts.items() if count > MOST_MODULES}


def test_the_tests_that_begin_first_exist():
    assert not [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).exists()]


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}
    assert packages | {"eclectus"} == set(settings["packages"])


def test_lory_imports_only_what_a_checkpoint_that_carries_its_code_can_count_on():
    for path in sorted((ROOT / "models/lory").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in {each.stem for each in path.parent.glob("*.py")}, path
                continue
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert roots <= LORY_MAY_IMPORT, f"{path} imports {roots - LORY_MAY_IMPORT}"


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import eclectus.models.lory; print(eclectus.models.lory.LoryForCausalLM.__module__)"],
        ["-m", "eclectus", "--help"],
    ],
    ids=["import lory", "eclectus --help"],
)
def test_eclectus_works_in_a_folder_with_modules_of_the_same_names_as_ours(tmp_path, command):
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of another project was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eclectus" in done.stdout
