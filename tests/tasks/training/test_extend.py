"""Every way to extend a model, as steps in this process, on real documents and tiny models."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eclectus.models.checkpoints.tensor_files import read_config
from eclectus.models.extension.methods import RECIPES, frozen_experts
from eclectus.models.losses.objectives import LanguagePrior
from eclectus.models.mixture.export import extract_base
from eclectus.models.mixture.layer_similarity import LEAST_SIMILARITY
from eclectus.models.training.instances import Instances
from eclectus.storage.errors import EclectusError
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.training.add_experts import AddExpertsSettings, add_experts, kind_of
from eclectus.tasks.training.extend import extend
from eclectus.tasks.training.extend_settings import ExtendStageSettings, Method
from eclectus.tasks.training.extend_stage import objective_of
from eclectus.tasks.training.layer_similarity import LayerSimilaritySettings, layer_similarity
from eclectus.tasks.training.upcycle import UpcycleSettings, upcycle
from tests.support.small_world import make_world

STAGE = {
    "post_pretrain_steps": 4,
    "post_pretrain_warmup_steps": 1,
    "post_pretrain_learning_rate": 1e-2,
    "review_steps": 3,
    "review_warmup_steps": 1,
    "original_languages": ["en"],
    "training_workers": 0,
    "weight_decay": 0.3,
    "lora_rank": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def made(world, kind, step, **arguments):
    with world.store.draft(kind) as draft:
        step.function(**arguments, out=draft)
        return world.store.commit(draft)


@pytest.fixture(scope="module")
def instances(world):
    def packed(group):
        settings = PackSettings(instance_tokens=64, pack_group=group)
        return made(world, "instances", pack, documents=world.documents, tokenizer=world.tokenizer, settings=settings)

    return {group: packed(group) for group in ("original", "expanded", "all")}


@pytest.fixture(scope="module")
def upcycled(world):
    settings = UpcycleSettings(extension_experts=3, extension_init="noise", extension_noise_scale=0.5)
    return made(world, "checkpoint", upcycle, checkpoint=world.models["dense"], settings=settings)


def stage(world, start, data, name="post_pretrain", review=None, **changes):
    settings = ExtendStageSettings(extend_stage=name, **{**STAGE, **changes})
    return made(world, "checkpoint", extend, instances=data, checkpoint=start, settings=settings, review=review)


def weights(artifact):
    return AutoModelForCausalLM.from_pretrained(artifact.path).state_dict()


def test_the_methods_of_the_setting_are_those_that_there_are():
    assert get_args(Method) == tuple(RECIPES)


@pytest.mark.parametrize("method", ["full", "lora", "llama_pro", "moe_all", "one_stage"])
def test_every_method_trains_and_gives_a_stock_checkpoint(world, instances, upcycled, method):
    recipe = RECIPES[method]
    start = upcycled if recipe.start == "upcycled" else world.models["dense"]
    review = instances["all"] if recipe.mixed else None
    result = stage(world, start, instances["expanded"], review=review, extension_method=method)
    statistics = result.statistics
    assert statistics["method"] == method and 0 < statistics["parameters_trained"] <= statistics["parameters"]
    assert statistics["steps"] == (7 if method == "one_stage" else 4)
    assert statistics["training_flops"] == statistics["flops_per_step"] * statistics["steps"] > 0
    before, after = weights(start), weights(result)
    assert (set(before) == set(after)) == (method != "llama_pro")
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(before[embeddings], after[embeddings]) == (method not in ("full", "moe_all"))
    assert result.file("tokenizer.json").is_file()
    config = json.loads(result.file("config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    if method == "one_stage":
        extract_base(result.path, world.store.root / "back")
        assert torch.equal(
            load_file(world.store.root / "back" / "model.safetensors")["model.norm.weight"],
            load_file(world.models["dense"].file("model.safetensors"))["model.norm.weight"],
        )


@pytest.mark.parametrize("method", ["moe_lpr", "full", "lora", "llama_pro", "one_stage"])
def test_methods_extend_within_documents_when_asked_and_their_keys_say_so(world, instances, upcycled, method):
    off, on = (
        ExtendStageSettings(extend_stage="review", **STAGE, pack_document_mask=on).key_values() for on in (False, True)
    )
    assert on == off | {"pack_document_mask": True} and "pack_document_mask" not in off
    start = upcycled if RECIPES[method].start == "upcycled" else world.models["dense"]
    mixed = {"review": instances["original"]} if RECIPES[method].mixed else {}
    for name in ("post_pretrain", "review") if RECIPES[method].reviewed else ("post_pretrain",):
        first, second = (
            stage(world, start, instances["all"], name, extension_method=method, pack_document_mask=mask, **mixed)
            for mask in (False, True)
        )
        assert first.digest != second.digest
        start = second


def test_a_stage_is_compiled_when_asked_and_its_key_says_so(world, instances, upcycled, monkeypatch):
    off, on = (
        ExtendStageSettings(extend_stage="review", **STAGE, training_compiled=on).key_values() for on in (False, True)
    )
    assert on == off | {"training_compiled": True}
    compiled = []

    def compile_eagerly(layer):
        compiled.append(layer)
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="eager")

    plain = stage(world, upcycled, instances["expanded"])
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    made = stage(world, upcycled, instances["expanded"], training_compiled=True)
    assert len(compiled) == 2
    before, after = weights(plain), weights(made)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_attention": "flash", "pack_document_mask": True}, "flash takes no mask, which pack_document_mask"),
        ({"training_attention": "flex", "training_workers": 2}, "flex computes on GPUs only; set training_gpus"),
        ({"training_shard_replicas": 2, "training_workers": 4}, "replicas 2 needs training_sharded, and training_work"),
        ({"training_shard_replicas": 2, "training_sharded": True, "training_workers": 2}, "multiple of it and more"),
        ({"training_shard_replicas": 2, "training_sharded": True, "training_workers": 5}, "multiple of it and more"),
        ({"training_workers_min": 3, "training_workers": 2}, "training_workers_min 3 is more than training_workers 2"),
        (
            {"training_workers_min": 2, "training_workers": 4, "training_shard_replicas": 2, "training_sharded": True},
            "training_workers_min changes the number of workers, which training_shard_replicas divides",
        ),
        ({"training_fixed_sums": True, "training_sharded": True}, "whole gradients, of which training_sharded has"),
    ],
)
def test_settings_that_cannot_be_had_are_refused_before_anything_runs(changes, message):
    with pytest.raises(EclectusError, match=message):
        ExtendStageSettings(extend_stage="review", **{**STAGE, **changes}).check_together()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_workers": 3}, "post_pretrain_batch 8 cannot be shared by training_workers 3; make it a multiple"),
        (
            {"training_fixed_sums": True, "training_workers": 3, "post_pretrain_batch": 6},
            "training_fixed_sums needs training_workers 1, 2, 4, 8, ..., not 3; choose one of them",
        ),
        (
            {"training_fixed_sums": True, "training_workers": 4, "micro_batch": 4},
            "as many for each of training_workers 4, which post_pretrain_batch 8 and micro_batch 4 do not give",
        ),
        (
            {"training_fixed_sums": True, "training_workers": 0, "micro_batch": 3},
            "equal micro-batches, .* post_pretrain_batch 8 and micro_batch 3 do not give; choose another micro_batch",
        ),
    ],
)
def test_workers_that_cannot_share_a_batch_are_refused(changes, message):
    settings = ExtendStageSettings(extend_stage="post_pretrain", **{**STAGE, "post_pretrain_batch": 8, **changes})
    with pytest.raises(EclectusError, match=message):
        settings.check_batch("post_pretrain_batch")


def test_sums_in_a_fixed_order_take_the_number_of_workers_out_of_the_key():
    def key(**changes):
        return ExtendStageSettings(extend_stage="review", **{**STAGE, **changes}).key_values()

    fixed = {"training_fixed_sums": True}
    assert key(training_workers=2) != key(training_workers=4)
    assert key(training_workers=2, **fixed) == key(training_workers=4, **fixed) != key(training_workers=2)
    # In this process it computes with all threads.
    assert key(training_workers=0, **fixed) != key(training_workers=1, **fixed)
    assert key(training_workers=4, training_workers_min=2) == key(training_workers=4)


def test_the_method_without_stages_asks_for_the_reviews_data(world, instances, upcycled):
    with pytest.raises(EclectusError, match="one_stage needs the review's instances"):
        stage(world, upcycled, instances["expanded"], extension_method="one_stage")


def test_settings_of_other_methods_and_stages_do_not_touch_the_key():
    def key(name, **changes):
        return ExtendStageSettings(extend_stage=name, **{**STAGE, **changes}).key_values()

    assert key("post_pretrain", lora_rank=4, review_steps=9, llama_pro_blocks=1) == key("post_pretrain")
    assert key("review", balance_weight=1.0) == key("review")
    lora = {"extension_method": "lora"}
    assert key("post_pretrain", lora_rank=4, **lora) != key("post_pretrain", **lora)
    mixed = {"extension_method": "one_stage"}
    assert key("post_pretrain", lpr_weight=9.0, **mixed) != key("post_pretrain", **mixed)


def test_an_extended_model_is_extended_again_with_all_earlier_experts_frozen(world, instances, upcycled):
    assert kind_of(world.models["dense"]) == "dense" and kind_of(upcycled) == "upcycled"
    first = stage(world, stage(world, upcycled, instances["expanded"]), instances["all"], "review")
    assert kind_of(first) == "extended"
    settings = AddExpertsSettings(extension_experts=3, extension_largest_share=1.0)
    wider = made(world, "checkpoint", add_experts, instances=instances["all"], checkpoint=first, settings=settings)
    assert kind_of(wider) == "upcycled" and wider.statistics["experts"] == 5
    # Every method with the prior pulls to all experts that were there before.
    mixed = ExtendStageSettings(**{**STAGE, "extend_stage": "post_pretrain", "extension_method": "one_stage"})
    review = mixed.model_copy(update={"extend_stage": "review", "extension_method": "moe_lpr"})
    for settings in (mixed, review):
        languages, config = Instances(instances["all"].path).languages, read_config(Path(wider.path))
        prior = objective_of(settings, languages, config, frozen_experts(wider.path)).losses[-1]
        assert isinstance(prior, LanguagePrior) and prior.experts == [3, 3]
    learned = stage(world, wider, instances["expanded"])
    second = stage(world, learned, instances["all"], "review")
    before, learned, after = weights(first), weights(learned), weights(second)
    for name, tensor in before.items():
        if name.endswith("gate.weight"):
            assert not torch.equal(after[name], learned[name])
        else:
            old = after[name][:3] if ".experts." in name else after[name]
            assert torch.equal(old, tensor), name
    experts = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(learned[experts][3], learned[experts][4])
    stages = json.loads(second.file("upcycle.json").read_text())["trained"]
    assert [each["stage"] for each in stages] == ["post_pretrain", "review"]


@pytest.mark.parametrize("mask", [False, True])
def test_a_lory_model_goes_through_both_stages_and_its_old_weights_stay(world, instances, mask):
    lory = world.models["lory"]
    wider = made(
        world,
        "checkpoint",
        add_experts,
        instances=instances["original"],
        checkpoint=lory,
        settings=AddExpertsSettings(),
    )
    assert wider.statistics["max_abs_delta"] < 1e-5 and kind_of(wider) == "lory upcycled"
    learned = stage(world, wider, instances["expanded"], pack_document_mask=mask)
    reviewed = stage(world, learned, instances["all"], "review", review_learning_rate=0.05, pack_document_mask=mask)
    assert kind_of(reviewed) == "lory"
    start, one, two = weights(lory), weights(learned), weights(reviewed)
    for name, tensor in start.items():
        assert torch.equal(two[name][: len(tensor)], tensor), name
    experts, router = "model.layers.0.mlp.experts", "model.layers.1.mlp.router.weight"
    assert not torch.equal(one[experts][4:], start[experts]) and torch.equal(one[experts], two[experts])
    assert not torch.equal(one[router][4:], two[router][4:])
    with pytest.raises(EclectusError, match="is a Lory model: choose moe_lpr or no_review"):
        stage(world, wider, instances["expanded"], extension_method="moe_all")


def test_layers_that_part_languages_more_get_more_experts_of_the_budget(world, instances):
    settings = LayerSimilaritySettings(extension_expert_budget=5, similarity_tokens=256)
    dense = world.models["dense"]
    alike = made(world, "report", layer_similarity, documents=world.documents, checkpoint=dense, settings=settings)
    found = alike.statistics
    assert found["known"] == ["en"] and found["new"] == ["el"] and found["tokens"] == {"el": 256, "en": 256}
    assert sum(found["new_experts"]) == 5
    # What is less similar than that counts as that.
    order = sorted(range(2), key=lambda layer: max(found["similarity"][layer], LEAST_SIMILARITY))
    assert found["new_experts"][order[0]] >= found["new_experts"][order[1]]
    moe = made(world, "checkpoint", upcycle, checkpoint=dense, similarity=alike, settings=UpcycleSettings())
    assert list(moe.statistics["experts_per_layer"]) == [new + 1 for new in found["new_experts"]]
    reviewed = stage(world, stage(world, moe, instances["expanded"]), instances["all"], "review")
    assert reviewed.statistics["model"] == "LayeredMixtralForCausalLM"
    assert reviewed.statistics["frozen_sha256"] == moe.statistics["base_digest"]


def test_a_budget_below_one_expert_a_layer_is_refused(world):
    settings = LayerSimilaritySettings(extension_expert_budget=1)
    with pytest.raises(EclectusError, match="less than one for each of 2 layers"):
        made(
            world,
            "report",
            layer_similarity,
            documents=world.documents,
            checkpoint=world.models["dense"],
            settings=settings,
        )


def test_instances_of_another_tokenizer_are_refused(world, instances):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    with world.store.draft("checkpoint") as draft:
        LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).save_pretrained(draft.path)
        small = world.store.commit(draft)
    with pytest.raises(EclectusError, match="pack them with the model's own tokenizer"):
        stage(world, small, instances["expanded"], extension_method="full")
