"""Every settings class checks what its own settings cannot do together, and a flow's parameters inherit all of it."""

import pytest

from eclectus.flows.parameters import PARAMETERS
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.ingest import IngestSettings
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings
from eclectus.tasks.training.extend import ExtendSettings
from eclectus.tasks.training.pretrain import PretrainSettings
from eclectus.tasks.training.upcycle import UpcycleSettings

EXTENDING = ("main", "extend", "evaluate", "retrain")
WRONG = [
    (IngestSettings, PARAMETERS, {"sources": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    (PretrainSettings, ("pretrain", *EXTENDING), {"pretrain_batch": 7}, "pretrain_batch 7 cannot be shared by"),
    (PretrainSettings, ("pretrain", *EXTENDING), {"model_width": 70}, "model_width 70, model_heads 4 and"),
    (UpcycleSettings, EXTENDING, {"extension_top_k": 9}, "extension_top_k 9 is more than extension_experts 4"),
    (UpcycleSettings, EXTENDING, {"extension_experts_per_layer": [3, 1]}, "extension_experts_per_layer holds 1;"),
    (
        ExtendSettings,
        EXTENDING,
        {"extension_experts_per_layer": [3], "extension_expert_budget": 5},
        "extension_experts_per_layer and extension_expert_budget both say",
    ),
    (
        BenchmarkSettings,
        ("main", "evaluate", "retrain"),
        {"benchmark_tasks": ["no.yaml"]},
        "benchmark_tasks names no.yaml",
    ),
]
FLOW_ONLY = [
    ("similarity", {"base_model": ""}, "base_model is empty; similarity is"),
    ("similarity", {"expanded_languages": []}, "expanded_languages is empty; similarity is"),
    ("extend", {"expanded_languages": []}, "nothing to extend to"),
    ("retrain", {"expanded_languages": []}, "nothing to extend to"),
    ("extend", {"extension_base": "lory", "base_model": "", "extension_method": "lora"}, "lora extends dense models"),
    ("evaluate", {"gate": "no-gate.yaml"}, "gate file no-gate.yaml cannot be read"),
    ("main", {"gate": "no-gate.yaml"}, "gate file no-gate.yaml cannot be read"),
    ("retrain", {"gate": "no-gate.yaml"}, "gate file no-gate.yaml cannot be read"),
]


@pytest.fixture
def needed(tmp_path):
    """Settings with which every flow's parameters are as they should be."""
    source, gate = tmp_path / "a.jsonl", tmp_path / "gate.yaml"
    source.write_text('{"text": "a document"}\n')
    gate.write_text("lines: {extended: {model: stage 2, rules: ['retention.en >= 0.9']}}")
    return {
        "sources": [str(source)],
        "original_languages": ["en"],
        "expanded_languages": ["el"],
        "base_model": "here",
        "gate": str(gate),
    }


def parameters(flow, given):
    model = PARAMETERS[flow]
    return model(**{name: value for name, value in given.items() if name in model.model_fields})


@pytest.mark.parametrize("flow", PARAMETERS)
def test_parameters_that_fit_each_other_pass(flow, needed):
    parameters(flow, needed).check_together()


@pytest.mark.parametrize(("owner", "flows", "wrong", "message"), WRONG)
def test_settings_that_cannot_go_together_are_refused_by_their_owner_and_by_every_flow_with_them(
    owner, flows, wrong, message, needed
):
    with pytest.raises(EclectusError, match=message):
        owner(**wrong).check_together()
    for flow in flows:
        with pytest.raises(EclectusError, match=message):
            parameters(flow, needed | wrong).check_together()


@pytest.mark.parametrize(("flow", "wrong", "message"), FLOW_ONLY)
def test_what_only_a_flow_can_know_is_refused_by_the_flow(flow, wrong, message, needed):
    with pytest.raises(EclectusError, match=message):
        parameters(flow, needed | wrong).check_together()


@pytest.mark.parametrize("flow", ["main", "evaluate"])
def test_a_flow_that_can_do_without_new_languages_does(flow, needed):
    parameters(flow, needed | {"expanded_languages": []}).check_together()
