"""Flows called as functions: what most tests of flows check needs no Prefect server."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

FLOWS = ("curate", "pretrain", "extend", "evaluate", "retrain", "main")


class Unserved:
    """A flow that is called as a function."""

    def __init__(self, flow: Any) -> None:
        self.name, self.flow = flow.name, flow

    def __call__(self, parameters: Any) -> Any:
        return self.flow.fn(parameters)


def call_as_functions(patch: pytest.MonkeyPatch) -> None:
    """Lets flows call each other as functions, in whichever module they are used."""
    modules = [importlib.import_module(f"eclectus.flows.{name}") for name in FLOWS]
    own = [getattr(module, name) for module, name in zip(modules, FLOWS, strict=True)]
    flows = [each if isinstance(each, Unserved) else Unserved(each) for each in own]
    for module in modules:
        for flow in flows:
            if hasattr(module, flow.name):
                patch.setattr(module, flow.name, flow)
