"""Fixtures of the storage tests."""

import os

import pytest

from eclectus.storage.home import Home


@pytest.fixture(autouse=True)
def _no_syncing(monkeypatch):
    """No test cuts the power, so none waits for the disk; processes that tests start do sync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def read_home(tmp_path_factory):
    """A home for tests that change nothing in it; opening the lineage of a new one takes half a second."""
    return Home.open(tmp_path_factory.mktemp("read") / "home")
