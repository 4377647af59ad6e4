"""Expert Choice and top-k: their function, initialisation, and causality."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from eclectus.models.lory.merge import apply_merged
from eclectus.models.losses.objectives import balanced, next_token
from eclectus.models.pretraining.baselines import (
    ExpertChoiceConfig,
    ExpertChoiceForCausalLM,
    calibrate,
    top_k_from_dense,
)
from eclectus.models.pretraining.blueprints import duplicated_moments, top_k_moments
from eclectus.models.sharding.slices import InMemory
from tests.support.tiny_training import SHAPE, batch_of


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def tokens(rows=2, length=24, seed=1):
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def test_one_expert_that_takes_everything_is_the_dense_model(dense):
    one = ExpertChoiceForCausalLM.from_dense(dense, num_experts=1)
    torch.testing.assert_close(one(tokens()).logits, dense(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [1, 4])
def test_every_expert_takes_its_best_tokens_and_adds_its_outputs(dense, unit):
    model = ExpertChoiceForCausalLM.from_dense(dense, 4, unit, router_initializer_range=1.0)
    ffn = model.model.layers[0].mlp
    with torch.no_grad():
        ffn.experts.add_(torch.randn_like(ffn.experts))
    x = torch.randn(2, 24, SHAPE["hidden_size"])
    scores = torch.softmax(x.view(2, -1, unit, x.shape[-1]).mean(2) @ ffn.router.weight.t(), -1)
    if unit > 1:
        scores = torch.cat([scores[:, :1], scores[:, :-1]], 1)
    scores, expected = scores.flatten(0, 1), torch.zeros(48 // unit, unit, x.shape[-1])
    pieces = x.view(48 // unit, unit, -1)
    for expert in range(4):
        for piece in scores[:, expert].argsort(descending=True)[: len(pieces) // 4]:
            made = apply_merged(pieces[piece].unsqueeze(0), ffn.experts[expert : expert + 1])[0]
            expected[piece] += 4 * scores[piece, expert] * made
    torch.testing.assert_close(ffn(x), expected.view(x.shape), rtol=1e-4, atol=1e-4)


def moved(model, changed_at):
    ids = tokens(4)
    edited = ids.clone()
    edited[:, changed_at:] = (edited[:, changed_at:] + 7) % SHAPE["vocab_size"]
    return (model(ids).logits - model(edited).logits)[:, :changed_at].abs().max().item()


def test_choice_within_a_batch_looks_ahead_and_choice_by_threshold_does_not(dense):
    model = ExpertChoiceForCausalLM.from_dense(dense, 4, router_initializer_range=1.0)
    assert moved(model, 12) > 1e-3
    calibrate(model, [tokens(4, seed=seed) for seed in range(3)])
    assert moved(model, 12) == 0
    output = model(tokens(8, seed=9), output_router_logits=True)
    taken = torch.stack(
        [
            (logits.softmax(-1) >= layer.mlp.threshold).sum(-1).float().mean()
            for logits, layer in zip(output.router_logits, model.model.layers, strict=True)
        ]
    )
    assert (taken - 1).abs().max() < 0.25, "calibrated experts take about as much as they were trained to"


def test_a_length_that_is_not_a_multiple_of_the_unit_is_padded(dense):
    model = ExpertChoiceForCausalLM.from_dense(dense, 2, 5)
    output = model(tokens(2, 13), output_router_logits=True)
    assert output.logits.shape[:2] == (2, 13)
    assert output.router_logits[0].shape == (26, 2)


def test_expert_choice_survives_saving(dense, tmp_path):
    model = ExpertChoiceForCausalLM.from_dense(dense, 4, router_initializer_range=1.0)
    calibrate(model, [tokens()])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="selection is 'future'"):
        ExpertChoiceConfig(selection="future")


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_starts_as_the_dense_model_with_as_many_active_parameters(dense, top_k):
    model = top_k_from_dense(dense, 4, top_k, router_initializer_range=0.3)
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=1e-5, atol=1e-5)
    ffn = sum(p.count_nonzero() for n, p in dense.named_parameters() if ".mlp." in n)
    experts = sum(p.count_nonzero() for n, p in model.named_parameters() if ".mlp.experts." in n)
    assert experts / 4 == ffn


def test_a_width_that_grouped_kernels_refuse_is_padded_with_zeros_that_stay(dense):
    model = top_k_from_dense(dense, 4, 2, router_initializer_range=0.3)
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj.shape[-1] == 16, "12, filled up to a multiple of 8"
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(2):
        model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        optimizer.step()
    assert experts.down_proj[..., 12:].count_nonzero() == 0
    assert experts.gate_up_proj[:, 12:16].count_nonzero() == experts.gate_up_proj[:, 28:].count_nonzero() == 0
    assert experts.down_proj[..., :12].count_nonzero() > 0


def test_masked_experts_equal_transformers_own(dense):
    model = top_k_from_dense(dense, 4, 2, router_initializer_range=1.0)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    gradients = []
    for how in ("eager", "masked"):
        model.set_experts_implementation(how)
        model.zero_grad()
        model(tokens()).logits.sin().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_width_that_cannot_be_cut_is_refused(dense):
    with pytest.raises(ValueError, match="top_k 7 does not divide"):
        top_k_from_dense(dense, 4, 7)


def test_moments_and_objectives_fit_the_models(dense):
    moments = {
        f"{n}.{what}": torch.rand_like(p) for n, p in dense.named_parameters() for what in ("exp_avg", "exp_avg_sq")
    }
    moments |= {f"{n}.step": torch.tensor(3.0) for n, _ in dense.named_parameters()}
    held = {name: InMemory(value) for name, value in moments.items()}
    mixtral, choice = top_k_from_dense(dense, 4, 2), ExpertChoiceForCausalLM.from_dense(dense, 4)
    for model, carried in ((mixtral, top_k_moments(held, 4, 2)), (choice, duplicated_moments(held, 4))):
        for name, parameter in model.named_parameters():
            if not name.endswith(("router.weight", "gate.weight")):
                assert carried[f"{name}.exp_avg"].shape == parameter.shape, name
    batch = batch_of(tokens())
    loss, extra = balanced()(mixtral, batch)
    plain, _ = next_token()(dense, batch)
    torch.testing.assert_close(extra["next_token_loss"], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss - plain, 0.01 * extra["balance_loss"], rtol=1e-4, atol=1e-5)
    loss.backward()
    assert mixtral.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
