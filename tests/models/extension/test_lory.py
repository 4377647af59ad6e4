"""Lory extended by two stages: equal at first, old weights unchanged, known text routed back to the old experts."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from eclectus.models import LoryConfig, LoryForCausalLM
from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.extension.lory import extend_lory, post_pretrain_lory, review_lory, segment_prior_loss, split_lory
from eclectus.models.extension.methods import open_method, open_review, save_method, untrained_digest
from eclectus.models.losses.objectives import next_token, next_token_loss
from eclectus.models.sharding.slices import in_memory
from eclectus.models.training.instances import Batch
from eclectus.models.training.precision import FrozenWeights, autocast
from tests.support.dense_bases import tokens

SEGMENT = 8


@pytest.fixture(scope="module")
def lory(tmp_path_factory):
    """A Lory checkpoint whose experts differ, and the same with a copy of each."""
    torch.manual_seed(0)
    config = LoryConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_experts=3,
        segment_length=SEGMENT,
    )
    model = LoryForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    root = tmp_path_factory.mktemp("lory")
    model.save_pretrained(root / "base")
    return root / "base", root / "wider", extend_lory(root / "base", root / "wider")


@torch.no_grad()
def logits(place, ids):
    return LoryForCausalLM.from_pretrained(place).eval()(input_ids=ids, use_cache=False).logits


def batch(ids, language):
    same = torch.full_like(ids, language)
    return Batch(ids, ids, same, same, same)


@pytest.mark.parametrize("length", [SEGMENT, 40, 43])
def test_with_a_copy_of_every_expert_all_text_keeps_its_logits(lory, length):
    base, wider, report = lory
    assert report.experts == 6 and report.max_abs_delta < 1e-5
    torch.testing.assert_close(logits(wider, tokens(length)), logits(base, tokens(length)), rtol=0, atol=1e-5)


def test_the_prior_is_the_mean_over_original_tokens_of_the_old_experts_weight():
    torch.manual_seed(0)
    weights = [torch.randn(2, 3, 5, dtype=torch.float64).softmax(-1) for _ in range(2)]
    mask = torch.rand(2, 20) < 0.4
    expected = [
        -layer[row, token // SEGMENT, :2].sum().log() for layer in weights for row, token in mask.nonzero().tolist()
    ]
    got = segment_prior_loss(weights, mask, SEGMENT, old=2)
    torch.testing.assert_close(got, torch.stack(expected).mean())


def test_a_batch_without_original_tokens_has_a_prior_of_zero_and_no_gradient(lory):
    model = open_review(lory[1])
    loss, logged = review_lory(5.0, [0])(model, batch(tokens(40), 1))
    assert logged["lpr_loss"] == 0
    loss.backward()
    with_prior = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    next_token()(model, batch(tokens(40), 1))[0].backward()
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(with_prior, (p for p in model.parameters() if p.grad is not None), strict=True)
    )


def fit(model, objective, batches, steps, rate):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.3)
    for step in range(steps):
        loss, _ = objective(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_stages_learn_the_new_language_and_route_known_text_back(lory, tmp_path):
    base, wider, _ = lory
    # Languages that share no tokens.
    known = torch.randint(0, 40, (8, 40), generator=torch.Generator().manual_seed(1))
    new = torch.randint(50, 90, (8, 40), generator=torch.Generator().manual_seed(2))
    before = logits(base, known)
    model = open_method("moe_lpr", wider)
    still = untrained_digest(model)
    fit(model, post_pretrain_lory(), [batch(new, 1)], steps=30, rate=1e-2)
    assert untrained_digest(model) == still
    save_method(model, tmp_path / "one", wider)
    learned, damaged = logits(tmp_path / "one", new), logits(tmp_path / "one", known)
    start = logits(base, new)
    losses = [cross_entropy(each[:, :-1].flatten(0, 1), new[:, 1:].flatten()).item() for each in (start, learned)]
    assert losses[1] < losses[0] - 0.5
    model = open_review(tmp_path / "one")
    still = untrained_digest(model)
    fit(model, review_lory(3.0, [0]), [batch(known, 0), batch(new, 1)], steps=60, rate=5e-2)
    assert untrained_digest(model) == still
    output = model(input_ids=known, output_router_weights=True)
    assert min(layer[..., :3].sum(-1).mean().item() for layer in output.router_weights) > 0.9
    save_method(model, tmp_path / "two", wider)
    healed = logits(tmp_path / "two", known)
    # Segments that are routed by known text alone: the first looks at itself, so all are.
    assert (healed - before).abs().mean() < 0.3 * (damaged - before).abs().mean()
    old, final = (LoryForCausalLM.from_pretrained(place).state_dict() for place in (base, tmp_path / "two"))
    assert all(torch.equal(final[name][: len(tensor)], tensor) for name, tensor in old.items())


def test_an_extended_lory_model_is_extended_again(lory, tmp_path):
    wider = lory[1]
    report = extend_lory(wider, tmp_path / "again")
    assert (report.experts_before, report.experts) == (6, 12)
    model = open_method("moe_lpr", tmp_path / "again")
    new = model.model.layers[0].mlp.parametrizations.experts.original1
    assert len(new) == 6 and new.requires_grad


def test_misuse_is_refused_with_the_remedy(lory, tmp_path):
    base = LoryForCausalLM.from_pretrained(lory[0])
    with pytest.raises(ValueError, match="no new experts to train"):
        split_lory(copy.deepcopy(base), "review")
    with pytest.raises(StepZeroError, match="nothing was written"):
        extend_lory(lory[0], tmp_path / "out", tolerance=1e-12)
    dense = LoryForCausalLM(LoryConfig(**{**base.config.to_dict(), "num_experts": 1}))
    dense.save_pretrained(tmp_path / "one expert")
    with pytest.raises(ValueError, match="one expert and no router"):
        extend_lory(tmp_path / "one expert", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frozen_experts_get_no_gradient_and_the_new_ones_the_same(lory):
    """Stage 1 multiplies for half of the experts; the reference computes all and reads the new ones'."""
    ids, gradients = tokens(40), {}
    for skipped in (True, False):
        model = open_method("moe_lpr", lory[1])
        for layer in model.model.layers:
            layer.mlp.frozen_experts *= skipped
        with FlopCounterMode(display=False) as counter:
            next_token_loss(model(input_ids=ids).logits, ids).backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        gradients[skipped] = trained, counter.get_total_flops()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert gradients[True][1] < gradients[False][1]
    for name, gradient in gradients[False][0].items():
        torch.testing.assert_close(gradients[True][0][name], gradient)


@pytest.mark.parametrize("stage", ["stage 1", "review"])
def test_bf16_training_leaves_the_old_experts_bit_by_bit(lory, tmp_path, stage):
    model = open_method("moe_lpr", lory[1]) if stage == "stage 1" else open_review(lory[1])
    digest = untrained_digest(model)
    held = FrozenWeights(model, in_memory(model))
    ids = tokens(40)
    objective = post_pretrain_lory() if stage == "stage 1" else review_lory(1.0, [0])
    with autocast(ids.device, "bfloat16"):
        loss, _ = objective(model, batch(ids, 0))
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad.dtype == torch.float32 and grad.any() for grad in trained.values())
    held.restore()
    assert untrained_digest(model) == digest
    save_method(model, tmp_path / "out", lory[1])
    torch.testing.assert_close(logits(tmp_path / "out", ids), logits(lory[1], ids), rtol=0, atol=0)
