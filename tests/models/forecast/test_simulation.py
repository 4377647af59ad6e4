"""What a step holds, simulated on fake tensors, against torch's own tracker over a real step on the CPU."""

import dataclasses

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models.attention.choice import choose_attention
from eclectus.models.forecast import simulation
from eclectus.models.forecast.cut import drawn, kinds_of
from eclectus.models.forecast.job import Job
from eclectus.models.forecast.simulation import simulate
from eclectus.models.losses import objectives
from eclectus.models.losses.step import Step
from eclectus.models.pretraining import stages
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.training.flops import count_flops
from eclectus.models.training.parallel import recompute_blocks
from eclectus.models.training.process import Process
from tests.support.tiny_training import plan

LENGTH = 64


def shape(layers=3):
    return LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=88, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )  # fmt: skip


def job(kind="dense", layers=3, **changed):
    dense = Blueprint.of_config(shape(layers))
    if kind == "dense":
        made = stages.Stage(dense, {}, objectives.next_token(["a"]))
    elif kind == "lory":
        made = stages.lory_from_dense(dense, {}, ["a"], 4, segment_length=16)
    elif kind == "expert_choice":
        made = stages.expert_choice_from_dense(dense, {}, ["a"], 4, 0)
    else:
        made = stages.top_k_of_dense(dense, {}, ["a"], 4, 2, 0)
    return Job(made.blueprint.model, made.objective, plan(batch=2, micro_batch=2, **changed), 1, LENGTH)


def held_by_a_real_step(of):
    """(bytes held besides parameters at the fullest moment, bytes of gradients)."""
    model = drawn(of.model).make().train()
    choose_attention(model, of.plan.attention, of.device)
    if of.plan.recomputed:
        recompute_blocks(model)
    parts = Step(of.asked, [of.batch()], Process())
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss, _terms = parts.measure(model, 0)
        loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    kept = sum(each.numel() * each.element_size() for each in [*model.parameters(), *model.buffers()])
    return peak["Total"] - kept, sum(each.grad.numel() * 4 for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("kind", ["dense", "lory", "expert_choice", "top_k"])
def test_the_fullest_moment_is_that_of_a_real_step(kind):
    simulated, (held, gradients) = simulate(job(kind)), held_by_a_real_step(job(kind))
    assert simulated.gradients == gradients
    # A mixture's experts are simulated with evenly spread choices.
    assert simulated.growing == pytest.approx(held, rel=0.1 if kind == "top_k" else 0.01)


def test_documents_apart_need_a_mask():
    of = job(document_mask=True)
    held, _ = held_by_a_real_step(of)
    assert simulate(of).growing == pytest.approx(held, rel=0.02)
    # Of a Lory model the mask is left out.
    assert simulate(job("lory", document_mask=True)).growing == simulate(job("lory")).growing


def test_recomputed_layers_keep_less():
    simulated, (held, _) = simulate(job(recomputed=True)), held_by_a_real_step(job(recomputed=True))
    assert simulated.growing == pytest.approx(held, rel=0.02)
    assert simulated.activations < simulate(job()).activations


def test_a_micro_batch_costs_the_flops_that_are_counted_without_a_loss():
    of = job(attention="sdpa")
    # The last position of each instance has no target, and no logits.
    head = 2 * 6 * 32 * 512
    assert simulate(of).flops == count_flops(of.model, 2, LENGTH).total - head


@pytest.mark.parametrize("kind", ["dense", "lory"])
def test_a_deep_model_is_simulated_by_a_few_of_its_layers(monkeypatch, kind):
    of = job(kind, layers=9)
    by_cuts = simulate(of)
    monkeypatch.setattr(simulation, "WHOLE", 99)
    whole = simulate(of)
    for name in ("parameters", "trained", "gradients", "trained_small", "layer", "root", "flops"):
        assert getattr(by_cuts, name) == getattr(whole, name), name
    for name in ("activations", "growing", "small"):
        assert getattr(by_cuts, name) == pytest.approx(getattr(whole, name), rel=0.03), name


def test_layers_that_a_gradient_does_not_reach_are_of_another_kind():
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(4)).requires_grad_(False)
    assert len(set(kinds_of(model))) == 1
    model.model.layers[2].requires_grad_(True)
    first, second, third, last = kinds_of(model)
    assert first == second != third != last != first


def test_frozen_weights_in_bfloat16_take_half(tmp_path):
    of = job(precision="bfloat16")
    of.model.requires_grad_(False)
    of.model.model.layers[2].requires_grad_(True)
    whole, held = simulate(of), simulate(dataclasses.replace(of, holds_frozen=True))
    matrices = sum(each.numel() for each in of.model.parameters() if each.ndim > 1 and not each.requires_grad)
    assert whole.parameters - held.parameters == 2 * matrices
