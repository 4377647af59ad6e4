"""The fused loss of the output layer beside the plain one: values, gradients, memory, and what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eclectus.models.extension.split_vocabulary import SplitHead
from eclectus.models.losses import token_losses as fused
from eclectus.models.losses.token_losses import losses_in_place_of_logits, token_losses, weights_of

N, H, V = 37, 8, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 rows: several, the last one shorter."""
    monkeypatch.setitem(fused.LEAST_ROWS, "cpu", 8)
    monkeypatch.setitem(fused.CHUNK, "cpu", 8 * V)


def inputs(dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(N, H, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=draw, dtype=dtype)
    return x, weight, torch.randint(0, V, (N,), generator=draw)


def linear(weight, trains=True):
    head = nn.Linear(H, V, bias=False, dtype=weight.dtype)
    head.weight = nn.Parameter(weight.clone(), requires_grad=trains)
    return head


def split(weight, trains=True):
    old, new = weight[: V - 9].clone(), weight[V - 9 :].clone()
    return SplitHead(nn.Parameter(old, requires_grad=False), nn.Parameter(new, requires_grad=trains))


def plain(x, head, targets):
    losses = F.cross_entropy(head(x).float() if x.dtype != torch.float64 else head(x), targets, reduction="none")
    return losses.sum(), losses


def gradients(total, x, head):
    (total * 0.25).backward()
    found = [x.grad, *(each.grad for each in head.parameters() if each.requires_grad)]
    x.grad = None
    head.zero_grad()
    return found


@pytest.mark.parametrize("make", [linear, split])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_plain_way(make, trains, dtype):
    x, weight, targets = inputs(dtype)
    head, tolerance = make(weight, trains), {torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    total, each = plain(x, head, targets)
    expected = gradients(total, x, head)
    done = token_losses(x, head, targets)
    assert done.each.dtype == dtype and not done.each.requires_grad
    torch.testing.assert_close(done.each, each.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(done.total, total, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(done.total, x, head), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 10)


def test_under_autocast_it_is_as_near_to_the_exact_gradients_as_the_plain_way():
    x, weight, targets = inputs()
    exact_x, exact_head = x.detach().double().requires_grad_(), linear(weight.double())
    exact = gradients(plain(exact_x, exact_head, targets)[0], exact_x, exact_head)
    head, errors = linear(weight), []
    for way in (plain, lambda *given: (token_losses(*given).total, None)):
        with torch.autocast("cpu", torch.bfloat16):
            total, _ = way(x, head, targets)
        assert total.dtype == torch.float32
        found = gradients(total, x, head)
        assert all(each.dtype == torch.float32 for each in found)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    assert all(ours <= 1.1 * theirs for theirs, ours in zip(*errors, strict=True)), errors


def test_a_frozen_layer_costs_no_gradient_and_an_input_without_one_neither():
    x, weight, targets = inputs()
    head = linear(weight, trains=False)
    (token_losses(x, head, targets).total).backward()
    assert x.grad is not None and head.weight.grad is None
    head = linear(weight)
    token_losses(x.detach(), head, targets).total.backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert not token_losses(x, head, targets).total.requires_grad


def test_without_a_target_the_loss_is_zero_and_so_are_its_gradients():
    x, weight, _ = inputs()
    head = linear(weight)
    done = token_losses(x[:0], head, torch.zeros(0, dtype=torch.int64))
    done.total.backward()
    assert done.total.item() == 0 and len(done.each) == 0
    assert not head.weight.grad.any() and not x.grad.any()


def test_chunks_are_all_that_it_holds_of_the_logits(monkeypatch):
    x, weight, targets = inputs()
    sizes = []
    chunk = fused._gradient_of_logits
    monkeypatch.setattr(fused, "_gradient_of_logits", lambda *given: sizes.append(len(given[0])) or chunk(*given))
    token_losses(x, linear(weight), targets)
    assert sizes == [8, 8, 8, 8, 5]


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


@pytest.mark.parametrize("head", [nn.Linear(H, V), Scaled(H, V, bias=False)])
def test_another_output_layer_is_called_as_it_is(head):
    x, _, targets = inputs()
    assert weights_of(head) is None
    total, each = plain(x, head, targets)
    done = token_losses(x, head, targets)
    torch.testing.assert_close(done.total, total)
    torch.testing.assert_close(done.each, each.detach())


def test_the_model_s_output_layer_is_its_own_again_also_after_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = linear(inputs()[1])

        def get_output_embeddings(self):
            return self.head

        def forward(self, x):
            return self.head(x)

    model, (x, weight, targets) = Model(), inputs()
    rows = torch.tensor([0, 3, 36])
    with losses_in_place_of_logits(model, rows, targets[rows]) as losses:
        assert model(x.view(1, N, H)).shape == (1, 3, 0)
    (done,) = losses
    torch.testing.assert_close(done.each, plain(x[rows], linear(weight), targets[rows])[1].detach())
    with pytest.raises(ZeroDivisionError), losses_in_place_of_logits(model, rows, targets[rows]):
        raise ZeroDivisionError
    assert "forward" not in vars(model.head) and model(x).shape == (N, V)
