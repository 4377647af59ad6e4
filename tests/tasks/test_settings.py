"""Every settings class checks what its own settings cannot do together, and a flow's parameters inherit all of it."""

import pytest

from eclectus.flows.parameters import PARAMETERS
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.ingest import IngestSettings
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings
from eclectus.tasks.grouping.encoder import EmbedSettings
from eclectus.tasks.training.extend_settings import REVIEWED, ExtendSettings
from eclectus.tasks.training.pretrain_settings import PretrainSettings
from eclectus.tasks.training.upcycle import UpcycleSettings

EXTENDING = ("main", "extend", "evaluate", "retrain")
PRETRAINING = ("pretrain", *EXTENDING)
CURATING = ("curate", *PRETRAINING)
TWO = {"training_workers": 2}
WRONG = [
    (IngestSettings, PARAMETERS, {"sources": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    (PretrainSettings, PRETRAINING, {"pretrain_batch": 7} | TWO, "pretrain_batch 7 cannot be shared by"),
    (PretrainSettings, PRETRAINING, {"model_width": 70}, "model_width 70, model_heads 4 and"),
    (PretrainSettings, PRETRAINING, {"model_width": 60}, "heads of 15 dimensions"),
    (
        PretrainSettings,
        PRETRAINING,
        {"pretrain_baselines": ["top_k"], "baseline_top_k": 3},
        "baseline_top_k 3 does not divide model_feed_forward 172",
    ),
    (
        PretrainSettings,
        PRETRAINING,
        {"pretrain_baselines": ["document_pools"], "baseline_pool": 3},
        "baseline_pool 3 must be 0 or a multiple of baseline_top_k 2",
    ),
    (
        PretrainSettings,
        PRETRAINING,
        {"pretrain_baselines": ["document_pools"], "baseline_pool": 40},
        "baseline_pool 40 must be .*at most 16",
    ),
    (ExtendSettings, EXTENDING, {"post_pretrain_batch": 5} | TWO, "post_pretrain_batch 5 cannot be shared by"),
    (ExtendSettings, EXTENDING, {"review_batch": 3} | TWO, "review_batch 3 cannot be shared by"),
    (EmbedSettings, CURATING, {"embedding_model": "/nowhere"}, "embedding_model '/nowhere' is no folder"),
    (EmbedSettings, CURATING, {"embedding_model": "tests"}, "embedding_model 'tests' has no modules.json"),
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
# A model is pre-trained, not given.
TRAINED = {"base_model": ""}
EVALUATING = ("main", "evaluate", "retrain")
FLOW_ONLY = [
    *((flow, {"language_budgets": ["sw=5M"]}, "language_budgets names language 'sw'") for flow in CURATING),
    *((flow, {"language_weights": ["fr=2"]}, "language_weights names language 'fr'") for flow in CURATING),
    *((flow, {"instance_tokens": 64} | TRAINED, "lory_segment 64 leaves no second segment") for flow in PRETRAINING),
    *(
        (flow, {"extension_experts_per_layer": [3]} | TRAINED, "has 1 numbers, and model_layers is 4")
        for flow in EXTENDING
    ),
    *((flow, {"extension_expert_budget": 3} | TRAINED, "extension_expert_budget 3 is less than") for flow in EXTENDING),
    *((flow, {"extension_base": "lory", "lory_experts": 1} | TRAINED, "without routers") for flow in EXTENDING),
    ("extend", {"extension_method": "llama_pro", "llama_pro_blocks": 5} | TRAINED, "llama_pro_blocks 5 is more than"),
    *((flow, {"evaluation_tokens": 64}, "evaluation_tokens 64 leaves nothing to score") for flow in EVALUATING),
    *((flow, {"evaluation_tokens": 900} | TRAINED, "more than the positions of the models") for flow in EVALUATING),
    *(
        (flow, {"instance_tokens": 64, "lory_experts": 1} | TRAINED, "instance_tokens 64 leaves nothing to score")
        for flow in EVALUATING
    ),
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
            parameters(flow, needed | (TRAINED if owner is PretrainSettings else {}) | wrong).check_together()


@pytest.mark.parametrize(("flow", "wrong", "message"), FLOW_ONLY)
def test_what_only_a_flow_can_know_is_refused_by_the_flow(flow, wrong, message, needed):
    with pytest.raises(EclectusError, match=message):
        parameters(flow, needed | wrong).check_together()


@pytest.mark.parametrize("flow", ["main", "evaluate"])
def test_a_flow_that_can_do_without_new_languages_does(flow, needed):
    parameters(flow, needed | {"expanded_languages": []}).check_together()


def test_settings_of_what_is_not_trained_do_not_matter(needed):
    odd = {"training_workers": 3, "pretrain_batch": 4, "post_pretrain_batch": 3, "review_batch": 6}
    parameters("extend", needed | odd).check_together()
    parameters("extend", needed | odd | {"extension_method": "lora", "review_batch": 4}).check_together()
    with pytest.raises(EclectusError, match="review_batch 4 cannot"):
        parameters("extend", needed | odd | {"review_batch": 4}).check_together()
    with pytest.raises(EclectusError, match="pretrain_batch 4 cannot"):
        parameters("extend", needed | odd | TRAINED).check_together()
    nothing_trained = {"evaluate_checkpoints": ["here"], "post_pretrain_batch": 4, "review_batch": 4}
    parameters("evaluate", needed | odd | TRAINED | nothing_trained).check_together()
    original_only = {"expanded_languages": [], "pretrain_batch": 6, "post_pretrain_batch": 4}
    parameters("evaluate", needed | odd | TRAINED | original_only).check_together()
    parameters("extend", needed | {"training_workers": 0, "review_batch": 7}).check_together()


def test_the_methods_with_a_review_are_those_of_the_recipes():
    from eclectus.models.extension.methods import RECIPES

    assert set(REVIEWED) == {name for name, recipe in RECIPES.items() if recipe.reviewed}
