"""The trainings that a forecast finds are those that the flow's own steps would make, shape by shape."""

import json
from types import SimpleNamespace

import pytest

from eclectus.flows.flow import flow_named
from eclectus.flows.parameters import PARAMETERS
from eclectus.models.checkpoints.door import read_transformers_config
from eclectus.models.extension.lory import extend_lory
from eclectus.models.extension.methods import method_blueprint, review_blueprint
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.storage.errors import EclectusError
from eclectus.tasks.forecast.shapes import Shape, Shapes, _with_more_experts
from eclectus.tasks.forecast.trainings import calls_of
from tests.support.dense_bases import VOCABULARY, write_base

COMMON = {"sources": ["dataset:not/read"], "original_languages": ["en"], "training_workers": 1}


def jobs(home, flow, **settings):
    """{label: job}."""
    parameters = PARAMETERS[flow].read({**COMMON, **settings}, "the test")
    calls = calls_of(home, flow, lambda: flow_named(flow).whole(parameters))
    shapes = Shapes(calls, ["en", "el"], 512, 0, parameters.instance_tokens)
    return dict(shapes.jobs(gpus=False))


def form(model):
    return {name: (tuple(each.shape), each.requires_grad) for name, each in model.named_parameters()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("shapes") / "llama", "llama")


def test_pre_training_has_a_job_for_every_stage(home):
    every = ["prefix", "expert_choice", "top_k", "document_pools", "dense_equal_flops", "random"]
    found = jobs(home, "pretrain", pretrain_baselines=every, lory_experts=4, pretrain_steps=100, instance_tokens=128)
    labels = ["dense warm-up", "dense", "lory", "prefix", "expert_choice", "top_k", "document_pools",
              "dense_equal_flops", "dense warm-up random", "dense random", "lory random"]  # fmt: skip
    assert [label.removeprefix("train ") for label in found] == labels
    steps = [found[f"train {label}"].steps for label in ("dense warm-up", "dense", "lory", "dense_equal_flops")]
    assert steps == [5, 95, 95, 100]
    dense, lory = found["train dense"].model, found["train lory"].model
    assert type(lory) is LoryForCausalLM and lory.config.num_experts == 4
    assert dense.config.vocab_size == 512 and dense.config.max_position_embeddings == 128


@pytest.mark.parametrize("method", ["moe_lpr", "full", "llama_pro", "moe_all", "one_stage"])
def test_an_extension_trains_what_the_step_would(home, base, tmp_path, method):
    settings = dict(base_model=str(base), expanded_languages=["el"], instance_tokens=64, extension_experts=3)
    found = jobs(home, "extend", extension_method=method, **settings)
    start = base
    if method in ("moe_lpr", "moe_all", "one_stage"):
        upcycle(base, start := tmp_path / "moe", experts=3, top_k=2)
    with method_blueprint(method, start) as blueprint:
        assert form(next(iter(found.values())).model) == form(blueprint.model)
    if method == "moe_lpr":
        with review_blueprint(start) as blueprint:
            assert form(found["train stage 2"].model) == form(blueprint.model)
    if method == "one_stage":
        assert next(iter(found.values())).steps == 300 + 250, "both stages' tokens"


def test_layers_with_different_numbers_of_experts(home, base):
    found = jobs(
        home,
        "extend",
        base_model=str(base),
        expanded_languages=["el"],
        instance_tokens=64,
        extension_experts_per_layer=[2, 5],
    )
    experts = [layer.mlp.experts.num_experts for layer in found["train stage 1"].model.model.layers]
    assert experts == [2, 5]


def test_new_words_have_rows_of_their_own(home, base):
    parameters = PARAMETERS["extend"].read(
        {**COMMON, "base_model": str(base), "expanded_languages": ["el"], "instance_tokens": 64}, "the test"
    )
    calls = calls_of(home, "extend", lambda: flow_named("extend").whole(parameters))
    call = SimpleNamespace(step="extend_vocabulary", arguments={"settings": None, "checkpoint": None})
    shapes = Shapes(calls, ["en", "el"], 512, 7, 64)
    fetched = next(each for each in calls.calls if each.step == "fetch")
    call.arguments["checkpoint"] = fetched.made
    config = shapes._shape(call).config
    assert config.vocab_size == VOCABULARY + 7 and config.vocabulary_before == [VOCABULARY]


def test_a_lory_model_is_extended_to_twice_its_experts(home, base, tmp_path):
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(base)
    lory = LoryForCausalLM.from_dense(dense, num_experts=2, segment_length=16)
    lory.save_pretrained(tmp_path / "lory")
    extend_lory(tmp_path / "lory", tmp_path / "wider")
    found = _with_more_experts(Shape(lory.config), 3).config
    written = json.loads((tmp_path / "wider" / "config.json").read_text())
    assert (found.num_experts, found.original_experts) == (written["num_experts"], written["original_experts"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_an_extended_mixture_gets_more_experts(home, tmp_path, family):
    upcycle(write_base(tmp_path / family, family), tmp_path / "moe", experts=3, top_k=2)
    found = _with_more_experts(Shape(read_transformers_config(tmp_path / "moe")), 2)
    model = Blueprint.of_config(found.config).model
    assert [layer.mlp.experts.num_experts for layer in model.model.layers] == [5, 5] and found.frozen == [3, 3]


def test_an_unknown_base_is_named(home):
    with pytest.raises(EclectusError, match="step 'fetch', which has not run; name a folder as base_model"):
        jobs(home, "extend", base_model="no/such/folder", expanded_languages=["el"])
