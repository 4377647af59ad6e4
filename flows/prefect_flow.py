"""How a function of `flows/` becomes a Prefect flow.

Its runs are named after what they do, its parameters are read from the form, and an error of the user is shown as its
sentence: as the message of the run's state and in its log, without a traceback.
"""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import Flow, flow
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Failed

from eclectus.flows.parameters import PARAMETERS, FlowParameters
from eclectus.flows.run_names import run_name
from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrub

R = TypeVar("R")
# Errors whose sentence is in the log of the flow run that they ended.
_shown: weakref.WeakSet[EclectusError] = weakref.WeakSet()
FORM = "the form"
# What the present UI puts into a form as a run's name, as `omicron3-chaltok`, and the other one, as `Rustic-Egret`.
GREEK = re.compile(
    "(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|"
    r"chi|psi|omega)\d*(-[a-z]+)+"
)
PRODUCT = re.compile(
    "(Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|Practical|Ergonomic|"
    r"Handcrafted|Tasty|Handmade|Incredible)-[A-Z][^-]{1,5}"
)


def as_flow(function: Callable[..., R]) -> Flow[..., R]:
    """The Prefect flow of a function that takes `parameters`, a model of `PARAMETERS`; named like the function."""
    name = function.__name__

    @functools.wraps(function)
    def act(parameters: Any = None) -> Any:
        try:
            return function(_read(name, parameters))
        except EclectusError as error:
            if FlowRunContext.get() is None:
                raise
            sentence = scrub(str(error))
            get_run_logger().error(sentence)
            _shown.add(error)
            # Whoever calls this flow gets the error itself, from the state.
            return Failed(message=sentence, data=error)

    _show_sentences()
    # Prefect's own check of parameters would wrap their errors in others.
    return flow(name=name, flow_run_name=lambda: _name_now(name), validate_parameters=False)(act)


def _read(name: str, given: Any) -> FlowParameters:
    """The parameters as a model; a run of a deployment gets what its form was filled in with. Raises EclectusError."""
    model = PARAMETERS[name]
    if isinstance(given, FlowParameters):
        return given
    if not isinstance(given, dict | None):
        raise EclectusError(f"parameters is {given!r}; expected settings by name, as {{'sources': ['data/corpus']}}")
    return model.of_form(given or {}, FORM)


def _name_now(name: str) -> str:
    """The name of the flow run that is starting: that which a user chose for it, or else what it does."""
    context = FlowRunContext.get()
    started = context.flow_run if context else None
    if started and not started.parent_task_run_id and not is_generated(started.name):
        return started.name
    try:
        given = context.parameters if context and context.parameters else {}
        return run_name(name, _read(name, given.get("parameters")))
    except EclectusError:
        return f"{name}: wrong settings"


def is_generated(name: str) -> bool:
    """Whether Prefect made this name: its server from two random words, or one of its two UIs in the form."""
    from coolname.data import config

    if GREEK.fullmatch(name) or PRODUCT.fullmatch(name):
        return True
    lists: Any = config.values()
    words = {word for each in lists for word in each.get("words", ())}
    return "-" in name and words.issuperset(name.split("-"))


class OneSentence(logging.Filter):
    """Turns Prefect's report of an EclectusError in a log, which has a traceback, into the error's sentence.

    If the log has the sentence already, the report is dropped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, EclectusError):
            if error in _shown:
                return False
            record.msg, record.args, record.exc_info = scrub(str(error)), (), None
        return True


def _show_sentences() -> None:
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, OneSentence) for each in logger.filters):
            logger.addFilter(OneSentence())
