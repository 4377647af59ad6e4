"""Questions whose answers share the pass over their context: the log-likelihoods of a pass for each answer."""

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from eclectus.models.attention.choice import choose_attention
from eclectus.models.evaluation.shared_contexts import MOST_TOKENS, answer_rows, can_share, plan_rows

VOCABULARY, LENGTH = 67, 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOWED = {"sliding_window": 12}


def trained():
    """As a training on CPUs leaves it."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    choose_attention(model, "auto", torch.device("cpu"))
    return model


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")),
    "llama, after training": trained,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)),
}


def made(name):
    torch.manual_seed(1)
    return MODELS[name]().eval()


def asked(questions=7, answers=4, longest=9, seed=0):
    """Requests in a random order; among them answers of one token, and one question twice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        size = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(0, VOCABULARY, (size,), generator=generator).tolist()

    made_up = [
        (None, context, draw(longest)) for context in (draw(25) for _ in range(questions)) for _ in range(answers)
    ]
    made_up += [(None, made_up[0][1], [5])]
    return [made_up[place] for place in torch.randperm(len(made_up), generator=generator).tolist()]


@torch.no_grad()
def alone(model, context, continuation):
    row = (context + continuation)[-(LENGTH + 1) :]
    logits = model(input_ids=torch.tensor([row[:-1]])).logits[0, -len(continuation) :].double().log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_answer_scores_as_in_a_pass_of_its_own(name, batch):
    model, requests = made(name), asked()
    # The likeliest continuations are greedy ones.
    context = requests[0][1]
    requests.append((None, context, [int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())]))
    rows = plan_rows(requests, LENGTH, batch)
    assert can_share(model, max(len(row.tokens) for row in rows))
    answers = dict(answer_rows(model, rows, requests))
    assert sorted(answers) == list(range(len(requests))) and answers[len(requests) - 1][1]
    for number, (_, context, continuation) in enumerate(requests):
        value, greedy = alone(model, context, continuation)
        assert answers[number][0] == pytest.approx(value, abs=2e-4) and answers[number][1] == greedy


def test_a_context_is_computed_once_and_the_last_token_of_an_answer_never():
    requests = asked(questions=3, answers=5)
    contexts = {tuple(context) for _, context, _ in requests}
    computed = sum(map(len, contexts)) + sum(len(continuation) - 1 for *_, continuation in requests)
    assert sum(len(row.tokens) for row in plan_rows(requests, LENGTH, 64)) == computed


def test_long_questions_are_truncated_on_the_left_each_by_its_own_answer():
    model, context = made("llama"), [token % VOCABULARY for token in range(LENGTH - 2)]
    requests = [(None, context, [1] * size) for size in (1, 3, 4, 40, LENGTH)]
    answers = dict(answer_rows(model, plan_rows(requests, LENGTH, 2), requests))
    for number, (_, *request) in enumerate(requests):
        assert answers[number][0] == pytest.approx(alone(model, *request)[0], abs=2e-4)


def test_a_row_is_no_longer_than_its_batch_but_for_an_answer_that_is():
    many = [(None, [3, 4], [number % VOCABULARY] * 30) for number in range(200)]
    rows = plan_rows([*many, (None, [3], [7] * 300)], LENGTH * 10, 4)
    assert sorted(len(row.tokens) for row in rows)[-2:] == [2 + 8 * 29, 300]
    assert sorted(number for row in rows for number, _ in row.asked) == list(range(201))
    assert max(len(row.tokens) for row in plan_rows(many * 4, LENGTH, 10**6)) <= MOST_TOKENS


def test_a_model_whose_window_is_shorter_than_a_row_or_that_takes_no_mask_of_pairs_does_not_share():
    short = MistralForCausalLM(MistralConfig(**SHAPE, **WINDOWED))
    assert can_share(short, 12) and not can_share(short, 13)
    mixed = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **WINDOWED, use_sliding_window=True, max_window_layers=1))
    assert can_share(mixed, 12) and not can_share(mixed, 13)
    without = GPTNeoXForCausalLM(GPTNeoXConfig(**{**SHAPE, "num_hidden_layers": 1}))
    without.config._attn_implementation = "flash_attention_2"
    assert not can_share(without, 5)


def test_answers_of_one_question_stay_together_and_a_context_that_all_share_is_divided():
    from eclectus.models.evaluation.lm_eval import ANSWERS, _questions

    requests = {f"a{number}": (None, [1, 2], [number]) for number in range(4)}
    requests |= {f"whole {number}": (None, [0], [number]) for number in range(2 * ANSWERS + 1)}
    requests |= {"written": object(), "written too": object()}
    names = [name for pair in zip(requests, reversed(requests), strict=True) for name in pair][: len(requests)]
    parts = _questions(list(dict.fromkeys([*names, *requests])), requests)
    assert sorted(name for part in parts for name in part) == sorted(requests)
    assert sorted(map(len, parts)) == [1, 1, 1, 4, ANSWERS, ANSWERS]
    assert {frozenset(part) for part in parts if len(part) == 4} == {frozenset(f"a{number}" for number in range(4))}
