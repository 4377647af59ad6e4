"""Document pools (EMO): against a brute-force reference, within the pools, and causal when scored."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from eclectus.models.losses.objectives import balanced
from eclectus.models.losses.step import Pass, Step
from eclectus.models.pretraining.baselines import top_k_from_dense
from eclectus.models.pretraining.document_pools import (
    DocumentPoolConfig,
    PoolBalance,
    document_pools_from_dense,
    pool_sizes,
    pooled,
)
from eclectus.models.training.flops import count_flops
from eclectus.models.training.instances import IGNORED, Batch
from eclectus.models.training.process import Process
from tests.support.tiny_training import SHAPE

END = 2
COPIES, K = 4, 2
E = COPIES * K
# Two rows of several documents of uneven length; one goes on in the second row; padding at the end.
DOCUMENTS = torch.tensor([[7] * 5 + [3] * 12 + [4] * 7, [3] * 6 + [9] * 14 + [-1] * 4])
LENGTH = DOCUMENTS.shape[1]


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=END)).eval()


def perturbed(dense, pool_size, **changes):
    """A model whose routers and experts are no longer those of the start."""
    model = document_pools_from_dense(dense, COPIES, K, pool_size, router_initializer_range=1.0, **changes).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(seed=1):
    """Tokens that end with END where a document ends, and nowhere else."""
    ids = torch.randint(3, SHAPE["vocab_size"], DOCUMENTS.shape, generator=torch.Generator().manual_seed(seed))
    ends = F.pad(DOCUMENTS[:, 1:] != DOCUMENTS[:, :-1], (0, 1))
    return ids.masked_fill(ends, END)


def batch_of():
    labels = tokens().masked_fill(DOCUMENTS < 0, IGNORED)
    nothing = torch.zeros_like(labels)
    return Batch(tokens(), labels, nothing, nothing, DOCUMENTS)


def routed(model, **given):
    """By layer, the router's (input, weights, experts) of one pass."""
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda gate, args, out: seen.append((gate, args[0].detach(), *out)))
        for layer in model.model.layers
    ]
    model(input_ids=tokens(), **given)
    for hook in hooks:
        hook.remove()
    return seen


def by_brute_force(gate, hidden, size, causal):
    """Weights [n, E] by loops over tokens: the pool, then the best K in it, renormalised; float64."""
    probabilities = torch.softmax(hidden.double() @ gate.weight.double().t(), -1).view(2, LENGTH, E)
    weights = torch.zeros(2, LENGTH, E, dtype=torch.float64)
    for row in range(2):
        for at in range(LENGTH):
            mates = [t for t in range(LENGTH) if DOCUMENTS[row, t] == DOCUMENTS[row, at] and (t <= at or not causal)]
            mean = probabilities[row, mates].mean(0)
            pool = set(sorted(range(E), key=lambda e: -mean[e])[:size])
            best = sorted(pool, key=lambda e: -probabilities[row, at, e])[:K]
            total = sum(probabilities[row, at, e] for e in best)
            for e in best:
                weights[row, at, e] = probabilities[row, at, e] / total
    return weights.flatten(0, 1)


@pytest.mark.parametrize(("size", "causal"), [(2, False), (4, False), (6, False), (2, True), (4, True)])
def test_tokens_choose_as_a_loop_over_documents_does(dense, size, causal):
    model = perturbed(dense, size)
    model.config.selection = "causal" if causal else "document"
    real = (DOCUMENTS >= 0).flatten()
    layers = routed(model, documents=DOCUMENTS)
    assert len(layers) == SHAPE["num_hidden_layers"]
    for gate, hidden, _, weights, chosen in layers:
        ours = torch.zeros(len(weights), E).scatter(1, chosen, weights)
        expected = by_brute_force(gate, hidden, size, causal)
        torch.testing.assert_close(ours[real].double(), expected[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_the_tokens_of_a_document_never_leave_its_pool_and_documents_differ(dense, size):
    found = set()
    for _, _, _, _, chosen in routed(perturbed(dense, size), documents=DOCUMENTS):
        for row in range(2):
            for document in DOCUMENTS[row].unique().tolist():
                mine = chosen.view(2, LENGTH, K)[row][DOCUMENTS[row] == document]
                used = frozenset(mine.flatten().tolist())
                assert len(used) <= size
                found.add(used)
    assert len(found) > 2


def test_documents_are_told_apart_by_end_of_document_tokens_too(dense):
    model = perturbed(dense, 4)
    whole = DOCUMENTS.clone()
    whole[1, 20:] = 11  # a document of its own, as without padding
    told, read = model(input_ids=tokens(), documents=whole).logits, model(input_ids=tokens()).logits
    assert torch.equal(told, read)
    other = model(input_ids=tokens(), documents=torch.zeros_like(DOCUMENTS)).logits
    assert (told - other).abs().max() > 1e-3


def test_a_pool_of_all_experts_is_the_plain_top_k_model(dense):
    model = perturbed(dense, E)
    plain = top_k_from_dense(dense, COPIES, K)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids=tokens()).logits, plain.eval()(input_ids=tokens()).logits)
    random = perturbed(dense, 0)
    random.config.selection = "causal"
    assert torch.equal(random(input_ids=tokens()).logits, model(input_ids=tokens()).logits), "as the paper scores"


@pytest.mark.parametrize("size", [0, 2, 4, E])
def test_it_starts_as_the_dense_model_whatever_the_pool(dense, size):
    model = document_pools_from_dense(dense, COPIES, K, size, router_initializer_range=0.3).eval()
    for selection in ("document", "causal"):
        model.config.selection = selection
        for given in ({}, {"documents": DOCUMENTS}):
            made = model(input_ids=tokens(), **given).logits
            torch.testing.assert_close(made, dense(input_ids=tokens()).logits, rtol=1e-5, atol=1e-5)


def moved(model, changed_at):
    edited = tokens()
    edited[:, changed_at:] = (edited[:, changed_at:] - 3 + 7) % (SHAPE["vocab_size"] - 3) + 3
    return (model(input_ids=tokens()).logits - model(input_ids=edited).logits)[:, :changed_at].abs().max().item()


def test_the_pool_of_a_whole_document_looks_ahead_and_scoring_does_not(dense):
    model = perturbed(dense, 4)
    assert moved(model, 12) > 1e-3
    model.config.selection = "causal"
    assert moved(model, 12) == 0


def test_sizes_are_drawn_evenly_and_again_the_same(dense):
    model = perturbed(dense, 0)
    sizes = pool_sizes(model.config, torch.arange(100_000))
    values, counts = sizes.unique(return_counts=True)
    assert values.tolist() == [2, 4, 6, 8]
    assert (counts / len(sizes) - 0.25).abs().max() < 0.01
    assert abs(torch.corrcoef(torch.stack([sizes[:-1], sizes[1:]]).float())[0, 1]) < 0.05, "neighbours are unrelated"
    assert torch.equal(pool_sizes(model.config, torch.arange(100_000)), sizes)


def test_balance_counts_actual_choices_and_reaches_experts_outside_every_pool(dense):
    model, batch = perturbed(dense, 2).train(), batch_of()
    output = model(input_ids=batch.tokens, documents=batch.documents, output_router_logits=True)
    real = (batch.labels != IGNORED).flatten()
    chosen = torch.cat([found[4][real] for found in routed(model, documents=DOCUMENTS)])
    share = torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()
    mean = torch.cat([logits.softmax(-1)[real] for logits in output.router_logits]).mean(0)
    done, loss = Pass(batch, output, model.config), PoolBalance()
    balance, _ = loss.measure(done, loss.statistic(done))
    torch.testing.assert_close(balance, E * K * (share * mean).sum())
    gradient = torch.autograd.grad(balance, output.router_logits[0])[0][real]
    assert (gradient.sum(0)[share < 0.01] < 0).all() or (share >= 0.01).all(), "unused experts gain"


@pytest.mark.parametrize("size", [0, 4])
def test_the_gradient_of_a_step_does_not_depend_on_how_it_is_cut(dense, size):
    """Rows of unequal padding, one of whose documents stands in both; pools and shares of choices are those of all."""
    model, whole, found = perturbed(dense.double(), size).double().train(), batch_of(), []
    # Grouped products of this torch have no float64.
    model.set_experts_implementation("eager")
    fields = [getattr(whole, name) for name in whole.__dataclass_fields__]
    rows = [Batch(*(each[row : row + 1] for each in fields)) for row in range(2)]
    for batches in ([whole], rows, rows[::-1]):
        parts = Step(pooled(), batches, Process())
        parts.survey(model)
        for number in range(len(batches)):
            parts.measure(model, number)[0].backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        model.zero_grad()
    for each in found[1:]:
        assert (each - found[0]).norm() / found[0].norm() < 1e-6


def test_without_a_restriction_the_objective_is_that_of_top_k(dense):
    model = perturbed(dense, E).train()
    plain = top_k_from_dense(dense, COPIES, K).train()
    plain.load_state_dict(model.state_dict())
    labels = tokens()
    nothing = torch.zeros_like(labels)
    batch = Batch(labels, labels, nothing, nothing, DOCUMENTS.clamp(min=0))
    ours, _ = pooled()(model, batch)
    theirs, _ = balanced()(plain, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gradient_reaches_routers_and_experts_and_the_count_is_that_of_top_k(dense):
    model = perturbed(dense, 4).train()
    loss, _ = pooled()(model, batch_of())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    assert count_flops(model, 2, LENGTH) == count_flops(top_k_from_dense(dense, COPIES, K), 2, LENGTH)


def test_it_survives_saving_and_shows_what_was_chosen_from(dense, tmp_path):
    model = perturbed(dense, 4)
    model.config.selection = "causal"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.pool_size == 4
    output = again(input_ids=tokens(), output_router_logits=True)
    assert torch.equal(output.logits, model(input_ids=tokens()).logits)
    for logits in output.router_logits:
        assert ((logits > -torch.inf).sum(-1) == 4).all()


def test_generation_reads_the_whole_text_and_a_cache_is_refused(dense):
    model = perturbed(dense, 4)
    model.config.selection = "causal"
    prompt = tokens()[:1, :8]
    settings = GenerationConfig(max_new_tokens=6, eos_token_id=-1, pad_token_id=0, do_sample=False)
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    for at in range(8, 14):
        assert model(input_ids=written[:, :at]).logits[0, -1].argmax() == written[0, at]
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=prompt, past_key_values=cache, use_cache=True)


def test_pools_that_do_not_fit_are_refused(dense):
    with pytest.raises(ValueError, match="pool_size is 3: with FFNs cut into 2 it must be a multiple"):
        document_pools_from_dense(dense, COPIES, K, 3)
    with pytest.raises(ValueError, match="pool_size is 10, but must be 0 or 2 to 8"):
        document_pools_from_dense(dense, COPIES, K, 10)
    with pytest.raises(ValueError, match="selection is 'later'"):
        DocumentPoolConfig(selection="later")
