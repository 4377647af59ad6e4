"""Fixtures that all tests share: a home of their own, and a run in it."""

from __future__ import annotations

import pytest

from storage.home import Home
from storage.journal import Journal
from storage.known import KnownKeys
from tasks.run import Run, activate


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path / "home")


@pytest.fixture
def run(home):
    """An active run, without Prefect, as a step sees it."""
    with Journal(home.journal, "test-run") as journal:
        journal.event("run_started", flow="test", parameters={}, packages={})
        opened = Run(id="test-run", home=home, journal=journal, known=KnownKeys(home.keys, home.store), flow="test")
        with activate(opened):
            yield opened
        opened.close_kept(None)
