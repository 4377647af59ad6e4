"""Generation with a Lory model: docs/methods.md 1.4 and property 7 of its section 3."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from eclectus.models import LoryCache
from eclectus.models.lory.merge import merge_experts
from eclectus.models.pretraining.export_dense import mean_routing_weights, prompt_routing_weights
from tests.models.lory.test_model import SHAPE, T, lory, tokens


def generate(model, ids, new_tokens, **arguments):
    """Greedily generated tokens `[B, new]` and the logits they came from `[B, new, V]`."""
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    outputs = model.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True, **arguments
    )
    return outputs.sequences[:, ids.shape[1] :], torch.stack(outputs.logits, dim=1)


def padded_left(lengths):
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, -length:], mask[row, -length:] = own, 1
    return rows, ids, mask


@pytest.mark.parametrize("prompt", [T, T + 3, 2 * T, 3 * T - 1])
@pytest.mark.parametrize("routing", ["causal_segment", "prefix"])
def test_segment_routing_gives_the_training_pass_on_the_same_tokens(prompt, routing):
    model, ids = lory(routing=routing).double(), tokens(2, prompt)
    new, logits = generate(model, ids, 2 * T + 3, generation_routing="segment")
    full = model(torch.cat([ids, new], dim=1)).logits
    torch.testing.assert_close(logits, full[:, prompt - 1 : -1].float())


@pytest.mark.parametrize("prompt", [1, 3, T - 1])
def test_segment_routing_equals_training_from_the_first_token_when_the_first_segment_is_uniform(prompt):
    model, ids = lory(first_segment="uniform").double(), tokens(2, prompt)
    new, logits = generate(model, ids, 2 * T, generation_routing="segment")
    full = model(torch.cat([ids, new], dim=1)).logits
    torch.testing.assert_close(logits, full[:, prompt - 1 : -1].float())


def test_prompt_and_segment_routing_agree_in_the_second_segment_of_a_one_segment_prompt_and_then_differ():
    model, ids = lory().double(), tokens(3, T)
    _, by_prompt = generate(model, ids, 2 * T, generation_routing="prompt")
    _, by_segment = generate(model, ids, 2 * T, generation_routing="segment")
    # The first generated token comes from the prompt's pass; T more passes stay in the second segment.
    torch.testing.assert_close(by_prompt[:, : T + 1], by_segment[:, : T + 1])
    assert (by_prompt[:, T + 1] - by_segment[:, T + 1]).abs().max() > 1e-6


def test_prompt_routing_is_the_default_and_equals_the_prompts_weights_for_every_token():
    model, ids = lory(), tokens(2, 2 * T + 3)
    new, logits = generate(model, ids, T)
    weights = prompt_routing_weights(model, ids)
    assert weights.shape == (2, 2, 4)
    fixed = model(torch.cat([ids, new], dim=1), expert_weights=weights).logits
    torch.testing.assert_close(logits, fixed[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-5)


def test_given_weights_replace_the_router_in_generation():
    model, ids = lory(), tokens(2, T)
    weights = torch.rand(2, 4).softmax(-1)
    new, logits = generate(model, ids, T, past_key_values=LoryCache(model.config, expert_weights=weights))
    fixed = model(torch.cat([ids, new], dim=1), expert_weights=weights).logits
    torch.testing.assert_close(logits, fixed[:, T - 1 : -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expert_weights has shape \(3, 4\).*2 layers and 4 experts"):
        LoryCache(model.config, expert_weights=torch.rand(3, 4))


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_each_row_of_a_left_padded_batch_generates_as_alone(routing):
    model = lory().double()
    rows, ids, mask = padded_left((2 * T + 3, T, 5))
    new, logits = generate(model, ids, 2 * T, attention_mask=mask, generation_routing=routing)
    for row, own in enumerate(rows):
        alone, alone_logits = generate(model, own, 2 * T, generation_routing=routing)
        assert torch.equal(new[row : row + 1], alone)
        torch.testing.assert_close(logits[row : row + 1], alone_logits)


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_beam_search_carries_each_beams_own_experts(routing):
    model, (rows, ids, mask) = lory().double(), padded_left((T + 3, T - 1))
    arguments = dict(num_beams=3, max_new_tokens=T + 2, do_sample=False, generation_routing=routing)
    together = model.generate(ids, attention_mask=mask, output_scores=True, return_dict_in_generate=True, **arguments)
    for row, own in enumerate(rows):
        alone = model.generate(own, attention_mask=torch.ones_like(own), **arguments)
        new = alone[:, own.shape[1] :]
        assert torch.equal(together.sequences[row : row + 1, ids.shape[1] :], new)
    if routing == "prompt":
        weights = prompt_routing_weights(model, ids, mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        length = together.sequences.shape[1] - ids.shape[1]
        positions = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(length)], dim=1)
        full_mask = torch.cat([mask, torch.ones(2, length, dtype=mask.dtype)], dim=1)
        logits = model(
            together.sequences, attention_mask=full_mask, position_ids=positions, expert_weights=weights
        ).logits[:, ids.shape[1] - 1 : -1]
        chosen = together.sequences[:, ids.shape[1] :]
        score = logits.log_softmax(-1).gather(2, chosen[..., None]).sum((1, 2)) / length
        torch.testing.assert_close(together.sequences_scores.double(), score, rtol=1e-4, atol=1e-4)


def test_several_return_sequences_and_repeated_calls_do_not_disturb_each_other():
    model, ids = lory(), tokens(1, T)
    first = generate(model, ids, T)[0]
    generate(model, tokens(3, 5, seed=9), T, generation_routing="segment")
    assert torch.equal(generate(model, ids, T)[0], first)
    many = model.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=3, attention_mask=ids * 0 + 1)
    assert many.shape == (3, T + 4)


def test_concurrent_generations_on_one_model_give_what_each_gives_alone():
    model = lory()
    prompts = [tokens(1, 5 + index, seed=index) for index in range(4)]
    alone = [generate(model, prompt, T)[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: generate(model, prompt, T)[0], prompts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_several_tokens_at_once_on_a_cached_past_equal_one_at_a_time(routing):
    model, ids = lory().double(), tokens(2, 5 * T)
    with torch.no_grad():
        logits = {}
        for chunks in ((T, 4 * T), (T, *[1] * (4 * T)), (T, 3, 2 * T + 1, 2 * T - 4)):
            cache, pieces = LoryCache(model.config, routing), []
            for piece in ids.split(chunks, dim=1):
                pieces.append(model(piece, past_key_values=cache).logits)
            logits[chunks] = torch.cat(pieces, dim=1)
    one, *others = logits.values()
    for other in others:
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_plain_pass_that_returns_a_cache_is_the_training_pass_and_continues_by_segment():
    model, ids = lory().double(), tokens(2, 3 * T)
    outputs = model(ids[:, : 2 * T], use_cache=True)
    torch.testing.assert_close(outputs.logits, model(ids[:, : 2 * T], use_cache=False).logits)
    rest = model(ids[:, 2 * T :], past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 2 * T :], rtol=1e-8, atol=1e-8)


def test_assisted_decoding_gives_the_greedy_tokens_under_prompt_routing_and_is_refused_by_segment():
    model, ids = lory(), tokens(1, 6).repeat(1, 3)
    mask = torch.ones_like(ids)
    arguments = dict(max_new_tokens=T, do_sample=False, attention_mask=mask, prompt_lookup_num_tokens=3)
    assert torch.equal(model.generate(ids, **arguments)[:, ids.shape[1] :], generate(model, ids, T)[0])
    with pytest.raises(ValueError, match="cannot drop tokens"):
        model.generate(ids, generation_routing="segment", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(generation_routing="token"), "generation_routing is 'token'.*'prompt', 'segment'"),
        (dict(use_cache=False), "set use_cache=True"),
        (dict(cache_implementation="static"), "cache_implementation is 'static'"),
        (dict(prefill_chunk_size=4), "unset prefill_chunk_size"),
        (dict(past_key_values=DynamicCache()), "is a DynamicCache.*LoryCache"),
    ],
)
def test_settings_that_cannot_generate_are_refused_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(lory(), tokens(1, T), 3, **arguments)


@pytest.mark.parametrize("fields", [dict(routing="dense"), dict(num_experts=1)])
def test_dense_models_generate_as_without_a_cache(fields):
    model, ids = lory(**fields), tokens(2, 5)
    assert torch.equal(generate(model, ids, T)[0], generate(model, ids, T, use_cache=False)[0])


def test_a_batch_of_one_token_trains_and_generates():
    model, ids = lory(), tokens(1, 1)
    model(tokens(1, 2)[:, :1], labels=ids)
    for routing in ("prompt", "segment"):
        assert generate(model, ids, 2 * T, generation_routing=routing)[0].shape == (1, 2 * T)


def test_decoding_by_prompt_merges_once():
    model, ids = lory(), tokens(1, T)
    cache = LoryCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        merged = [layer.merged for layer in cache.layers]
        model(ids[:, :1], past_key_values=cache)
    assert all(layer.merged is one for layer, one in zip(cache.layers, merged, strict=True))
    weights = prompt_routing_weights(model, ids)
    torch.testing.assert_close(merged[1], merge_experts(weights[1], model.model.layers[1].mlp.experts))


def test_mean_routing_weights_count_segments_by_their_real_tokens():
    model = lory()
    long, short = tokens(1, 2 * T + 3), tokens(1, 5)
    ids, mask = torch.zeros(2, 2 * T + 3, dtype=torch.long), torch.zeros(2, 2 * T + 3, dtype=torch.long)
    ids[0], mask[0] = long, 1
    ids[1, :5], mask[1, :5] = short, 1
    together = mean_routing_weights(model, [dict(input_ids=ids, attention_mask=mask)])
    torch.testing.assert_close(together, mean_routing_weights(model, [long, short]), rtol=1e-4, atol=1e-5)
    weights = model(long, output_router_weights=True).router_weights[1][0]
    expected = (weights * torch.tensor([T, T, 3.0])[:, None]).sum(0) / (2 * T + 3)
    torch.testing.assert_close(mean_routing_weights(model, [long])[1], expected)
    with pytest.raises(ValueError, match="at least one non-empty batch"):
        mean_routing_weights(model, [])
    assert SHAPE["num_hidden_layers"] == len(together)
