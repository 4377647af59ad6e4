"""Fixtures of the storage tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_syncing(monkeypatch):
    """No test cuts the power, so none waits for the disk; processes that tests start do sync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
