"""Fixtures of the storage tests."""

import os
import shutil

import pytest

from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect


@pytest.fixture(autouse=True)
def _no_syncing(monkeypatch):
    """No test cuts the power, so none waits for the disk; processes that tests start do sync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def opened_home(tmp_path_factory):
    """A home whose lineage was opened once, which takes half a second: views are the same in every home."""
    home = Home.open(tmp_path_factory.mktemp("opened") / "home")
    connect(home).close()
    return home


@pytest.fixture
def home(opened_home, tmp_path):
    shutil.copytree(opened_home.root, tmp_path / "home")
    return Home.open(tmp_path / "home")


@pytest.fixture(scope="module")
def read_home(opened_home, tmp_path_factory):
    """A home for tests that change nothing in it."""
    path = tmp_path_factory.mktemp("read") / "home"
    shutil.copytree(opened_home.root, path)
    return Home.open(path)
