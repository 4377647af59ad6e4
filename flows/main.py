"""Main: the whole job. Pre-trains on the original languages, extends the dense twin to new ones, evaluates, reports."""

from __future__ import annotations

from eclectus.flows.curate import curate
from eclectus.flows.evaluate import Evaluated, check_models, evaluate, evaluate_alone
from eclectus.flows.extend import extend
from eclectus.flows.flow import flow, once
from eclectus.flows.parameters import (
    CurateParameters,
    EvaluateParameters,
    ExtendParameters,
    MainParameters,
    PretrainParameters,
)
from eclectus.flows.pretrain import pretrain
from eclectus.tasks.lookup import check_before_work


@flow
def main(parameters: MainParameters = MainParameters()) -> Evaluated:
    """Curates the sources, pre-trains Lory and its dense twin, extends it to new languages, evaluates, reports."""
    if parameters.evaluate_checkpoints:
        return once(evaluate, EvaluateParameters.of(parameters))
    check_before_work(check_models, parameters)
    if not parameters.base_model and not parameters.dense_start:
        once(curate, CurateParameters.of(parameters))
    for number, each in enumerate(parameters.trainings(), 1):
        if not each.base_model:
            once(pretrain, PretrainParameters.of(each))
        if each.expanded_languages:
            once(extend, ExtendParameters.of(each))
        if number == 1 < parameters.seeds:
            evaluate_alone(each)
    return once(evaluate, EvaluateParameters.of(parameters))
