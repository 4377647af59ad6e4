"""Main: the whole job. Pre-train on the original languages, extend the dense twin to new ones, evaluate, report."""

from __future__ import annotations

from prefect import flow

from eclectus.flows.curate import curate
from eclectus.flows.evaluate import Evaluated, evaluate
from eclectus.flows.extend import extend
from eclectus.flows.parameters import (
    CurateParameters,
    EvaluateParameters,
    ExtendParameters,
    MainParameters,
    PretrainParameters,
)
from eclectus.flows.pretrain import pretrain
from eclectus.flows.run import once, open_run


@flow(name="main")
def main(parameters: MainParameters = MainParameters()) -> Evaluated:
    """Curates the sources, pre-trains Lory beside its dense twin, extends the twin to new languages, evaluates and reports."""
    parameters.check_together()
    with open_run("main", parameters):
        if not parameters.base_model:
            if not parameters.dense_start:
                once(curate, CurateParameters.of(parameters))
            once(pretrain, PretrainParameters.of(parameters))
        if parameters.expanded_languages:
            once(extend, ExtendParameters.of(parameters))
        return once(evaluate, EvaluateParameters.of(parameters))
