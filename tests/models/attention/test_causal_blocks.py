"""Causal attention in blocks beside the formula: outputs and gradients, grouped heads, and what goes to torch."""

import pytest
import torch
from torch import nn

from eclectus.models.attention import causal_blocks
from eclectus.models.attention.causal_blocks import causal_blocks_forward


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(causal_blocks, "QUERIES", 8)


@pytest.fixture
def torch_calls(monkeypatch):
    """Calls of torch's attention."""
    calls = []
    theirs = causal_blocks.sdpa_attention_forward
    monkeypatch.setattr(
        causal_blocks, "sdpa_attention_forward", lambda *given, **more: calls.append(1) or theirs(*given, **more)
    )
    return calls


def drawn(heads, groups, length, width=4, value_width=4):
    draw = torch.Generator().manual_seed(0)
    shapes = (2, heads, length, width), (2, groups, length, width), (2, groups, length, value_width)
    # As a model has them: heads are cut out of a row.
    return [torch.randn(b, t, h, d, generator=draw).transpose(1, 2).requires_grad_() for b, h, t, d in shapes]


def exact(query, key, value, scaling):
    """The formula in float64: out and the gradients."""
    q, k, v = (each.detach().double().requires_grad_() for each in (query, key, value))
    times = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(times, 1).transpose(2, 3) * scaling
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v.repeat_interleave(times, 1)
    out.transpose(1, 2).sin().sum().backward()
    return out.transpose(1, 2), q.grad, k.grad, v.grad


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [2, 8, 19, 24])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_outputs_and_gradients_are_those_of_the_formula(heads, groups, length, scaling, torch_calls):
    given = drawn(heads, groups, length)
    out, _ = causal_blocks_forward(nn.Module(), *given, None, scaling=scaling)
    out.sin().sum().backward()
    expected = exact(*given, scaling or 0.5)
    for ours, theirs in zip((out, *(each.grad for each in given)), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
    assert not torch_calls


def test_a_token_sees_none_behind_it():
    given = [each.detach() for each in drawn(4, 2, 19)]
    before, _ = causal_blocks_forward(nn.Module(), *given, None)
    for each in given:
        each[:, :, 13:] = 9.0
    after, _ = causal_blocks_forward(nn.Module(), *given, None)
    assert torch.equal(before[:, :13], after[:, :13]) and not torch.equal(before[:, 13:], after[:, 13:])


def test_values_may_be_of_another_width():
    given = drawn(4, 2, 11, value_width=6)
    out, _ = causal_blocks_forward(nn.Module(), *given, None)
    torch.testing.assert_close(out.double(), exact(*given, 0.5)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("what", ["mask", "longer", "half", "autocast", "not causal", "one token", "cached"])
def test_what_it_does_not_compute_goes_to_torch(what, torch_calls, monkeypatch):
    query, key, value = (each.detach() for each in drawn(4, 4, 1 if what == "one token" else 12))
    mask, causal = (torch.ones(2, 1, 12, 12, dtype=torch.bool) if what == "mask" else None), what != "not causal"
    if what == "longer":
        monkeypatch.setattr(causal_blocks, "LONGEST", 11)
    if what == "half":
        query, key, value = (each.bfloat16() for each in (query, key, value))
    if what == "cached":
        query = query[:, :, -1:]
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        causal_blocks_forward(nn.Module(), query, key, value, mask, is_causal=causal)
    assert torch_calls
