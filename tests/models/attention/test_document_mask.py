"""Documents of a packed instance do not see each other, in any model, and what does not keep them apart leaks."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, masking_utils
from transformers.integrations import flex_attention as flex

from eclectus.models.attention.document_mask import within_documents
from eclectus.models.extension.lory import segment_prior_loss
from eclectus.models.extension.methods import open_method, open_review
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import lory, next_token, post_pretrain, review
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining.routing_profiles import routing_profiles
from eclectus.models.training.instances import IGNORED, Batch, Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from tests.support.dense_bases import BASES, SHAPE, VOCABULARY, tokens, write_base
from tests.support.tiny_training import plan, tiny_dense, write_instances

CPU = torch.device("cpu")
# Of two rows: the second has a document of one token, one that is longer than the sliding window, and padding.
DOCUMENTS = torch.tensor([[3] * 13 + [4] * 27, [7] * 9 + [8] + [9] * 22 + [-1] * 8])
FOUR = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*FOUR, "qwen2 sliding")
STAGES = ("post_pretrain", "review")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sliding = Qwen2Config(
        **SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASES, "qwen2 sliding", sliding)
        root = tmp_path_factory.mktemp("bases")
        for name in FAMILIES:
            write_base(root / name, name)
    for name in FOUR:
        upcycle(root / name, root / f"{name} moe", experts=4, init="noise", noise_scale=0.5)
    return root


def lory_model(dense=None, **changed):
    given = {"num_experts": 3, "segment_length": 8, "router_initializer_range": 2.0, "seed": 5, **changed}
    model = LoryForCausalLM.from_dense(dense or tiny_dense(), **given)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def models(folder, kind):
    stage, _, name = kind.partition(" ")
    if stage == "dense":
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    if stage == "lory":
        return lory_model(LlamaForCausalLM.from_pretrained(folder / "llama"), **({"routing": name} if name else {}))
    moe = folder / f"{name} moe"
    return (open_method("moe_lpr", moe) if stage == "post_pretrain" else open_review(moe)).eval()


KINDS = [
    *(f"dense {name}" for name in FAMILIES),
    *(f"{stage} {name}" for stage in STAGES for name in FOUR),
    "lory",
    "lory prefix",
]


@torch.no_grad()
def logits(model, ids, documents=DOCUMENTS, **more):
    with within_documents(model, documents, CPU):
        return model(input_ids=ids, use_cache=False, **more).logits


def largest_move(model, documents, **more):
    """Largest change of a logit of any other document when all tokens of the first one change, in each row."""
    ids = tokens()[:2]
    first = DOCUMENTS[:, :1] == DOCUMENTS
    changed = torch.where(first, (ids + 17) % VOCABULARY, ids)
    before, after = (logits(model, each, documents, **more) for each in (ids, changed))
    assert (after - before)[first].abs().max() > 1e-3
    return (after - before)[~first].abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_of_a_document_moves_when_another_changes(folder, kind):
    model = models(folder, kind)
    # Rows of an expert are multiplied together, and their number decides the kernel: the last bit, no more.
    assert largest_move(model, DOCUMENTS) <= (0 if kind.startswith(("dense", "lory")) else 2e-6)
    assert largest_move(model, None) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_from_a_document_to_another(folder, kind):
    model = models(folder, kind)
    embedded = model.get_input_embeddings()(tokens()[:2]).detach().requires_grad_()
    replaced = model.get_input_embeddings().register_forward_hook(lambda *_: embedded)
    with within_documents(model, DOCUMENTS, CPU):
        output = model(input_ids=tokens()[:2], use_cache=False).logits
    replaced.remove()
    last = DOCUMENTS == 4
    output[last].sin().sum().backward()
    assert embedded.grad[last].abs().max() > 0
    assert embedded.grad[~last].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_computes_what_it_computes_alone_wherever_it_stands(folder, kind):
    model, ids = models(folder, kind), tokens()[:2]
    packed = logits(model, ids)
    for row, number in ((0, 3), (0, 4), (1, 8), (1, 9)):
        here = DOCUMENTS[row] == number
        alone = logits(model, ids[row, here].unsqueeze(0), None)
        torch.testing.assert_close(packed[row, here], alone[0], rtol=1e-4, atol=2e-4)


def restarted():
    begins = DOCUMENTS.roll(1, 1) != DOCUMENTS
    begins[:, 0] = True
    columns = torch.arange(DOCUMENTS.shape[1]).expand(2, -1)
    return columns - torch.where(begins, columns, 0).cummax(1).values


@pytest.mark.parametrize("kind", ["dense llama", "dense mistral", "dense qwen3", "post_pretrain qwen2"])
def test_positions_that_restart_are_no_substitute(folder, kind):
    """transformers takes them for documents where no mask is given; collators give one, of ones."""
    model = models(folder, kind)
    given = {"position_ids": restarted(), "attention_mask": torch.ones_like(DOCUMENTS)}
    assert largest_move(model, None, **given) > 1e-2


def test_positions_that_restart_do_not_keep_lorys_routing_apart(folder):
    assert largest_move(models(folder, "lory"), None, position_ids=restarted()) > 1e-3


@pytest.mark.parametrize("routing", ["causal_segment", "prefix"])
@pytest.mark.parametrize("first_segment", ["stop_gradient", "uniform"])
def test_lory_has_the_gradients_of_its_documents_alone(routing, first_segment):
    model = lory_model(routing=routing, first_segment=first_segment).double()
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 3 + [1] * 19 + [2] * 2, [3] * 17 + [4] * 7])
    with within_documents(model, documents, CPU):
        model(input_ids=ids, use_cache=False).logits.sin().sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for number in range(5):
        alone = ids[documents == number].unsqueeze(0)
        model(input_ids=alone, use_cache=False).logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        # Rotary angles are computed in float32, and positions differ.
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_documents_of_one_segment_never_train_a_router():
    model, documents = lory_model(), torch.arange(24).div(8, rounding_mode="floor").expand(2, -1)
    with within_documents(model, documents, CPU):
        output = model(input_ids=torch.ones(2, 24, dtype=torch.int64), use_cache=False, output_router_weights=True)
    output.logits.sin().sum().backward()
    assert output.segments.tolist() == [[0] * 8 + [1] * 8 + [2] * 8, [3] * 8 + [4] * 8 + [5] * 8]
    assert [layer.shape for layer in output.router_weights] == [(1, 6, 3)] * 2
    assert all(layer.mlp.router.weight.grad.abs().max() == 0 for layer in model.model.layers)


def test_misuse_of_documents_is_refused(folder):
    model, ids = models(folder, "lory"), tokens()[:2]
    with pytest.raises(ValueError, match="documents are of whole rows: leave out attention_mask"):
        model(input_ids=ids, documents=DOCUMENTS, attention_mask=torch.ones_like(ids))
    dense = models(folder, "dense llama")
    dense.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="pack_document_mask needs attention that takes a mask, not flash_attention_2"):
        logits(dense, ids)


@pytest.mark.parametrize("kind", ["dense llama", "dense qwen2 sliding"])
def test_eager_and_flex_attention_give_the_logits_of_the_dense_mask(folder, kind, monkeypatch):
    # Not compiled: on a CPU torch 2.13 compiles flex attention with such masks to wrong numbers.
    monkeypatch.setattr(flex.WrappedFlexAttention, "__new__", lambda *_: lambda: flex.flex_attention)
    blocks = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda _compile, **given: blocks(**given))
    expected = logits(models(folder, kind), tokens()[:2])
    for attention in ("eager", "flex_attention"):
        model = models(folder, kind)
        model.set_attn_implementation(attention)
        torch.testing.assert_close(logits(model, tokens()[:2]), expected, rtol=1e-4, atol=1e-4)


class NoWaiting(TorchDispatchMode):
    """Refuses operators that a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dense llama", "dense mistral", "dense qwen2 sliding", "lory", "lory prefix"])
def test_a_pass_waits_for_no_device(folder, kind):
    model, ids = models(folder, kind), tokens()[:2]
    with within_documents(model, DOCUMENTS, CPU), NoWaiting():
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        ids.sum().item()


def test_no_token_is_predicted_from_another_document():
    ids = tokens()[:2]
    batch = Batch(ids, ids.masked_fill(DOCUMENTS < 0, IGNORED), ids, ids, DOCUMENTS).without_borders()
    targets = batch.labels[:, 1:] != IGNORED
    assert (targets == ((DOCUMENTS[:, 1:] == DOCUMENTS[:, :-1]) & (DOCUMENTS[:, 1:] >= 0))).all()
    assert torch.equal(batch.labels[:, 1:][targets], ids[:, 1:][targets])


@pytest.mark.parametrize("kind", ["dense qwen3", "lory", "post_pretrain llama", "review mistral"])
def test_an_objective_is_the_mean_over_the_targets_of_the_documents_alone(folder, kind):
    model, ids = models(folder, kind), tokens()[:2]
    same = torch.zeros_like(ids)
    objective = {
        "dense": next_token(["a"]),
        "lory": lory(["a"]),
        "post_pretrain": post_pretrain(0.01, 2, "paper"),
        "review": review(0.1, "paper", [0]),
    }[kind.split()[0]]
    batch = Batch(ids, ids.masked_fill(DOCUMENTS < 0, IGNORED), same, same, DOCUMENTS)
    masked = dataclasses.replace(objective, document_mask=True)
    _, terms = masked(model, batch.without_borders())
    losses = []
    for row, number in ((0, 3), (0, 4), (1, 7), (1, 9)):
        alone = ids[row, DOCUMENTS[row] == number]
        found = logits(model, alone.unsqueeze(0), None)[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(found, alone[1:], reduction="none"))
    torch.testing.assert_close(terms["next_token_loss"], torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


def test_training_with_the_mask_does_not_see_how_documents_are_packed(tmp_path):
    """Weights after training are the same where the two documents of every instance have changed places."""
    one, other = (write_instances(tmp_path / name, count=8) for name in ("one", "other"))
    flat = np.fromfile(one / "tokens.bin", np.uint16).reshape(8, 2, 12)
    flat[:, ::-1].tofile(other / "tokens.bin")
    spans = np.load(other / "spans.npy")
    spans[:, 3:] = 0
    for place in (one, other):
        np.save(place / "spans.npy", np.concatenate([spans, [[180, 12, 15, 0, 0]]]))

    def trained(place, **changed):
        model = tiny_dense()
        train(
            model, Instances(place), next_token(), plan(stop=4, **changed), Process(), tmp_path, lambda *_, **__: None
        )
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    masked = [trained(place, document_mask=True) for place in (one, other)]
    torch.testing.assert_close(masked[0], masked[1], rtol=0, atol=1e-5)
    assert (trained(one) - trained(other)).abs().max() > 1e-3


def test_the_profile_of_a_domain_is_the_mean_over_its_documents_alone(tmp_path):
    model, data = lory_model(), Instances(write_instances(tmp_path / "data", count=6))
    found = routing_profiles(model, data, 2, Process(), document_mask=True)["domain"]["a"]
    sums, batch = torch.zeros(2, 3), data.batch(np.arange(6))
    for ids in batch.tokens[:, :12].unsqueeze(1):
        weights = model(input_ids=ids, use_cache=False, output_router_weights=True).router_weights
        # Segments of 8 and of 4 tokens.
        sums += torch.stack([8 * layer[0, 0] + 4 * layer[0, 1] for layer in weights]).detach()
    torch.testing.assert_close(torch.tensor(found), sums / (6 * 12), rtol=1e-4, atol=1e-5)


def test_the_prior_of_packed_documents_weighs_segments_by_their_original_tokens():
    model, ids = lory_model(), torch.ones(2, 24, dtype=torch.int64)
    documents, original = (
        torch.arange(24).div(10, rounding_mode="floor").expand(2, -1),
        torch.arange(48).view(2, 24) < 15,
    )
    with within_documents(model, documents, CPU):
        output = model(input_ids=ids, use_cache=False, output_router_weights=True)
    found = segment_prior_loss(output.router_weights, original, 8, 1, output.segments)
    # The first segments: 8, 2 and 8 tokens, of which 5 are original.
    expected = [
        -(8 * layer[0, 0, 0].log() + 2 * layer[0, 1, 0].log() + 5 * layer[0, 2, 0].log()) / 15
        for layer in output.router_weights
    ]
    torch.testing.assert_close(found, torch.stack(expected).mean())
