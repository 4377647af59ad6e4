"""Pre-training and extension as steps, in this process, on real documents and tiny models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eclectus.models.lory.config import PRESETS
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.training.extend import extend
from eclectus.tasks.training.extend_settings import ExtendStageSettings
from eclectus.tasks.training.pretrain import pretrain
from eclectus.tasks.training.pretrain_settings import PretrainSettings, PretrainStageSettings
from eclectus.tasks.training.run_training import WorkerSettings, run_training
from eclectus.tasks.training.upcycle import UpcycleSettings, upcycle
from tests.support.displays import NullDisplay
from tests.support.small_world import make_world
from tests.support.worker_jobs import find_damage, foretell, measure_parts, total

SMALL = {
    "model_width": 32,
    "model_layers": 2,
    "model_heads": 2,
    "model_key_value_heads": 2,
    "model_feed_forward": 48,
    "lory_experts": 4,
    "lory_segment": 16,
    "pretrain_steps": 8,
    "pretrain_warmup_steps": 2,
    "dense_warmup": 0.25,
    "lory_rewarm_steps": 2,
    "training_workers": 0,
    "checkpoint_every": 3,
}
EXTEND = {
    "post_pretrain_steps": 4,
    "post_pretrain_warmup_steps": 1,
    "review_steps": 4,
    "review_warmup_steps": 1,
    "original_languages": ["en"],
    "training_workers": 0,
    "weight_decay": 0.3,
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


def stage(world, instances, name, start=None, **changes):
    settings = PretrainStageSettings(pretrain_stage=name, **{**SMALL, **changes})
    return made(
        world,
        "checkpoint",
        pretrain,
        instances=instances["original"],
        tokenizer=world.tokenizer,
        settings=settings,
        start=start,
    )


@pytest.fixture(scope="module")
def pretrained(world, instances):
    warm = stage(world, instances, "warmup")
    return {"warmup": warm} | {name: stage(world, instances, name, warm) for name in ("dense", "lory")}


def test_dense_and_lory_go_on_from_the_same_warm_up_for_the_same_steps(pretrained):
    assert pretrained["warmup"].statistics["steps"] == 2
    assert pretrained["dense"].statistics["steps"] == pretrained["lory"].statistics["steps"] == 8
    assert pretrained["dense"].statistics["tokens"] == pretrained["lory"].statistics["tokens"]
    moments = load_file(pretrained["warmup"].file("moments.safetensors"))
    assert {float(value) for name, value in moments.items() if name.endswith(".step")} == {2.0}


def test_the_experts_of_a_trained_lory_model_have_parted(pretrained):
    experts = AutoModelForCausalLM.from_pretrained(pretrained["lory"].path).model.layers[0].mlp.experts
    assert (experts[0] - experts[1]).abs().max() > 1e-4


def test_training_again_with_a_forecast_gives_the_same_bytes(world, instances, pretrained):
    again = stage(world, instances, "lory", pretrained["warmup"], training_forecast="always")
    assert again.digest == pretrained["lory"].digest


def test_a_setting_of_lory_does_not_touch_the_dense_stages_key():
    def key(name, **changes):
        return PretrainStageSettings(pretrain_stage=name, **{**SMALL, **changes}).key_values()

    assert key("dense", lory_experts=2) == key("dense")
    assert key("lory", lory_experts=2) != key("lory")
    assert key("dense", checkpoint_every=5) == key("dense")


@pytest.mark.parametrize("name", ["dense", "lory", "expert_choice", "top_k", "document_pools"])
def test_every_stage_trains_within_documents_when_asked_and_its_key_says_so(world, instances, pretrained, name):
    def settings(**changes):
        return PretrainStageSettings(pretrain_stage=name, **{**SMALL, **changes})

    assert settings(pack_document_mask=False).key_values() == settings().key_values()
    assert settings(pack_document_mask=True).key_values() == settings().key_values() | {"pack_document_mask": True}
    apart = stage(world, instances, name, pretrained["warmup"], pack_document_mask=True)
    assert apart.digest != stage(world, instances, name, pretrained["warmup"]).digest
    assert AutoModelForCausalLM.from_pretrained(apart.path)(torch.ones(1, 8, dtype=torch.int64)).logits.isfinite().all()


def test_which_baselines_there_are_touches_no_stages_key():
    def key(name, **changes):
        return PretrainStageSettings(pretrain_stage=name, **{**SMALL, **changes}).key_values()

    for name in ("dense", "lory"):
        assert key(name, pretrain_baselines=["prefix"], baseline_top_k=3) == key(name)
    assert key("top_k", baseline_top_k=3) != key("top_k")
    assert key("document_pools", baseline_pool=4) != key("document_pools")
    assert key("top_k", baseline_pool=4) == key("top_k")
    assert key("lory", dense_start="here") == key("lory", dense_start="there") != key("lory")


@pytest.mark.parametrize(
    ("name", "changes", "model"),
    [
        ("lory", {"lory_routing": "prefix"}, "LoryForCausalLM"),
        ("expert_choice", {}, "ExpertChoiceForCausalLM"),
        ("top_k", {}, "MixtralForCausalLM"),
        ("top_k", {"baseline_top_k": 3}, "MixtralForCausalLM"),
        ("document_pools", {}, "DocumentPoolForCausalLM"),
        ("document_pools", {"baseline_pool": 4}, "DocumentPoolForCausalLM"),
    ],
)
def test_every_baseline_trains_from_the_same_warm_up_at_equal_active_size_and_can_be_scored(
    world, instances, pretrained, name, changes, model
):
    made = stage(world, instances, name, pretrained["warmup"], **changes)
    assert made.statistics["model"] == model
    assert made.statistics["tokens"] == pretrained["dense"].statistics["tokens"]
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    ffns = sum(p.numel() for n, p in loaded.named_parameters() if ".mlp.experts" in n)
    assert ffns == 4 * sum(p.numel() for n, p in weights(pretrained["dense"]).items() if ".mlp." in n)
    ids = torch.arange(2, 50)[None]
    before, edited = loaded(ids).logits, ids.clone()
    edited[0, 40] += 1
    moved = (loaded(edited).logits - before).abs().amax(dim=(0, 2))
    assert moved[:32].max() < 1e-6 < 1e-4 < moved[40], "no later token is looked at, but for Lory's own segment"


def test_the_control_of_equal_flops_trains_from_scratch_on_the_same_data(world, instances, pretrained):
    control = stage(world, instances, "dense_equal_flops")
    dense, lory = pretrained["dense"].statistics, pretrained["lory"].statistics
    assert control.statistics["model"] == "LlamaForCausalLM"
    assert control.statistics["steps"] == lory["steps"] and control.statistics["tokens"] == lory["tokens"]
    assert lory["flops_per_step"] > dense["flops_per_step"]
    assert 1 <= control.statistics["flops_per_step"] / lory["flops_per_step"] < 1.05
    width = AutoModelForCausalLM.from_pretrained(control.path).config.intermediate_size
    assert width > SMALL["model_feed_forward"] and width % 8 == 0
    with pytest.raises(EclectusError, match="starts from nothing"):
        stage(world, instances, "dense_equal_flops", pretrained["warmup"])


def test_the_controls_key_holds_what_decides_lorys_flops_and_nothing_else_of_lory():
    def key(**changes):
        return PretrainStageSettings(pretrain_stage="dense_equal_flops", **{**SMALL, **changes}).key_values()

    for changes in ({"lory_experts": 2}, {"lory_segment": 32}, {"lory_routing": "prefix"}):
        assert key(**changes) != key()
    for changes in ({"lory_router_init": 0.3}, {"lory_rewarm_steps": 1}, {"lory_moments": "reset"}):
        assert key(**changes) == key()


def test_the_control_of_equal_flops_is_refused_next_to_models_that_start_trained():
    settings = PretrainSettings(**SMALL, dense_start="a/model", pretrain_baselines=["dense_equal_flops"])
    with pytest.raises(EclectusError, match="leave out one of the two"):
        settings.check_together()


def test_every_pretrained_checkpoint_says_what_it_cost(pretrained):
    for name, each in pretrained.items():
        about = each.statistics
        assert about["cpu_seconds"] > 0 and about["training_seconds"] > 0
        assert 0 < about["attention_flops_per_step"] < about["flops_per_step"]
        # The warm-up's two steps are part of every model that starts from it.
        before, own = (0, 2) if name == "warmup" else (2, 6)
        warm_up = pretrained["warmup"].statistics["flops_per_step"]
        assert about["training_flops"] == before * warm_up + own * about["flops_per_step"]
    dense, lory = pretrained["dense"].statistics, pretrained["lory"].statistics
    assert dense["active_parameters"] == dense["parameters"] < lory["active_parameters"] < lory["parameters"]


def test_a_segment_as_long_as_an_instance_is_refused_where_something_is_routed(world, instances, pretrained):
    with pytest.raises(EclectusError, match="lory_segment 64 leaves no second segment in instances of 64 tokens"):
        stage(world, instances, "lory", pretrained["warmup"], lory_segment=64)
    assert stage(world, instances, "lory", pretrained["warmup"], lory_segment=63).statistics["steps"] == 8


def test_dense_routing_is_the_dense_twin(world, instances, pretrained):
    made = stage(world, instances, "lory", pretrained["warmup"], lory_routing="dense", lory_rewarm_steps=0)
    assert not made.file("routing_weights.json").exists()
    model, twin = (AutoModelForCausalLM.from_pretrained(each.path) for each in (made, pretrained["dense"]))
    ids = torch.arange(2, 50)[None]
    assert (model(ids).logits - twin(ids).logits).abs().max() <= 1e-4


def test_one_expert_trains_like_any_other_number(world, instances, pretrained):
    assert stage(world, instances, "lory", pretrained["warmup"], lory_experts=1).statistics["steps"] == 8


def test_a_lory_checkpoint_says_how_each_domain_and_language_is_routed(pretrained):
    profiles = json.loads(pretrained["lory"].file("routing_weights.json").read_text())
    assert profiles.keys() == {"domain", "language"}
    assert profiles["domain"].keys() == {"code", "docs"} and profiles["language"].keys() == {"en"}
    for each in (*profiles["domain"].values(), *profiles["language"].values()):
        shares = torch.tensor(each)
        assert shares.shape == (2, 4)
        torch.testing.assert_close(shares.sum(-1), torch.ones(2))


def test_a_dense_checkpoint_can_replace_the_warm_up(world, instances, pretrained):
    twin = stage(world, instances, "dense", pretrained["dense"], dense_start="given")
    lory = stage(world, instances, "lory", pretrained["dense"], dense_start="given", model_width=9999)
    assert twin.statistics["steps"] == lory.statistics["steps"] == 8
    assert twin.digest != pretrained["dense"].digest
    untrained = stage(
        world,
        instances,
        "lory",
        pretrained["dense"],
        dense_start="given",
        pretrain_learning_rate=1e-30,
        weight_decay=0.0,
    )
    ids = torch.arange(2, 50)[None]
    dense, mixture = (AutoModelForCausalLM.from_pretrained(each.path) for each in (pretrained["dense"], untrained))
    assert (dense(ids).logits - mixture(ids).logits).abs().max() <= 1e-5


def test_a_dense_start_of_another_kind_or_with_too_few_positions_is_refused(world, instances, pretrained):
    with pytest.raises(EclectusError, match=r"dense_start .* is a mixtral.*LLaMA-shaped"):
        stage(world, instances, "lory", world.models["stage 2"], dense_start="given")
    short = edited_config(world, pretrained["dense"], max_position_embeddings=32)
    with pytest.raises(EclectusError, match="instance_tokens 64 is more than the 32 positions of"):
        stage(world, instances, "lory", short, dense_start="given")


def edited_config(world, checkpoint, **changes):
    with world.store.draft("checkpoint") as draft:
        shutil.copytree(checkpoint.path, draft.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest*"))
        config = draft.file("config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        return world.store.commit(draft)


def test_a_named_shape_wins_over_the_other_model_settings(world, instances):
    made = stage(world, instances, "warmup", model_preset="laptop", pretrain_steps=2, dense_warmup=0.5)
    config = json.loads(made.file("config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["tie_word_embeddings"]) == (64, 4, True)
    offered = PretrainStageSettings.model_fields["model_preset"].annotation.__args__
    assert set(offered) == {"custom", *PRESETS}


def test_a_stage_without_its_start_is_refused(world, instances):
    with pytest.raises(EclectusError, match="stage 'lory'"):
        stage(world, instances, "lory")


def test_a_loss_that_is_not_finite_names_step_and_instances(world, instances):
    with pytest.raises(EclectusError, match=r"not finite at training step \d+ \(instances \["):
        stage(
            world,
            instances,
            "warmup",
            pretrain_learning_rate=1e9,
            pretrain_steps=400,
            dense_warmup=0.9,
            gradient_clip=1e9,
        )


@pytest.fixture(scope="module", params=["auto", "bfloat16"])
def extended(world, instances, pretrained, request):
    base = made(
        world, "checkpoint", upcycle, checkpoint=pretrained["dense"], settings=UpcycleSettings(extension_experts=3)
    )

    def trained(name, start, which):
        settings = ExtendStageSettings(extend_stage=name, training_precision=request.param, **EXTEND)
        return made(world, "checkpoint", extend, instances=instances[which], checkpoint=start, settings=settings)

    learned = trained("post_pretrain", base, "expanded")
    return {"upcycled": base, "stage 1": learned, "stage 2": trained("review", learned, "all")}


def weights(artifact):
    return AutoModelForCausalLM.from_pretrained(artifact.path).state_dict()


def changed(before, after):
    """What of the weights differs: names, and of experts the numbers."""
    names = set()
    for name, tensor in before.items():
        if ".experts." in name:
            names |= {
                ("expert", number)
                for number in range(len(tensor))
                if not torch.equal(tensor[number], after[name][number])
            }
        elif not torch.equal(tensor, after[name]):
            names.add("router" if name.endswith("gate.weight") else name)
    return names


def test_stage_1_changes_new_experts_and_routers_only(extended):
    assert changed(weights(extended["upcycled"]), weights(extended["stage 1"])) == {
        ("expert", 1),
        ("expert", 2),
        "router",
    }


def test_stage_2_changes_routers_only(extended):
    assert changed(weights(extended["stage 1"]), weights(extended["stage 2"])) == {"router"}


def test_the_dense_original_is_still_inside_bit_by_bit(extended, pretrained):
    dense, moe = weights(pretrained["dense"]), weights(extended["stage 2"])
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        gate_up = torch.cat([dense[f"{prefix}.gate_proj.weight"], dense[f"{prefix}.up_proj.weight"]])
        assert torch.equal(moe[f"{prefix}.experts.gate_up_proj"][0], gate_up)
        assert torch.equal(moe[f"{prefix}.experts.down_proj"][0], dense[f"{prefix}.down_proj.weight"])
    assert all(torch.equal(tensor, moe[name]) for name, tensor in dense.items() if ".mlp." not in name)


def test_the_hash_of_the_original_weights_never_changes(extended):
    proof = json.loads(extended["upcycled"].file("upcycle.json").read_text())
    frozen = {extended[name].statistics["frozen_sha256"] for name in ("stage 1", "stage 2")}
    assert frozen == {proof["base_digest"]}


def test_a_damaged_checkpoint_is_recorded_and_shown(run):
    display = NullDisplay()
    run.displays.append(display)
    run.step = "s1"
    run_training(WorkerSettings(training_workers=0), find_damage, {}, "training")
    assert display.texts == ["latest is damaged; training begins again at step 0"]
    assert query("select step, name, value, at_step from metrics", run.home)[1] == [
        ("s1", "damaged_checkpoints", 1.0, 0)
    ]


def test_metrics_are_journaled_with_their_domain_or_layer(run):
    run.step = "s1"
    run_training(WorkerSettings(training_workers=0), measure_parts, {}, "training")
    sql = "select name, value, at_step, tags from metrics order by value"
    assert query(sql, run.home)[1] == [
        ("loss", 1.0, 5, {}), ("loss", 2.0, 5, {"domain": "a/b@c"}), ("expert_load", 3.0, 5, {"layer": "11"})
    ]  # fmt: skip


def test_a_forecast_is_shown_and_journaled_beside_what_came_true(run):
    display = NullDisplay()
    run.displays.append(display)
    run.step, run.label = "s1", "train lory"
    run_training(WorkerSettings(training_workers=0), foretell, {}, "training")
    assert display.texts == ["the training will take about 2 s"]
    sql = "select step, label, seconds, actual_seconds, memory, memory_error from forecasts"
    assert query(sql, run.home)[1] == [("s1", "train lory", 2.0, 4.0, 9, -0.1)]


def test_workers_outside_a_run_are_refused_and_this_process_needs_none():
    with pytest.raises(EclectusError, match=r"training on 2 workers was called outside a run.*training_workers 0"):
        run_training(WorkerSettings(training_workers=2), total, {"value": 1}, "training")
    assert run_training(WorkerSettings(training_workers=0), total, {"value": 1}, "training")[0] == 1.0
