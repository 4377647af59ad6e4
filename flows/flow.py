"""Flows: plain functions from parameters to results, which Prefect shows where there is something to show.

    @flow
    def curate(parameters: CurateParameters = CurateParameters()) -> Curated: ...

The function is the flow's body. The decorator checks the parameters, opens the run or joins the one of a calling flow,
and looks up all keys first (eclectus.tasks.lookup): a run in which every step is reused calls no Prefect, imports no
PyTorch and starts nothing. Prefect takes 2 s of CPU to import, so the Prefect flow is made when it is first needed;
where Prefect is imported already, as in a worker that loads `flows/main.py:main`, the decorator returns it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from eclectus.flows.run import open_run, serve
from eclectus.storage.artifact import ArtifactStore, is_checkpoint_name
from eclectus.tasks.lookup import reuse_all
from eclectus.tasks.plan import Plan
from eclectus.tasks.run import Outcome, Run, current_run, require_run, undisturbed
from eclectus.tasks.settings import Settings


class Flow:
    """A flow of which no Prefect flow is made yet. whole, fn: the function, without Prefect."""

    def __init__(self, whole: Callable[..., Any]) -> None:
        functools.update_wrapper(self, whole)
        self.whole = self.fn = whole
        self.name = whole.__name__

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.in_prefect(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a Prefect flow has: `serve`, `deploy`, `with_options`."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.in_prefect, name)

    @functools.cached_property
    def in_prefect(self) -> Any:
        return _prefect_flow(self.whole)


def flow(body: Callable[..., Any]) -> Any:
    """Makes a flow of its body, a function of one argument `parameters`."""
    signature = inspect.signature(body)

    @functools.wraps(body)
    def whole(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named)
        given.apply_defaults()
        parameters = given.arguments["parameters"]
        outcome = _outcomes.pop() if _outcomes else Outcome()
        return outcome.of(lambda: _run(body, parameters))

    return _prefect_flow(whole) if "prefect" in sys.modules else Flow(whole)


def flow_named(name: str) -> Any:
    """The flow of this name."""
    return getattr(importlib.import_module(f"eclectus.flows.{name}"), name)


def run_flow(run: Run, flow: Any, parameters: Any) -> Any:
    """Runs a flow in a run that was opened for it: starts what it needs only if a step has to run."""
    finished, result = reuse_all(run, lambda: flow.whole(parameters))
    if finished:
        return result
    serve(run)
    return call_in_run(flow, parameters)


def once(call: Any, parameters: Settings) -> Any:
    """Calls a flow or function with these parameters at most once per run: several flows call what they build on."""
    name = getattr(call, "name", None) or call.__qualname__
    results = require_run(f"flow '{name}'").results
    key = f"{name} {parameters.model_dump_json()}"
    if key not in results:
        results[key] = call_in_run(call, parameters)
    return results[key]


def call_in_run(flow: Any, parameters: Any) -> Any:
    """Calls a flow, or a function, in the active run: in Prefect if the run is shown there, else as a function."""
    run = current_run()
    function = getattr(flow, "whole", None)
    if function is None:
        return flow(parameters)
    if run is None or not run.shown_in_prefect:
        return function(parameters)
    outcome = Outcome()
    _outcomes.append(outcome)
    return undisturbed(lambda: flow(parameters), outcome, lambda: function(parameters))


# Of flows that Prefect was asked to call, and that have not begun.
_outcomes: list[Outcome] = []


def _run(body: Callable[..., Any], parameters: Any) -> Any:
    caller = current_run()
    opens = caller is None
    if caller is None or not isinstance(caller.lookup, Plan):
        # A plan has checked its flow's; those of a flow within it may name what is not made yet.
        parameters.check_together()
    with open_run(body.__name__, parameters) as run:
        parameters = with_places(parameters, run.home.store)
        if opens:
            finished, result = reuse_all(run, lambda: body(parameters))
            if finished:
                return result
        return body(parameters)


def with_places(parameters: Settings, store: ArtifactStore) -> Settings:
    """Parameters with folders in place of artifacts' names and tags, where a model is given to start from."""
    changes = {
        name: store.find_whole(value).path
        for name in ("base_model", "dense_start")
        if is_checkpoint_name(value := getattr(parameters, name, ""))
    }
    return parameters.model_copy(update=changes) if changes else parameters


def _prefect_flow(whole: Callable[..., Any]) -> Any:
    from eclectus.flows.prefect_flow import as_flow

    made = as_flow(whole)
    # Its own `fn` turns errors into states.
    made.whole = whole  # type: ignore[attr-defined]
    return made
