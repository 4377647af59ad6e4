"""Extending again: known text keeps its function, all earlier experts stay frozen, the new ones can learn."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.losses.router_losses import balance_loss
from eclectus.models.mixture.experts import frozen_digest, set_trainable, split_experts
from eclectus.models.mixture.export import export_checkpoint, extract_base
from eclectus.models.mixture.extend_again import extend_again, shortest_row_below
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import logits, tokens, write_base

NAMES = ("llama tied", "qwen2", "qwen3 tied")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Name to (base, upcycled, extended again, report) on calibration text short enough to be fitted exactly."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp("lifelong")
            base = write_base(root / "base", name)
            upcycle(base, root / "moe", experts=4, init="noise", noise_scale=0.5)
            report = extend_again(
                root / "moe", root / "more", new_experts=2, calibration=tokens(8, 4), largest_share=1.0
            )
            made[name] = base, root / "moe", root / "more", report
        return made[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_known_text_keeps_its_logits_as_routed(extended, name):
    _, moe, more, report = extended(name)
    fitted = tokens(8, 4)[1:]
    assert report.new_chosen_share == 0 and report.experts == 6
    torch.testing.assert_close(logits(more, fitted), logits(moe, fitted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_with_old_experts_alone_all_text_keeps_its_logits(extended, name):
    report = extended(name)[3]
    assert report.max_abs_delta < 1e-5
    assert abs(report.kept_back_loss[0] - report.kept_back_loss[1]) < 1


@pytest.mark.parametrize("name", NAMES)
def test_all_earlier_weights_are_bit_identical_after_training_and_the_new_ones_learn(extended, name, tmp_path):
    base, _, more, _ = extended(name)
    before = frozen_digest(split_experts(AutoModelForCausalLM.from_pretrained(more, dtype=torch.float32), frozen=4))
    model = split_experts(AutoModelForCausalLM.from_pretrained(more, dtype=torch.float32), frozen=4)
    set_trainable(model, "post_pretrain")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.3)
    new_language = tokens(16, 6, seed=9)
    losses = []
    for _ in range(30):
        output = model(input_ids=new_language, output_router_logits=True)
        loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), new_language[:, 1:].flatten())
        losses.append(loss.item())
        (loss + 0.05 * balance_loss(output.router_logits, 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1
    assert frozen_digest(model) == before
    new_share = torch.stack([r.topk(2).indices >= 4 for r in output.router_logits]).float().mean()
    assert new_share > 0.1
    export_checkpoint(model, tmp_path / "out", side_files=more)
    extract_base(tmp_path / "out", tmp_path / "base")
    torch.testing.assert_close(logits(tmp_path / "base", new_language), logits(base, new_language), rtol=0, atol=1e-6)


def test_the_report_is_added_to_that_of_the_first_extension(extended):
    _, moe, more, _ = extended("qwen2")
    stored = json.loads((more / "upcycle.json").read_text())
    assert stored["experts"] == 6 and stored["extended"][0]["experts_before"] == [4, 4]
    assert stored["base_digest"] == json.loads((moe / "upcycle.json").read_text())["base_digest"]


def test_rows_fit_every_limit_that_can_be_fitted_and_are_short():
    torch.manual_seed(0)
    x = torch.randn(500, 16, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 1  # a direction that all tokens share: rows below any limit exist
    limit = torch.randn(500, dtype=torch.float64)
    row = shortest_row_below(x, limit)
    assert ((x @ row - limit) < 1e-3).all()
    assert torch.equal(shortest_row_below(x, limit.abs() + 1), torch.zeros(16, dtype=torch.float64))


def test_nothing_is_written_when_no_row_keeps_new_experts_out(extended, tmp_path):
    moe = extended("qwen2")[1]
    with pytest.raises(StepZeroError, match="of held-out tokens would choose a new expert"):
        extend_again(moe, tmp_path / "out", new_experts=1, calibration=tokens(20, 16), largest_share=0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, message", [({"new_experts": 0}, "choose 1 or more"), ({"calibration": tokens(8, 3)}, "4 or more")]
)
def test_bad_settings_are_refused(extended, tmp_path, settings, message):
    moe = extended("qwen2")[1]
    with pytest.raises(ValueError, match=message):
        extend_again(moe, tmp_path / "out", **{"new_experts": 1, "calibration": tokens(8, 4), **settings})
