"""Environments are made once, made again when half made or broken, and named after all that decides them."""

from dataclasses import replace
from pathlib import Path

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.certify.environments import (
    COMPLETE,
    UnavailableError,
    ensure_environment,
    environment_path,
    forget_environment,
    last_error,
)
from eclectus.tasks.certify.servers import SERVERS, Server, chosen_servers

SERVER = Server("little", ("little==1",), "json", "transformers_client", link_torch=False)


def test_an_environment_is_made_once(tmp_path, installer):
    said = []
    first = ensure_environment(SERVER, tmp_path, said.append, installer)
    assert first == ensure_environment(SERVER, tmp_path, said.append, installer) and installer.made == 1
    assert len(said) == 1 and "little==1" in said[0]
    ensure_environment(replace(SERVER, packages=("little==2",)), tmp_path, install=installer)
    assert installer.made == 2


@pytest.mark.parametrize("breakage", ["killed", "forgotten", "python gone", "link gone"])
def test_a_half_made_or_broken_one_is_made_again(tmp_path, installer, breakage):
    python = ensure_environment(SERVER, tmp_path, install=installer)
    place = environment_path(SERVER, tmp_path)
    if breakage == "killed":
        (place / COMPLETE).unlink()
        (place / "left over").touch()
    elif breakage == "forgotten":
        forget_environment(SERVER, tmp_path)
    elif breakage == "python gone":
        python.unlink()
    else:
        (place / "lib" / "python3" / "site-packages" / "torch").symlink_to(tmp_path / "nowhere")
    ensure_environment(SERVER, tmp_path, install=installer)
    assert installer.made == 2 and python.exists() and not (place / "left over").exists()


def test_one_that_cannot_be_installed_says_why_and_is_tried_again(tmp_path, installer):
    def refuse(server, place):
        place.mkdir()
        raise UnavailableError("cannot be installed: no network")

    for _ in range(2):
        with pytest.raises(UnavailableError, match="no network"):
            ensure_environment(SERVER, tmp_path, install=refuse)
    assert ensure_environment(SERVER, tmp_path, install=installer).exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, installer):
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot be made"):
        ensure_environment(SERVER, tmp_path / "file", install=installer)


def test_the_last_line_that_names_an_error_is_the_reason():
    text = "Collecting x\nERROR: No matching distribution found for x==1\n\n[notice] a new release of pip\n"
    assert last_error(text) == "ERROR: No matching distribution found for x==1"
    assert last_error("\x1b[31mValueError: head size 8 is not supported\x1b[0m\nbye\n").startswith("ValueError: head")
    assert last_error("") == "it printed nothing"


def test_servers_are_chosen_by_name_once_and_unknown_ones_are_refused():
    assert [server.name for server in chosen_servers("vllm, llama.cpp,vllm")] == ["vllm", "llama.cpp"]
    assert [server.name for server in chosen_servers(None)] == list(SERVERS)
    with pytest.raises(EclectusError, match="'tgi'; the servers are transformers"):
        chosen_servers("tgi")


def test_every_package_of_a_server_is_pinned():
    packages = [package for server in SERVERS.values() for package in server.packages]
    assert all(package.count("==") == 1 and "*" not in package for package in packages)


def test_servers_that_are_our_own_libraries_have_our_versions():
    pinned = (Path(__file__).parents[3] / "constraints" / "constraints.txt").read_text().lower().split()
    assert set(SERVERS["transformers-5"].packages) <= set(pinned)
