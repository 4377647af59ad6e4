"""The training form: the stock function, gradients only where needed, originals always bit-identical."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from eclectus.models.checkpoints.families import FAMILIES
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.losses.router_losses import balance_loss, language_prior_loss
from eclectus.models.mixture.experts import (
    MoeTensors,
    SplitExperts,
    frozen_digest,
    join_experts,
    moe_blocks,
    original_digest,
    set_trainable,
    split_experts,
)
from eclectus.models.mixture.grouped_gemm import _side_by_side
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import BASES, tokens, write_base

FOUR = ("llama", "mistral", "qwen2", "qwen3 tied")


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    """Name of a base to (base directory, upcycled directory, report), made once each."""
    made = {}

    def make(name, **settings):
        key = (name, *sorted(settings.items()))
        if key not in made:
            root = tmp_path_factory.mktemp("upcycled")
            base = write_base(root / "base", name)
            # Noise, so that experts differ and routing matters.
            report = upcycle(base, root / "moe", **{"experts": 4, "init": "noise", "noise_scale": 0.5, **settings})
            made[key] = base, root / "moe", report
        return made[key]

    return make


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def random_mixtral(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**shape, **heads, **changes}))


def train(model, steps=4, **optimizer):
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, **{"lr": 0.05, "weight_decay": 0.3, **optimizer})
    for step in range(steps):
        batch = tokens(seed=step)
        out = model(input_ids=batch, output_router_logits=True)
        original = batch.reshape(-1) % 2 == 0
        loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss = loss + 0.01 * balance_loss(out.router_logits, 2) + 0.1 * language_prior_loss(out.router_logits, original)
        adamw.zero_grad()
        loss.backward()
        adamw.step()


@pytest.mark.parametrize("name", BASES)
def test_splitting_keeps_the_function_and_joining_keeps_every_bit(upcycled, name):
    model = load(upcycled(name)[1])
    before, weights = model(tokens()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    split_experts(model)
    torch.testing.assert_close(model(tokens()).logits, before, rtol=0, atol=1e-6)
    join_experts(model)
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[k], weights[k]) for k in weights)
    assert type(next(moe_blocks(model))[1].experts) is type(next(moe_blocks(load(upcycled(name)[1])))[1].experts)


@pytest.mark.parametrize("frozen", [1, 3])
@pytest.mark.parametrize("sizes", [(32, 48), (38, 42)], ids=["aligned", "misaligned"])
def test_gradients_equal_those_of_the_stock_model(frozen, sizes):
    stock = random_mixtral(
        hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=1, num_key_value_heads=1
    )
    stock.config._experts_implementation = "eager"
    split = split_experts(copy.deepcopy(stock), frozen)
    set_trainable(split, "post_pretrain")
    for model in (stock, split):
        out = model(tokens(), labels=tokens())
        out.loss.backward()
    for (_, ours), (_, theirs) in zip(moe_blocks(split), moe_blocks(stock), strict=True):
        torch.testing.assert_close(ours.gate.weight.grad, theirs.gate.weight.grad, rtol=1e-4, atol=1e-7)
        expected = theirs.experts.gate_up_proj.grad[frozen:], theirs.experts.down_proj.grad[frozen:]
        torch.testing.assert_close(ours.experts.new_gate_up.grad, expected[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours.experts.new_down.grad, expected[1], rtol=1e-4, atol=1e-7)
        assert ours.experts.frozen_gate_up.grad is None and ours.experts.frozen_down.grad is None


def test_in_fp64_logits_and_gradients_equal_those_of_the_stock_model():
    stock = random_mixtral().double()
    stock.config._experts_implementation = "eager"
    split = split_experts(copy.deepcopy(stock), 2)
    set_trainable(split, "all")
    found = []
    for model in (stock, split):
        logits = model(tokens()).logits
        assert logits.dtype == torch.float64
        cross_entropy(logits.flatten(0, 1), tokens().flatten()).backward()
        found.append(logits.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    for (_, ours), (_, theirs) in zip(moe_blocks(split), moe_blocks(stock), strict=True):
        for matrix in ("gate_up", "down"):
            parts = (getattr(ours.experts, f"{part}_{matrix}").grad for part in ("frozen", "new"))
            expected = getattr(theirs.experts, f"{matrix}_proj").grad
            torch.testing.assert_close(torch.cat(list(parts)), expected, rtol=1e-10, atol=1e-14)


def test_all_trained_gives_the_original_experts_their_gradients_too():
    stock = random_mixtral()
    split = split_experts(copy.deepcopy(stock), 2)
    assert len(set_trainable(split, "all")) == len(list(split.parameters()))
    for model in (stock, split):
        model(tokens(), labels=tokens()).loss.backward()
    for (_, ours), (_, theirs) in zip(moe_blocks(split), moe_blocks(stock), strict=True):
        both = torch.cat([ours.experts.frozen_down.grad, ours.experts.new_down.grad])
        torch.testing.assert_close(both, theirs.experts.down_proj.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", FOUR)
def test_post_pretraining_changes_new_experts_and_routers_only(upcycled, name):
    base, moe, report = upcycled(name)
    model = split_experts(load(moe))
    trained = set(set_trainable(model, "post_pretrain"))
    assert all("new_" in n or "gate.weight" in n for n in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model)
    for name_, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name_]) == (name_ not in trained), name_
    assert frozen_digest(model) == report.base_digest
    with CheckpointReader(base) as dense:
        for stored in dense.specs:
            family = FAMILIES[report.base_model_type]
            if ".mlp." not in stored:
                assert torch.equal(MoeTensors(model).tensor(family.stored_name(stored)), dense.tensor(stored))


@pytest.mark.parametrize("name", FOUR)
def test_review_changes_routers_only_and_computes_no_expert_gradient(upcycled, name):
    model = split_experts(load(upcycled(name)[1]))
    set_trainable(model, "post_pretrain")
    train(model)
    trained = set(set_trainable(model, "review"))
    assert trained == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    for parameter in model.parameters():
        parameter.grad = None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model)
    for name_, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name_]) == (name_ not in trained), name_
        assert (parameter.grad is None) == (name_ not in trained), name_
    assert frozen_digest(model) == upcycled(name)[2].base_digest


def test_review_keeps_no_expert_inputs_for_backward():
    model = split_experts(random_mixtral())
    kept = {}
    for stage in ("post_pretrain", "review"):
        set_trainable(model, stage)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(tokens())
        kept[stage] = sum(sizes)
    assert kept["review"] < kept["post_pretrain"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_experts_survive_an_optimizer_given_every_parameter(optimizer):
    model = split_experts(random_mixtral(), 2)
    set_trainable(model, "post_pretrain")
    digest = frozen_digest(model)
    chosen = optimizer(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        model(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        chosen.step()
    assert frozen_digest(model) == digest


def test_experts_without_tokens_get_a_zero_gradient():
    experts = next(moe_blocks(split_experts(random_mixtral())))[1].experts
    x_TH, chosen_TK = torch.randn(12, 32), torch.tensor([[0, 3]] * 12)
    experts(x_TH, chosen_TK, torch.full((12, 2), 0.5)).square().sum().backward()
    for gradient in (experts.new_gate_up.grad, experts.new_down.grad):
        assert [bool(g.any()) for g in gradient] == [False, False, True, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_logits_are_raw_and_carry_gradients_with_and_without_checkpointing(checkpointing):
    torch.manual_seed(0)
    model = split_experts(random_mixtral())
    set_trainable(model, "review")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    seen = []
    hooks = [
        b.gate.register_forward_hook(lambda m, a, _: seen.append(a[0].detach() @ m.weight.detach().T))
        for _, b in moe_blocks(model)
    ]
    out = model(tokens(), output_router_logits=True)
    for hook in hooks:
        hook.remove()
    assert len(out.router_logits) == 2 and out.router_logits[0].shape == (tokens().numel(), 5)
    for raw, logits in zip(seen, out.router_logits, strict=True):
        torch.testing.assert_close(logits, raw.reshape(logits.shape))
    language_prior_loss(out.router_logits, tokens() >= 0).backward()
    gradient = [b.gate.weight.grad for _, b in moe_blocks(model)]
    assert all(g is not None and g.abs().sum() > 0 for g in gradient)
    if checkpointing:
        plain = split_experts(random_mixtral())
        set_trainable(plain, "review")
        language_prior_loss(plain(tokens(), output_router_logits=True).router_logits, tokens() >= 0).backward()
        for g, (_, block) in zip(gradient, moe_blocks(plain), strict=True):
            torch.testing.assert_close(g, block.gate.weight.grad)


def test_upcycled_models_add_no_auxiliary_loss_of_their_own(upcycled):
    model = split_experts(load(upcycled("llama")[1]))
    plain = model(tokens(), labels=tokens()).loss
    assert torch.equal(model(tokens(), labels=tokens(), output_router_logits=True).loss, plain)


def test_autocast_to_bf16_keeps_fp32_gradients_near_the_exact_ones():
    gradients = {}
    for enabled in (False, True):
        model = split_experts(random_mixtral())
        set_trainable(model, "post_pretrain")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        experts = next(moe_blocks(model))[1].experts
        assert experts.new_gate_up.grad.dtype == torch.float32
        gradients[enabled] = experts.new_down.grad
    error = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert 0 < error < 0.05


def test_the_grouped_gemm_reads_new_and_frozen_experts_in_place():
    model = split_experts(random_mixtral(), 2)

    def in_place(experts):
        both = _side_by_side(experts.new_down, experts.frozen_down, experts.new_down.dtype)
        assert torch.equal(both, torch.cat([experts.new_down, experts.frozen_down]))
        return both.data_ptr() == experts.new_down.data_ptr()

    experts = next(moe_blocks(model))[1].experts
    assert in_place(experts)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    assert in_place(experts)
    expected = model(tokens()).logits
    model.double().float()
    assert in_place(experts)
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(tokens()).logits, expected)


def test_a_split_state_dict_resumes_bit_for_bit(upcycled):
    model = split_experts(load(upcycled("qwen2")[1]))
    set_trainable(model, "post_pretrain")
    train(model, steps=2)
    state = copy.deepcopy(model.state_dict())
    resumed = split_experts(load(upcycled("qwen2")[1]))
    resumed.load_state_dict(state)
    assert torch.equal(resumed(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", FOUR)
def test_the_digest_is_the_bases_own_in_every_layout_and_width(tmp_path, name):
    base = write_base(tmp_path / "base", name, torch.bfloat16)
    report = upcycle(base, tmp_path / "moe", experts=3)
    family, tied = FAMILIES[report.base_model_type], bool(BASES[name].tie_word_embeddings)
    for directory in (base, tmp_path / "moe"):
        with CheckpointReader(directory) as source:
            assert original_digest(source, family, tied) == report.base_digest
    model = load(tmp_path / "moe")
    assert frozen_digest(model) == report.base_digest
    assert frozen_digest(split_experts(model)) == report.base_digest
    next(moe_blocks(model))[1].experts.frozen_down.data[0, 3, 4] += 1e-6
    assert frozen_digest(model) != report.base_digest


def test_several_frozen_experts_are_all_in_the_digest():
    model = random_mixtral()
    one, three = frozen_digest(model), frozen_digest(split_experts(model, 3))
    assert one != three
    next(moe_blocks(model))[1].experts.frozen_down.data[2] += 1
    assert frozen_digest(model) != three
    assert frozen_digest(join_experts(model)) == one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_experts(random_mixtral(), 5), "choose 1 to 4"),
        (lambda: split_experts(random_mixtral(), 0), "frozen is 0"),
        (lambda: split_experts(split_experts(random_mixtral())), "split already"),
        (lambda: join_experts(random_mixtral()), "not split"),
        (lambda: split_experts(AutoModelForCausalLM.from_config(BASES["llama"])), "expected an upcycled one"),
        (lambda: set_trainable(random_mixtral(), "post_pretrain"), "split_experts"),
        (lambda: set_trainable(random_mixtral(), "stage1"), "unknown stage 'stage1'"),
        (lambda: set_trainable(AutoModelForCausalLM.from_config(BASES["llama"]), "review"), "no MoE layer"),
    ],
)
def test_misuse_is_refused_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_full_trains_every_parameter_of_a_dense_model():
    model = AutoModelForCausalLM.from_config(BASES["qwen2 tied"])
    assert len(set_trainable(model, "full")) == len(list(model.parameters()))


def test_split_experts_is_the_training_form():
    assert all(isinstance(b.experts, SplitExperts) for _, b in moe_blocks(split_experts(random_mixtral())))
