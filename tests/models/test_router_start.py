"""Routers that start by what segments look like: logits of a given deviation between segments, with nothing in common."""

import numpy as np
import pytest
import torch

from models.instances import Instances
from models.lory import LoryForCausalLM
from models.place import Place
from models.router_start import start_routers
from tests.models.training import LENGTH, plan, tiny_dense, write_instances

T = LENGTH // 3


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instances")
    write_instances(folder)
    return Instances(folder)


def tiny_lory(**config):
    return LoryForCausalLM.from_dense(tiny_dense(), 5, T, shared_memory=True, **config)


def logits(model, instances, rows):
    """[layers, segments, E], found without the routers' own code."""
    batch = torch.from_numpy(np.asarray(instances.tokens[rows], dtype=np.int64))
    found, hooks = [], []
    for layer in model.model.layers:
        norm = layer.post_attention_layernorm
        hooks.append(norm.register_forward_hook(lambda _, __, output: found.append(output.detach())))
    model(batch)
    for hook in hooks:
        hook.remove()
    means = [hidden.unflatten(1, (-1, T)).mean(2).flatten(0, 1) for hidden in found]
    return torch.stack([h @ layer.mlp.router.weight.T for h, layer in zip(means, model.model.layers, strict=True)])


@pytest.mark.parametrize("deviation", [0.5, 3.0])
def test_every_logit_has_mean_zero_and_the_deviation_asked_for(instances, deviation):
    model, chosen = tiny_lory(), plan()
    rows = [
        row
        for step in range(chosen.start, chosen.stop)
        for row in instances.rows_of_step(step, chosen.batch, chosen.seed)
    ]
    plain = logits(model, instances, rows)
    assert plain.mean(1).abs().max() > 0.1 * plain.std(1).mean()
    before = model(torch.arange(LENGTH).unsqueeze(0)).logits
    start_routers(model, instances, chosen, Place(), deviation)
    started = logits(model, instances, rows)
    torch.testing.assert_close(started.mean(1), torch.zeros_like(started[:, 0]), rtol=0, atol=1e-4 * deviation)
    torch.testing.assert_close(
        started.std(1, correction=0), torch.full_like(started[:, 0], deviation), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(model(torch.arange(LENGTH).unsqueeze(0)).logits, before)


def test_the_draw_still_counts_and_the_hooks_are_gone(instances):
    one, other = tiny_lory(seed=0), tiny_lory(seed=1)
    for model in (one, other):
        start_routers(model, instances, plan(), Place(), 1.0)
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert not torch.equal(one.model.layers[0].mlp.router.weight, other.model.layers[0].mlp.router.weight)


def test_where_all_segments_are_alike_the_routers_stay(tmp_path):
    class Same(Instances):
        def batch(self, rows):
            batch = super().batch(rows)
            batch.tokens.fill_(3)
            return batch

    write_instances(tmp_path)
    model = tiny_lory()
    before = [layer.mlp.router.weight.clone() for layer in model.model.layers]
    start_routers(model, Same(tmp_path), plan(), Place(), 2.0)
    for layer, weight in zip(model.model.layers, before, strict=True):
        assert layer.mlp.router.weight.isfinite().all()
        torch.testing.assert_close(layer.mlp.router.weight, weight)
