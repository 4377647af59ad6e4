"""FLOPs of a training step against counts by hand and against torch's counter over a real step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.mixture.experts import set_trainable, split_experts
from eclectus.models.pretraining.baselines import ExpertChoiceForCausalLM, top_k_from_dense
from eclectus.models.pretraining.stages import equal_flops_config
from eclectus.models.training.flops import Flops, count_flops, count_parameters, equal_flops_width, step_flops
from tests.support.tiny_training import plan

# Size laptop of benchmarks/lory_claims.py, where merging costs most: E = T.
V, D, F, LAYERS, L, E, T = 1024, 32, 88, 3, 256, 32, 32
LAPTOP = LlamaConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=L,
)  # fmt: skip
B = 4
n = B * L


@pytest.fixture(scope="module")
def dense():
    return LlamaForCausalLM(LAPTOP)


@pytest.fixture(scope="module")
def lory(dense):
    return LoryForCausalLM.from_dense(dense, num_experts=E, segment_length=T)


def by_hand(ffn_and_router):
    """6 FLOPs per token and weight of attention and head, and what each layer's FFN and router cost."""
    return 6 * n * (LAYERS * 4 * D * D + V * D) + LAYERS * ffn_and_router


DENSE_FFN = 6 * n * 3 * D * F
ROUTED_TOKENS = 6 * n * D


def test_a_dense_step_costs_six_flops_per_token_and_weight_and_seven_products_of_attention(dense):
    flops = count_flops(dense, B, L)
    assert flops.products == by_hand(DENSE_FFN) == 432_537_600
    assert flops.attention == LAYERS * B * 7 * 2 * L * L * D
    assert flops.total == flops.products + flops.attention


def test_lory_merges_once_forward_and_three_times_backward(dense, lory):
    segments = n // T
    flops = count_flops(lory, B, L)
    assert flops.products == by_hand(DENSE_FFN + 4 * 2 * segments * E * 3 * D * F + 6 * segments * D * E)
    twin = count_flops(dense, B, L)
    assert flops.attention == twin.attention
    assert round(flops.relative(twin), 2) == 1.48
    head = 6 * n * V * D
    layers = LAYERS * 6 * n * 4 * D * D
    ffn = (flops.products - head - layers) / (twin.products - head - layers)
    assert ffn == pytest.approx(1 + 4 * E / (3 * T), abs=0.01)
    assert (flops.products - head) / (twin.products - head) == pytest.approx(1.90, abs=0.005)


def test_blocks_of_segments_do_not_change_the_count(dense, lory):
    """Gradients of several blocks are added by addmm_, for which torch's counter has no formula."""
    blocks = LoryForCausalLM.from_dense(dense, num_experts=E, segment_length=T, merge_block_bytes=1 << 17)
    assert count_flops(blocks, B, L) == count_flops(lory, B, L)


@pytest.mark.parametrize(("top_k", "cuts"), [(2, 2), (2, 1), (4, 2)])
def test_a_token_pays_for_the_experts_it_chooses(dense, top_k, cuts):
    model = top_k_from_dense(dense, E, top_k, cuts=cuts)
    width = model.config.intermediate_size
    assert width == {1: 88, 2: 48}[cuts], "44, filled up to a multiple of 8"
    flops = count_flops(model, B, L)
    assert flops.products == by_hand(6 * n * top_k * 3 * D * width + ROUTED_TOKENS * E * cuts)


def test_expert_choice_pays_for_its_capacity(dense):
    for capacity, taken in ((1.0, n), (1.5, n * 3 // 2)):
        model = ExpertChoiceForCausalLM.from_dense(dense, E, capacity=capacity)
        assert count_flops(model, B, L).products == by_hand(6 * taken * 3 * D * F + ROUTED_TOKENS * E)


@pytest.mark.parametrize("kind", ["dense", "lory", "lory in blocks", "prefix", "top_k", "expert_choice"])
def test_the_count_without_data_is_that_of_a_real_step(dense, lory, kind):
    """Attention aside, which torch does not count on CPU; experts run in a loop over those that were chosen."""
    model = {
        "dense": lambda: dense,
        "lory": lambda: lory,
        "lory in blocks": lambda: LoryForCausalLM.from_dense(dense, E, T, merge_block_bytes=1 << 20),
        "prefix": lambda: LoryForCausalLM.from_dense(dense, E, T, routing="prefix"),
        "top_k": lambda: top_k_from_dense(dense, 4, 2),
        "expert_choice": lambda: ExpertChoiceForCausalLM.from_dense(dense, E),
    }[kind]()
    if kind == "top_k":
        model.set_experts_implementation("eager")
    accumulated = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=accumulated) as counter:
        model.train()(input_ids=torch.randint(V, (B, L)), use_cache=False).logits.sum().backward()
    assert count_flops(model, B, L).products == counter.get_total_flops()
    model.zero_grad()


def test_counting_leaves_the_model_as_it_was(dense):
    model = top_k_from_dense(dense, 4, 2).eval()
    model.set_experts_implementation("eager")
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    state = torch.random.get_rng_state()
    count_flops(model, 2, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training and model.config._experts_implementation == "eager"
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0] and torch.equal(value, before[name][1]) and value.grad is None


def test_frozen_weights_have_no_weight_gradients():
    model = LlamaForCausalLM(LAPTOP).requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    forward = 2 * n * (LAYERS * (4 * D * D + 3 * D * F) + V * D)
    assert count_flops(model, B, L).products == forward + 2 * n * V * D


@pytest.mark.parametrize("stage", ["post_pretrain", "review"])
def test_frozen_experts_have_no_weight_gradients(stage):
    """One layer of 3 experts, one frozen, top 2: a third of the rows is the frozen expert's."""
    config = MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = split_experts(MixtralForCausalLM(config))
    set_trainable(model, stage)
    rows, expert = 2 * n, 2 * D * F
    forward = 2 * n * (4 * D * D + V * D + 3 * D) + rows * 3 * expert
    # Gradients of the head's input and of the router's weights; nothing before this layer is trained.
    backward = 2 * n * V * D + 2 * n * 3 * D
    if stage == "post_pretrain":
        backward += rows * expert + (rows - round(rows / 3)) * 3 * expert
    assert count_flops(model, B, L).products == forward + backward


def test_a_step_is_counted_over_all_micro_batches_and_processes(dense):
    one = count_flops(dense, 1, L)
    assert step_flops(dense, plan(batch=6, micro_batch=4), 1, L) == one.times(6)
    assert step_flops(dense, plan(batch=6, micro_batch=4), 2, L) == one.times(6)
    assert one + one == Flops(2 * one.products, 2 * one.attention)


def test_the_dense_control_costs_no_less_than_lory_and_at_most_eight_columns_more(dense, lory):
    target = count_flops(lory, B, L)
    config = equal_flops_config(LAPTOP, E, L, segment_length=T)
    assert config.intermediate_size == equal_flops_width(LAPTOP, target, B, L) == 208
    costs = [
        count_flops(LlamaForCausalLM(LlamaConfig(**{**LAPTOP.to_dict(), "intermediate_size": width})), B, L).products
        for width in (200, 208)
    ]
    assert costs[0] < target.products <= costs[1]
    assert costs[1] / target.products == pytest.approx(1.006, abs=0.001)
    assert equal_flops_width(LAPTOP, count_flops(dense, B, L), B, L) == F, "the twin's own cost gives its own width"


def test_all_and_active_parameters(dense, lory):
    everything = sum(parameter.numel() for parameter in dense.parameters())
    assert count_parameters(dense) == (everything, everything)
    ffns, routers = LAYERS * 3 * D * F, LAYERS * D * E
    assert count_parameters(lory) == (everything + (E - 1) * ffns + routers, everything + routers)
    wider = ExpertChoiceForCausalLM.from_dense(dense, E, capacity=1.5)
    assert count_parameters(wider) == (count_parameters(lory)[0], everything + ffns // 2 + routers)
    chosen = top_k_from_dense(dense, E, 2, cuts=1)
    assert count_parameters(chosen) == (count_parameters(lory)[0], everything + ffns + routers)
