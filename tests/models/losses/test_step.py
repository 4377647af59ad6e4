"""How a step is cut into micro-batches and processes changes neither its gradient nor what is logged.

The instances mix languages unevenly, so that every loss with a denominator of its own (tokens of original languages,
tokens that are no padding) would differ as a mean of means.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from eclectus.models.extension.lory import post_pretrain_lory, review_lory, split_lory
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import balanced, lory, next_token, one_stage, post_pretrain, review
from eclectus.models.losses.step import Step
from eclectus.models.mixture.experts import set_trainable, split_experts
from eclectus.models.pretraining.baselines import top_k_from_dense
from eclectus.models.pretraining.document_pools import document_pools_from_dense, pooled
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import micro_batches, train
from eclectus.models.training.parallel import reshard
from eclectus.models.training.parallel import whole as gathered
from eclectus.models.training.process import Process
from tests.support.processes import run_group
from tests.support.tiny_training import LENGTH, SHAPE, plan, tiny_dense, write_uneven_instances

STEPS, SEGMENT, EXPERTS = 6, 8, 4
ALPHA, GAMMA = 0.5, 2.0
DOMAINS = ("a", "b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    write_uneven_instances(folder / "instances")
    return folder


def spread(model):
    """In fp64, with routers that prefer some experts and experts that differ."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.double().named_parameters():
        if "norm" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model


def mixture(stage):
    chosen = dict(num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, **chosen))
    model = split_experts(spread(model), [1, 2])
    set_trainable(model, stage)
    return model


def top_k():
    model = spread(top_k_from_dense(tiny_dense(), 2, 2, balance=ALPHA))
    model.set_experts_implementation("eager")
    return model


def document_pools():
    model = spread(document_pools_from_dense(tiny_dense(), 2, 2, pool_size=2, balance=ALPHA))
    model.set_experts_implementation("eager")
    return model


def extended_lory(stage):
    model = spread(LoryForCausalLM.from_dense(tiny_dense(), EXPERTS, SEGMENT))
    model.config.original_experts = 2
    return split_lory(model, stage)


# By name: the model, and its objective.
KINDS = {
    "dense": (lambda: spread(tiny_dense()), next_token(DOMAINS)),
    "lory": (lambda: spread(LoryForCausalLM.from_dense(tiny_dense(), EXPERTS, SEGMENT)), lory(DOMAINS)),
    "balanced": (top_k, balanced(DOMAINS)),
    "post_pretrain": (lambda: mixture("post_pretrain"), post_pretrain(ALPHA, 2, "paper")),
    "review": (lambda: mixture("review"), review(GAMMA, "paper", [0], [1, 2])),
    "one_stage": (lambda: mixture("post_pretrain"), one_stage(ALPHA, 2, "released", GAMMA, "released", [0], [1, 2])),
    "post_pretrain_lory": (lambda: extended_lory("post_pretrain"), post_pretrain_lory()),
    "review_lory": (lambda: extended_lory("review"), review_lory(GAMMA, [0])),
}

# Without a reference here: their own tests have one.
OTHERS = {"document_pools": (document_pools, pooled(DOMAINS))}


def mean(values):
    return sum(values) / len(values) if len(values) else torch.zeros(())


def next_token_reference(output, batch):
    log_probabilities = F.log_softmax(output.logits, -1)
    losses = [
        -log_probabilities[row, at, batch.labels[row, at + 1]]
        for row, at in np.ndindex(len(batch.tokens), LENGTH - 1)
        if batch.labels[row, at + 1] >= 0
    ]
    return mean(losses)


def balance_reference(layers, batch, divide):
    """layers: router logits [tokens, experts] that are balanced together."""
    real = (batch.labels >= 0).flatten()
    total = 0.0
    for logits in layers:
        rows = logits[real.repeat(len(logits) // len(real))]
        chosen = rows.detach().argsort(-1, descending=True)[:, :2]
        for expert in range(logits.shape[1]):
            share = logits.shape[1] * (chosen == expert).sum() / (divide * len(rows))
            total = total + share * rows.softmax(-1)[:, expert].mean()
    return total / len(layers)


def prior_reference(layers, batch, old, form):
    """layers: router logits [tokens, experts]."""
    terms = []
    for logits, count in zip(layers, old, strict=True):
        for row in logits[(batch.languages == 0).flatten()]:
            scores = row.softmax(-1) if form == "released" else row
            terms.append(-scores.softmax(-1)[:count].sum().log())
    return mean(terms)


def segment_prior_reference(weights, batch):
    terms = []
    for layer in weights:
        for row, token in (batch.languages == 0).nonzero().tolist():
            terms.append(-layer[row, token // SEGMENT, :2].sum().log())
    return mean(terms)


def reference(kind, model, batch):
    """(objective, its losses) of a whole step, from the formulas, without the code under test."""
    asks = {"output_router_weights": True} if "lory" in kind else {"output_router_logits": True}
    output = model(input_ids=batch.tokens, use_cache=False, **({} if kind == "dense" else asks))
    loss = {"next_token_loss": next_token_reference(output, batch)}
    total = loss["next_token_loss"]
    if kind in ("balanced", "post_pretrain", "one_stage"):
        layers = [torch.cat(output.router_logits)] if kind == "balanced" else output.router_logits
        loss["balance_loss"] = balance_reference(layers, batch, 2 if kind == "post_pretrain" else 1)
        total = total + ALPHA * loss["balance_loss"]
    if kind in ("review", "one_stage"):
        form = "paper" if kind == "review" else "released"
        loss["lpr_loss"] = prior_reference(output.router_logits, batch, [1, 2], form)
        total = total + GAMMA * loss["lpr_loss"]
    if kind in ("balanced", "post_pretrain", "review", "one_stage"):
        rows = [logits[(batch.labels >= 0).flatten()] for logits in output.router_logits]
        loss["router_entropy"] = mean([-(each.softmax(-1) * each.log_softmax(-1)).sum(-1).mean() for each in rows])
        for layer, each in enumerate(rows):
            chosen = each.argsort(-1, descending=True)[:, :2].flatten()
            loss[f"expert_load@{layer}"] = chosen.bincount().max() * each.shape[1] / len(chosen)
    if kind == "review_lory":
        loss["lpr_loss"] = segment_prior_reference(output.router_weights, batch)
        total = total + GAMMA * loss["lpr_loss"]
    return total, loss


def gradient(model):
    """All gradients in one vector; clears them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    model.zero_grad()
    return flat


def distance(left, right):
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_step_is_that_of_its_tokens_however_it_is_cut(folder, kind, step):
    make, objective = KINDS[kind]
    data, model = Instances(folder / "instances"), make()
    (batch,) = micro_batches(data, step, plan(micro_batch=4), Process())
    expected, losses = reference(kind, model, batch)
    expected.backward()
    right = gradient(model)
    for size in (1, 2, 3, 4):
        parts = Step(objective, micro_batches(data, step, plan(micro_batch=size), Process()), Process())
        parts.survey(model)
        objectives, terms = [], []
        for number in range(math.ceil(4 / size)):
            loss, own = parts.measure(model, number)
            loss.backward()
            objectives.append(loss.item())
            terms.append(own)
        assert distance(gradient(model), right) < 1e-6, size
        assert sum(objectives) == pytest.approx(expected.item(), rel=1e-6)
        for name, value in losses.items():
            total, count = (sum(getattr(own[name], what) for own in terms) for what in ("total", "count"))
            found = terms[0][name].joined([*total.flatten().tolist(), max(count.item(), 1)])
            assert found == pytest.approx(float(value.detach()), rel=1e-6), name


def trained(folder, kind, process, work, **changes):
    """(what trained, what it was, metrics) of 6 steps."""
    make, objective = (KINDS | OTHERS)[kind]
    model, metrics = make(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings = plan(**{"stop": STEPS, "warmup": 0, "checkpoint_every": 99, "log_every": 3, **changes})

    def report(what, **values):
        if what == "metrics":
            metrics.append(values["values"])

    train(model, Instances(folder / "instances"), objective, settings, process, work, report)
    reshard(model)
    return {name: gathered(p.detach()) for name, p in model.named_parameters() if name in before}, before, metrics


@pytest.fixture(scope="module")
def whole(folder):
    """By kind, the training of one process with whole batches."""
    return {kind: trained(folder, kind, Process(), folder / f"{kind} whole", micro_batch=4) for kind in KINDS | OTHERS}


def check_same(found, metrics, whole, kind):
    right, before, right_metrics = whole[kind]
    for name, value in found.items():
        moved = (right[name] - before[name]).norm()
        assert moved > 0 and (value - right[name]).norm() < 1e-6 * moved, f"{kind}: {name}"
    for ours, theirs in zip(metrics, right_metrics, strict=True):
        for name in theirs.keys() - {"tokens_per_second", "mfu"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), f"{kind}: {name}"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS | OTHERS)
def test_six_steps_do_not_depend_on_the_micro_batches(folder, whole, kind, size):
    found, _, metrics = trained(folder, kind, Process(), folder / f"{kind} {size}", micro_batch=size)
    check_same(found, metrics, whole, kind)


HOW = {"copied": {"micro_batch": 2}, "in ones": {"micro_batch": 1}, "sharded": {"micro_batch": 1, "sharded": True}}


def train_in_a_group(folder, kinds, ways):
    """What each process of a group does; rank 0 writes the weights and the metrics."""
    process = Process.current()
    for kind in kinds:
        for how in ways:
            name = f"{kind} {how} {process.world}"
            found, _, metrics = trained(folder, kind, process, folder / name, **HOW[how])
            if process.is_main:
                save_file(found, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps(metrics))
            process.barrier()


def check_group(folder, whole, world, kinds, ways):
    run_group(world, train_in_a_group, folder, kinds, ways)
    for kind in kinds:
        for how in ways:
            metrics = json.loads((folder / f"{kind} {how} {world}.json").read_text())
            check_same(load_file(folder / f"{kind} {how} {world}.safetensors"), metrics, whole, kind)


def test_six_steps_of_two_processes_are_those_of_one(folder, whole):
    # These three have all losses with a denominator of their own.
    check_group(folder, whole, 2, ["balanced", "one_stage", "review_lory"], ["in ones", "sharded"])


@pytest.mark.slow  # 9 objectives in 3 ways, in up to 4 processes
@pytest.mark.parametrize("world", [2, 4])
def test_six_steps_of_any_objective_do_not_depend_on_the_processes(folder, whole, world):
    check_group(folder, whole, world, list(KINDS | OTHERS), list(HOW))
