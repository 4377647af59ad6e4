"""Similarity by layer against a direct computation; proposals within the budget."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from eclectus.models.mixture.layer_similarity import ffn_input_means, layer_similarity, propose_experts
from tests.support.dense_bases import tokens, write_base


@pytest.mark.parametrize("name", ["llama tied", "qwen3"])
def test_means_are_those_of_what_each_ffn_reads(tmp_path, name):
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path / "base", name), dtype=torch.float32)
    samples = {"en": tokens(rows=5), "tr": tokens(rows=3, seed=2)}
    means = ffn_input_means(model, samples, batch=2)
    read = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(samples["en"])
    assert means["en"].shape == (2, 32)
    torch.testing.assert_close(means["en"][1], read[0].mean((0, 1)), rtol=1e-4, atol=1e-5)
    expected = cosine_similarity(means["en"], means["tr"], dim=-1).tolist()
    assert layer_similarity(means, ["en"], ["tr"]) == pytest.approx(expected)


def test_similarity_averages_over_pairs_of_a_known_and_a_new_language():
    means = {"en": torch.tensor([[1.0, 0.0]]), "el": torch.tensor([[0.0, 2.0]]), "tr": torch.tensor([[3.0, 0.0]])}
    assert layer_similarity(means, ["en"], ["el", "tr"]) == pytest.approx([0.5])


@pytest.mark.parametrize("similarity", [[0.9, 0.5, 0.2, 0.6], [0.99, 0.99, 0.01, 0.9], [-0.2, 0.5, 0.7], [0.3] * 5])
@pytest.mark.parametrize("budget", [5, 8, 21])
def test_proposals_spend_the_budget_where_languages_differ(similarity, budget):
    counts = propose_experts(similarity, budget)
    assert sum(counts) == budget and min(counts) >= 1
    by_similarity = [count for _, count in sorted(zip(similarity, counts, strict=True))]
    assert all(a >= b - 1 for a, b in pairwise(by_similarity))


def test_shares_are_in_inverse_proportion_to_similarity():
    assert propose_experts([0.8, 0.4, 0.2], 14) == [2, 4, 8]


def test_bad_budgets_and_languages_are_refused():
    with pytest.raises(ValueError, match="less than one for each of 3 layers"):
        propose_experts([0.5] * 3, 2)
    means = {"en": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="no sample of language 'tr'"):
        layer_similarity(means, ["en"], ["tr"])
    with pytest.raises(ValueError, match="known and as a new"):
        layer_similarity(means, ["en"], ["en"])
