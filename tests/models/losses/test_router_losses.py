"""The router losses against float64 references written from the formulas of docs/methods.md 2.2 and 2.3."""

import math

import pytest
import torch

from eclectus.models.losses.router_losses import balance_loss, language_prior_loss

LAYERS, TOKENS, EXPERTS = 3, 40, 6


def random_logits(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(LAYERS)
    ]


def reference_balance(router_logits, top_k, divide, mask):
    total = 0.0
    for logits in router_logits:
        rows = logits.double()[mask]
        probabilities = torch.softmax(rows, dim=-1)
        counts = torch.zeros(EXPERTS, dtype=torch.float64)
        for row in rows.detach():
            for expert in sorted(range(EXPERTS), key=lambda e: -row[e].item())[:top_k]:
                counts[expert] += 1
        total = total + (EXPERTS * counts / (divide * len(rows)) * probabilities.mean(dim=0)).sum()
    return total / LAYERS


def reference_prior(router_logits, mask, form):
    terms = []
    for logits in router_logits:
        for row in logits.double()[mask]:
            scores = row if form == "paper" else torch.exp(row) / torch.exp(row).sum()
            terms.append(-scores[0] + torch.log(torch.exp(scores).sum()))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("scaling", ["paper", "released"])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_and_its_gradient_equal_the_float64_reference(top_k, scaling, masked):
    logits, expected_logits = random_logits(), random_logits(torch.float64)
    mask = torch.arange(TOKENS) % 3 != 0 if masked else torch.ones(TOKENS, dtype=torch.bool)
    expected = reference_balance(expected_logits, top_k, top_k if scaling == "paper" else 1, mask)
    loss = balance_loss(logits, top_k, scaling, mask if masked else None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for ours, reference in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_prior_loss_and_its_gradient_equal_the_float64_reference(form):
    logits, expected_logits = random_logits(), random_logits(torch.float64)
    mask = torch.arange(TOKENS) % 4 == 0
    loss, expected = language_prior_loss(logits, mask, form), reference_prior(expected_logits, mask, form)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for ours, reference in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_uniform_routing_balances_to_one_in_the_paper_and_to_top_k_in_the_released_code(top_k):
    logits = [torch.zeros(TOKENS, EXPERTS)] * LAYERS
    assert balance_loss(logits, top_k).item() == pytest.approx(1.0, abs=1e-6)
    assert balance_loss(logits, top_k, "released").item() == pytest.approx(top_k, abs=1e-5)


def test_the_prior_loss_is_minus_the_log_probability_of_expert_zero():
    logits, mask = random_logits(), torch.arange(TOKENS) < 7
    expected = torch.stack([-torch.log_softmax(layer, -1)[:7, 0] for layer in logits]).mean()
    assert language_prior_loss(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_released_prior_lies_between_its_known_bounds_and_has_a_weak_gradient():
    sure, unsure = torch.zeros(1, EXPERTS), torch.zeros(1, EXPERTS)
    sure[0, 0], unsure[0, 1] = 100.0, 100.0
    everything = torch.ones(1, dtype=torch.bool)
    assert language_prior_loss([sure], everything, "released").item() == pytest.approx(1.04, abs=0.005)
    assert language_prior_loss([unsure], everything, "released").item() == pytest.approx(2.04, abs=0.005)
    gradients = {}
    for form in ("paper", "released"):
        logits = torch.log(torch.tensor([[0.01, *[0.99 / 5] * 5]])).requires_grad_()
        language_prior_loss([logits], everything, form).backward()
        gradients[form] = logits.grad[0, 0].item()
    assert gradients["paper"] == pytest.approx(-0.99, abs=1e-3)
    assert gradients["released"] == pytest.approx(-0.010, abs=2e-3)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_batch_without_original_tokens_gives_zero_and_a_zero_gradient(form):
    logits = random_logits()
    loss = language_prior_loss(logits, torch.zeros(TOKENS, dtype=torch.bool), form)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(layer.grad, torch.zeros_like(layer)) for layer in logits)


def test_a_batch_of_padding_gives_a_balance_of_zero():
    logits = random_logits()
    loss = balance_loss(logits, 2, mask=torch.zeros(4, TOKENS // 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and all(torch.isfinite(layer.grad).all() for layer in logits)


def test_half_precision_logits_are_computed_in_fp32():
    half = [layer.detach().to(torch.bfloat16) for layer in random_logits()]
    mask = torch.ones(TOKENS, dtype=torch.bool)
    assert balance_loss(half, 2).dtype == torch.float32
    exact = language_prior_loss([layer.double() for layer in half], mask).item()
    assert language_prior_loss(half, mask).item() == pytest.approx(exact, rel=1e-6)


def test_several_original_experts_add_their_probabilities():
    logits, mask = random_logits(), torch.ones(TOKENS, dtype=torch.bool)
    expected = -torch.log(torch.stack([torch.softmax(layer, -1)[:, :3].sum(-1) for layer in logits])).mean()
    loss = language_prior_loss(logits, mask, original_experts=3)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance_loss([], 2), "non-empty"),
        (lambda: balance_loss(random_logits(), 7), "top_k is 7"),
        (lambda: balance_loss(random_logits(), 2, "ours"), "unknown balance scaling 'ours'"),
        (lambda: language_prior_loss(random_logits(), torch.ones(3), "paper"), "3 elements"),
        (lambda: language_prior_loss(random_logits(), torch.ones(TOKENS), "ours"), "'ours'"),
        (lambda: language_prior_loss([torch.zeros(2, 3, 4)], torch.ones(2)), "expected"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_layers_may_hold_different_numbers_of_experts():
    torch.manual_seed(0)
    layers = [torch.randn(40, experts, dtype=torch.float64) for experts in (3, 6)]
    mask = torch.arange(40) % 3 == 0
    balance = torch.stack([balance_loss([each], 2) for each in layers]).mean()
    torch.testing.assert_close(balance_loss(layers, 2), balance)
    prior = torch.stack(
        [-each.log_softmax(-1)[mask][:, :old].logsumexp(-1).mean() for each, old in zip(layers, (1, 2), strict=True)]
    )
    torch.testing.assert_close(language_prior_loss(layers, mask, original_experts=[1, 2]), prior.mean())
    with pytest.raises(ValueError, match="with 3 experts choose 1 to 2"):
        language_prior_loss(layers, mask, original_experts=[3, 1])
    with pytest.raises(ValueError, match="hold 3 experts"):
        balance_loss(layers, 4)
