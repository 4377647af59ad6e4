"""The wheel holds all that is needed to run, and the image is built from files that are there."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("eclectus", "flows", "models", "storage", "tasks")
DATA = ("*.yaml", "*.css", "*.j2", "*.js")


def python(*words, folder, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_has_every_module_and_data_file_and_the_command_runs(tmp_path):
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in re.findall(r'"([\w.]+)"', " ".join(lines_of("pyproject.toml", "readme =", "license-files ="))):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "pyproject.toml", source)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source, folder=tmp_path)
    (wheel,) = wheels.iterdir()
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(source)
        for pattern in ("*.py", *DATA)
        for name in PACKAGES
        for path in (source / name).rglob(pattern)
    }
    named = {"/".join(path.parts if path.parts[0] == "eclectus" else ("eclectus", *path.parts)) for path in expected}
    assert len(named) > 100 and named <= packed, sorted(named - packed)

    python(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel, folder=tmp_path)
    # A user's own modules by the names of our folders change nothing.
    for name in PACKAGES[1:]:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not yours')")
    shown = python("-m", "eclectus", "--help", folder=tmp_path, PYTHONPATH=str(target))
    assert "usage: eclectus" in shown
    where = "import eclectus.models.lory as lory; print(lory.__file__, lory.LoryConfig.model_type)"
    assert python("-c", where, folder=tmp_path, PYTHONPATH=str(target)).split() == [
        str(target / "eclectus" / "models" / "lory" / "__init__.py"),
        "lory",
    ]


def lines_of(file, *starts):
    return [line for line in (ROOT / file).read_text().splitlines() if line.startswith(starts)]


def test_the_image_copies_what_the_build_needs_and_nothing_of_it_is_ignored():
    copied = {name for line in lines_of("Dockerfile", "COPY ") for name in line.split()[1:-1]}
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()]
    for name in copied:
        assert (ROOT / name).exists(), name
        for part in (name, *(str(path.relative_to(ROOT)) for path in (ROOT / name).rglob("*") if path.is_file())):
            hidden = [pattern for pattern in ignored if fnmatch.fnmatch(part.split("/")[0], pattern)]
            assert not hidden, f"{part} is hidden by {hidden}"
    needed = re.findall(r'"([\w.]+)"', " ".join(lines_of("pyproject.toml", "readme =", "license-files =")))
    assert {*PACKAGES, *needed, "pyproject.toml", "constraints", "configs", "prefect.yaml"} <= copied
