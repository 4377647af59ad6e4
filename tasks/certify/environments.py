"""Virtual environments of servers: made on demand, kept for the next certification, made again if half made or broken.

    FOLDER/NAME-HASH/            one for each server, named after all that decides it: packages, Python, PyTorch
    FOLDER/NAME-HASH/complete    written last: without it the environment is made from the beginning
    FOLDER/NAME-HASH.lock        held while it is made, so that two certifications make it once

The folder is $ECLECTUS_SERVERS, else eclectus/servers in the user's cache. PyTorch for CPUs of this installation is
linked instead of downloaded, where it is the one that is asked for; whatever else is missing, pip installs.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from eclectus.storage.commands import quoted
from eclectus.tasks.certify.servers import TORCH, Server

FOLDER_VARIABLE = "ECLECTUS_SERVERS"
COMPLETE = "complete"
INSTALL_SECONDS, CHECK_SECONDS = 3600, 600
_LINKED = ("torch", "torch-*.dist-info", "torchgen", "functorch")


class UnavailableError(Exception):
    """A server that cannot be asked: the reason in one line."""


def environments_folder() -> Path:
    """Where the environments are kept."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eclectus" / "servers"


def environment_path(server: Server, folder: Path) -> Path:
    """The folder of a server's environment."""
    decides = [*server.packages, *server.removed, sys.version, sys.executable, str(_torch_to_link(server) or "")]
    digest = hashlib.sha256("\n".join(decides).encode()).hexdigest()[:10]
    return folder / f"{server.name}-{digest}"


def ensure_environment(
    server: Server,
    folder: Path,
    report: Callable[[str], None] = lambda text: None,
    install: Callable[[Server, Path], None] | None = None,
) -> Path:
    """The Python of the server's environment, made if it is not there whole. Raises UnavailableError with the reason.

    install: what fills an environment (server, its folder); by default pip.
    """
    place = environment_path(server, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with place.with_name(f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            python = place / "bin" / "python"
            if not (place / COMPLETE).is_file() or not python.exists() or _broken_links(place):
                report(f"{server.name}: installing {', '.join(server.packages)} in {quoted(place)}")
                shutil.rmtree(place, ignore_errors=True)
                (install or install_packages)(server, place)
                (place / COMPLETE).write_text("\n".join(server.packages) + "\n", encoding="utf-8")
            return python
    except OSError as error:
        raise UnavailableError(f"its environment {quoted(place)} cannot be made: {error.strerror or error}") from error


def forget_environment(server: Server, folder: Path) -> None:
    """Marks a server's environment as broken, so that it is made again."""
    (environment_path(server, folder) / COMPLETE).unlink(missing_ok=True)


def is_importable(server: Server, python: Path) -> bool:
    """Whether the server's environment has all that its import asks for."""
    try:
        _run([str(python), "-I", "-c", f"import {server.module}"], CHECK_SECONDS)
    except UnavailableError:
        return False
    return True


def install_packages(server: Server, place: Path) -> None:
    """Makes a virtual environment and installs the server. Raises UnavailableError with pip's reason."""
    venv.create(place, with_pip=True, clear=True)
    python = place / "bin" / "python"
    if torch := _torch_to_link(server):
        own = next(place.glob("lib/python*/site-packages"))
        for pattern in _LINKED:
            for path in torch.glob(pattern):
                (own / path.name).symlink_to(path)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    _run([*pip, "install", "--quiet", *server.packages], INSTALL_SECONDS)
    if server.removed:
        _run([*pip, "uninstall", "--quiet", "--yes", *server.removed], CHECK_SECONDS)
    _run([str(python), "-I", "-c", f"import {server.module}"], CHECK_SECONDS)


def _run(command: list[str], seconds: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=clean_variables()
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"cannot be installed: nothing came of it within {seconds:g} s") from None
    if done.returncode:
        raise UnavailableError(f"cannot be installed: {last_error(done.stderr or done.stdout)}")


def clean_variables() -> dict[str, str]:
    """This process's variables without those that would lead another Python to this one's packages."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in left_out}


def last_error(text: str) -> str:
    """One line of what a program printed: the last that names an error, else the last that is not empty."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    named = [
        line for line in lines if re.search(r"error|refus|not supported|unsupported|cannot|fail", line, re.IGNORECASE)
    ]
    return " ".join((named or lines or ["it printed nothing"])[-1].split())[:300]


def _torch_to_link(server: Server) -> Path | None:
    """site-packages with this installation's PyTorch, if it is the one that is asked for, built for CPUs."""
    if not server.link_torch:
        return None
    try:
        found = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    version = TORCH.partition("==")[2]
    return Path(str(found.locate_file(""))) if found.version == f"{version}+cpu" else None


def _broken_links(place: Path) -> bool:
    """Whether a linked package is no longer where it was."""
    own = next(place.glob("lib/python*/site-packages"), None)
    return own is None or any(path.is_symlink() and not path.exists() for path in own.iterdir())
