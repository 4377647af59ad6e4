"""A server is certified by its differences from the training model; text may part only where that is undecided."""

import math

import pytest
import torch

from eclectus.tasks.certify.compare import Expected, compare, tolerance_in

GREEDY = [3, 4, 5, 6]


def expected(seed=0):
    """The training model on a prompt of 5 tokens; its greedy text is ahead by about 2 at every step."""
    rows = torch.randn(9, 20, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    for step, token in enumerate(GREEDY):
        rows[4 + step] = torch.full((20,), -3.5)
        rows[4 + step][token] = -1.5
    return Expected(rows, 5, GREEDY)


def answer(ours, off=0.0, text=None, tokens=None):
    """What a server answers that is off by so much."""
    rows = [{str(token): float(row[token]) + off for token in range(20)} for row in ours.rows[:5]]
    return {"version": "1", "log_probs": [rows], "greedy": [text or GREEDY], "tokens": tokens}


def compared(off=0.0, dtype="float32", tolerance=1e-3, **answered):
    ours = expected()
    return compare(answer(ours, off, **answered), [ours], [[1, 2]], ["en"], ("server", dtype, tolerance, 1.0))


def test_equal_answers_are_certified_and_counted():
    found = compared(tokens=[[1, 2]])
    assert found.certified and found.compared == 100 and (found.equal_texts, found.texts) == (1, 1)
    assert found.max_difference < 1e-6 and found.tokens_equal is True


def test_a_row_less_as_vllm_gives_it_is_compared_from_the_end():
    ours, late = expected(), answer(expected())
    late["log_probs"][0].pop(0)
    assert compare(late, [ours], None, ["en"], ("server", "float32", 1e-3, 1.0)).certified


@pytest.mark.parametrize(("off", "certified"), [(5e-4, True), (2e-3, False), (-2e-3, False), (math.nan, False)])
def test_in_float32_the_largest_difference_decides(off, certified):
    assert compared(off).certified is certified
    assert certified or "difference of log-probabilities" in compared(off).faults[0]


def test_in_16_bits_the_mean_difference_decides():
    ours = expected()
    rounded = answer(ours)
    rounded["log_probs"][0][0]["7"] += 1.0
    assert compare(rounded, [ours], None, ["en"], ("server", "bfloat16", 0.1, 1.0)).certified
    assert not compared(off=0.2, dtype="bfloat16", tolerance=0.1).certified


def test_text_may_part_only_where_the_training_model_is_undecided():
    parted = compared(text=[3, 9, 9, 9])
    assert not parted.certified and "ahead by 2" in parted.faults[0] and parted.equal_texts == 0
    undecided = expected()
    undecided.rows[5][9] = undecided.rows[5][4] - 1e-4
    close = answer(undecided, text=[3, 9, 7, 7])
    found = compare(close, [undecided], None, ["en"], ("server", "float32", 1e-3, 1.0))
    assert found.certified and found.equal_texts == 0 and found.widest_margin == pytest.approx(1e-4, abs=1e-6)


def test_text_that_ends_early_counts_as_far_as_it_goes():
    assert compared(text=[3, 4]).certified and not compared(text=[3, 9]).certified


def test_other_tokens_are_named_by_prompt():
    found = compared(tokens=[[1, 3]])
    assert found.faults == ("its tokenizer reads other tokens in en",) and found.tokens_equal is False


def test_in_16_bits_at_least_the_rounding_of_the_largest_logit_is_allowed():
    small, large = Expected(None, 5, GREEDY, 8.0), Expected(None, 5, GREEDY, 64.0)
    assert tolerance_in("bfloat16", 1e-3, 0.1, [small]) == 0.1
    assert tolerance_in("bfloat16", 1e-3, 0.1, [small, large]) == 0.25
    assert tolerance_in("float16", 1e-3, 0.1, [large]) == 0.1
    assert tolerance_in("float32", 1e-3, 0.1, [large]) == 1e-3
