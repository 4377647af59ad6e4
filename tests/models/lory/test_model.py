"""The Lory model: docs/methods.md 1.2, 1.3 and properties 1, 2 and 3 of its section 3."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models import LoryConfig, LoryForCausalLM
from eclectus.models.lory.dense import expand_dense_tensors
from eclectus.models.lory.merge import reference_merged_ffn
from eclectus.models.training.parallel import copy_shared_experts

T = 8
SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.15,
)


def lory(seed=0, **overrides):
    torch.manual_seed(seed)
    fields = {**SHAPE, "num_experts": 4, "segment_length": T, "router_initializer_range": 1.0, **overrides}
    return LoryForCausalLM(LoryConfig(**fields)).eval()


def llama(seed=0, **overrides):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **overrides})).eval()


def tokens(rows, length, seed=1):
    return torch.randint(2, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("routing", ["causal_segment", "prefix", "dense"])
@pytest.mark.parametrize("first_segment", ["stop_gradient", "uniform"])
def test_a_duplicated_dense_model_gives_the_dense_logits_for_any_router(tied, routing, first_segment):
    dense = llama(tie_word_embeddings=tied)
    ids = tokens(2, 3 * T + 3)
    for seed, spread in ((0, 0.02), (1, 5.0)):
        model = LoryForCausalLM.from_dense(dense, 4, T, spread, seed, routing=routing, first_segment=first_segment)
        assert (model(ids).logits - dense(ids).logits).abs().max() <= 1e-5
    torch.testing.assert_close(model(ids, labels=ids).loss, dense(ids, labels=ids).loss)


def test_duplication_copies_and_the_seed_decides_the_routers():
    dense = llama()
    before = copy.deepcopy(dense.state_dict())
    one, same, other = (LoryForCausalLM.from_dense(dense, 4, T, 0.3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.model.layers[0].mlp.router.weight, same.model.layers[0].mlp.router.weight)
    assert not torch.equal(one.model.layers[0].mlp.router.weight, other.model.layers[0].mlp.router.weight)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in before.items())


def straightforward_logits(model, ids):
    """A second implementation of docs/methods.md 1.1 and 1.2, one segment at a time, with stock attention."""
    twin = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(model.dtype)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if ".mlp." not in k}, strict=False)

    class SegmentFFN(nn.Module):
        def __init__(self, ffn):
            super().__init__()
            self.ffn = ffn

        def forward(self, x):
            output, previous = [], None
            for segment in x.split(T, dim=1):
                own = (segment.mean(dim=1) @ self.ffn.router.weight.t()).softmax(-1)
                used = own.detach() if previous is None else previous
                output.append(reference_merged_ffn(segment, used, self.ffn.experts))
                previous = own
            return torch.cat(output, dim=1)

    for layer, original in zip(twin.model.layers, model.model.layers, strict=True):
        layer.mlp = SegmentFFN(original.mlp)
    return twin(ids).logits


@pytest.mark.parametrize("length", [1, 3, T, T + 1, 3 * T, 3 * T + 5])
def test_equals_a_direct_implementation_in_values_and_gradients(length):
    model, ids = lory().double(), tokens(2, length)
    ours, reference = model(ids).logits, straightforward_logits(model, ids)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    names = [name for name, _ in model.named_parameters() if ".mlp." in name]
    parameters = [model.get_parameter(name) for name in names]
    a = torch.autograd.grad(ours.sin().sum(), parameters, allow_unused=True)
    b = torch.autograd.grad(reference.sin().sum(), parameters, allow_unused=True)
    for name, x, y in zip(names, a, b, strict=True):
        if length <= T and "router" in name:
            assert y is None and (x is None or x.abs().max() == 0)
        elif y is not None:
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("routing", ["causal_segment", "prefix"])
def test_a_change_in_a_later_segment_changes_nothing_before_it(routing):
    model, ids = lory(routing=routing).double(), tokens(1, 4 * T)
    before = model(ids).logits
    for position in (T, 2 * T + 3, 4 * T - 1):
        edited = ids.clone()
        edited[0, position] = (edited[0, position] + 7) % SHAPE["vocab_size"]
        moved = (model(edited).logits - before).abs().amax(dim=(0, 2))
        assert moved[:position].max() == 0
        assert moved[position] > 1e-6


def test_the_papers_first_segment_looks_ahead_and_the_uniform_one_does_not():
    model, ids = lory().double(), tokens(1, 2 * T)
    edited = ids.clone()
    edited[0, T - 1] = (edited[0, T - 1] + 7) % SHAPE["vocab_size"]
    for first_segment, looks_ahead in (("stop_gradient", True), ("uniform", False)):
        moved = model(edited, first_segment=first_segment).logits - model(ids, first_segment=first_segment).logits
        assert (moved[:, : T - 1].abs().max() > 1e-6) == looks_ahead
    model.config.first_segment = "uniform"
    assert torch.equal(model(ids).logits, model(ids, first_segment="uniform").logits)


@pytest.mark.parametrize("first_segment", ["stop_gradient", "uniform"])
def test_the_first_segments_loss_gives_the_router_no_gradient_and_the_seconds_does(first_segment):
    model, ids = lory(first_segment=first_segment), tokens(2, 3 * T)
    logits = model(ids).logits
    routers = [layer.mlp.router.weight for layer in model.model.layers]
    first = torch.autograd.grad(logits[:, :T].square().sum(), routers, retain_graph=True, allow_unused=True)
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in first)
    # Through attention the first layer's router also serves later segments, so both routers get gradients.
    later = torch.autograd.grad(logits[:, T:].square().sum(), routers)
    assert all(gradient.abs().max() > 0 for gradient in later)


def test_the_last_segments_weights_are_never_used():
    model, ids = lory(), tokens(1, 2 * T)
    outputs = model(ids, output_router_weights=True)
    gradients = torch.autograd.grad(outputs.logits.square().sum(), outputs.router_weights)
    for gradient in gradients[-1:]:
        assert gradient[:, 0].abs().max() > 0
        assert gradient[:, 1].abs().max() == 0


def test_experts_diverge_from_copies_and_stay_equal_under_a_constant_router():
    ids = tokens(4, 3 * T)
    for spread, parts in ((0.3, True), (0.0, False)):
        model = LoryForCausalLM.from_dense(llama(), 4, T, spread, seed=0).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        experts = model.model.layers[1].mlp.experts
        assert ((experts - experts.mean(0)).abs().max().item() > 1e-4) == parts


def test_router_weights_are_each_segments_own_softmax():
    ids = tokens(2, 2 * T + 3)
    outputs = lory()(ids, output_router_weights=True)
    assert [weights.shape for weights in outputs.router_weights] == [(2, 3, 4)] * 2
    torch.testing.assert_close(outputs.router_weights[0].sum(-1), torch.ones(2, 3))
    assert lory()(ids).router_weights is None


@pytest.mark.parametrize("first_segment", ["stop_gradient", "uniform"])
def test_right_padding_changes_no_real_tokens_logits(first_segment):
    model = lory(first_segment=first_segment)
    lengths = (3 * T + 2, T, 5)
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.zeros(3, max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, :length], mask[row, :length] = own, 1
    logits = model(ids, attention_mask=mask).logits
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        torch.testing.assert_close(logits[row, :length], model(own).logits[0], rtol=1e-4, atol=1e-5)


def test_left_padding_changes_no_real_tokens_logits():
    model = lory()
    lengths = (3 * T + 2, 2 * T, 5)
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.zeros(3, max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, -length:], mask[row, -length:] = own, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        torch.testing.assert_close(logits[row, -length:], model(own).logits[0], rtol=1e-4, atol=1e-5)


def test_rows_of_padding_alone_make_no_nan_in_logits_or_gradients():
    model, ids = lory().train(), tokens(2, 2 * T + 1)
    mask = torch.ones_like(ids)
    mask[1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = tokens(2, 3 * T)
    gradients = []
    for checkpointing in (False, True):
        model = lory().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_autocast_stays_close_to_fp32():
    model, ids = lory(), tokens(2, 3 * T)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids).logits
    assert (half.float() - exact).norm() < 0.05 * exact.norm()


def test_one_expert_is_a_stock_llama_in_logits_and_gradients():
    dense, ids = llama(), tokens(2, 2 * T + 1)
    model = LoryForCausalLM.from_dense(dense, 1, T)
    assert model.model.layers[0].mlp.router is None
    model(ids, labels=ids).loss.backward()
    dense(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)
    expected = expand_dense_tensors({name: p.grad for name, p in dense.named_parameters()}, 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_expert_map_carries_adamw_moments_so_that_the_next_step_is_the_dense_models():
    dense, ids = llama().train(), tokens(4, 3 * T)
    dense_optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    for _ in range(3):
        dense(ids, labels=ids).loss.backward()
        dense_optimizer.step()
        dense_optimizer.zero_grad()
    model = LoryForCausalLM.from_dense(dense, 4, T, 1e-9, seed=0)
    for name, sources in model.expert_parameter_map().items():
        gate, up, down = (dense.get_parameter(source) for source in sources)
        for expert in model.get_parameter(name):
            assert torch.equal(expert, torch.cat([gate, up, down.t()]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    states = {name: dense_optimizer.state[p] for name, p in dense.named_parameters()}
    first = expand_dense_tensors({name: s["exp_avg"] for name, s in states.items()}, 4, scale=1 / 4)
    second = expand_dense_tensors({name: s["exp_avg_sq"] for name, s in states.items()}, 4, scale=1 / 16)
    for name, parameter in model.named_parameters():
        if name in first:
            optimizer.state[parameter] = dict(step=torch.tensor(3.0), exp_avg=first[name], exp_avg_sq=second[name])
    for one, stepper in ((dense, dense_optimizer), (model, optimizer)):
        one(ids, labels=ids).loss.backward()
        stepper.step()
    expected = expand_dense_tensors(dict(dense.named_parameters()), 4)
    for name, parameter in model.named_parameters():
        if "router" not in name:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)


def test_experts_share_the_memory_of_one_until_they_are_copied():
    dense = llama()
    parted, shared = (LoryForCausalLM.from_dense(dense, 4, T, shared_memory=each) for each in (False, True))
    for name, sources in shared.expert_parameter_map().items():
        one = sum(dense.get_parameter(source).nbytes for source in sources)
        assert shared.get_parameter(name).untyped_storage().nbytes() == one
        assert parted.get_parameter(name).untyped_storage().nbytes() == 4 * one
    copy_shared_experts(shared)
    for (name, parameter), own in zip(shared.named_parameters(), parted.parameters(), strict=True):
        assert parameter.is_contiguous()
        assert torch.equal(parameter, own), name


def test_every_parameter_gets_a_gradient_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, ids = DistributedDataParallel(lory().train()), tokens(2, 2 * T)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_torch_compile_agrees_without_a_graph_break_inside_the_layers():
    torch.compiler.reset()
    model, ids = lory(num_hidden_layers=1).train(), tokens(2, 2 * T)
    expected = model(ids, labels=ids).loss
    expected_gradient = torch.autograd.grad(expected, model.model.layers[0].mlp.experts)[0]
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, model.model.layers[0].mlp.experts)[0], expected_gradient)


@pytest.mark.parametrize("name", ["laptop", "30m", "100m", "0.3b", "1.5b"])
def test_presets_have_the_sizes_that_their_names_say(name):
    totals = {}
    for experts in (1, 8):
        with torch.device("meta"):
            totals[experts] = LoryForCausalLM(LoryConfig.preset(name, num_experts=experts)).num_parameters()
    expected = {"30m": (30e6, None), "100m": (102e6, None), "0.3b": (0.37e9, 1.8e9), "1.5b": (1.46e9, 7.8e9)}
    active, total = expected.get(name, (0.46e6, None))
    assert totals[1] == pytest.approx(active, rel=0.05)
    assert total is None or totals[8] == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(routing="top_k"), "routing is 'top_k', but must be one of 'causal_segment', 'prefix', 'dense'"),
        (dict(first_segment="none"), "first_segment is 'none'.*'stop_gradient', 'uniform'"),
        (dict(generation_routing="token"), "generation_routing is 'token'.*'prompt', 'segment'"),
        (dict(num_experts=0), "num_experts is 0"),
        (dict(segment_length=0), "segment_length is 0"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    ],
)
def test_an_invalid_setting_is_named_with_its_choices(fields, message):
    with pytest.raises(ValueError, match=message):
        LoryConfig(**fields)


def test_an_input_without_a_token_is_refused():
    with pytest.raises(ValueError, match="has no token"):
        lory()(tokens(1, 0))


def test_choices_are_checked_again_when_the_model_runs():
    model, ids = lory(), tokens(1, 3)
    with pytest.raises(ValueError, match="first_segment is 'odd'"):
        model(ids, first_segment="odd")
    model.config.routing = "odd"
    with pytest.raises(ValueError, match=r"routing is 'odd'.*'prefix'"):
        model(ids)
    with pytest.raises(ValueError, match=r"preset is 'huge'.*'laptop'"):
        LoryConfig.preset("huge")


def test_a_saved_model_loads_bit_for_bit(tmp_path):
    model, ids = lory(tie_word_embeddings=True, routing="prefix", first_segment="uniform"), tokens(2, 3 * T)
    model.save_pretrained(tmp_path)
    again = LoryForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict().items() >= {"routing": "prefix", "segment_length": T}.items()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_checkpoint_of_another_config_or_architecture_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"model_type 'llama', expected 'lory'.*from_dense"):
        LoryForCausalLM.from_pretrained(tmp_path / "llama")
    lory().save_pretrained(tmp_path / "lory")
    path = tmp_path / "lory" / "config.json"
    for change in (dict(num_experts=8), dict(num_hidden_layers=3), dict(num_hidden_layers=1)):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match="do not fit its configuration"):
            LoryForCausalLM.from_pretrained(tmp_path / "lory")


def cut(content):
    return content[:-100]


def header_that_claims_more(content):
    return (10**9).to_bytes(8, "little") + content[8:]


def header_of_another_shape(content):
    return content.replace(b'"shape":[4,120,32]', b'"shape":[4,120,33]', 1)


def tensor_of_another_name(content):
    return content.replace(b"model.layers.0.mlp.experts", b"model.layers.7.mlp.experts", 1)


@pytest.mark.parametrize("damage", [cut, header_that_claims_more, header_of_another_shape, tensor_of_another_name])
def test_a_truncated_or_tampered_checkpoint_is_refused_by_name(tmp_path, damage):
    lory().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(damage(content))
    assert weights.read_bytes() != content
    with pytest.raises(ValueError, match=rf"{tmp_path}.*(damaged or cut short|do not fit its configuration)"):
        LoryForCausalLM.from_pretrained(tmp_path)
