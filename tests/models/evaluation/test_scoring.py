"""Scoring: every token once, no look-ahead in scores, the same sums in one process and in two."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eclectus.models import LoryConfig, LoryForCausalLM
from eclectus.models.evaluation import scoring as evaluation
from eclectus.models.evaluation.scoring import NO_DOCUMENT, NotFinite, Windows, generate, plan_windows, score
from eclectus.models.training.process import Process
from tests.support.processes import run_group

LENGTH, CONTEXT, VOCABULARY = 32, 8, 61
PROMPTS = [[1, 2, 3], [4], [5, 6]]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}


def make_model(kind):
    torch.manual_seed(1)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if kind == "lory":
        config = LoryConfig(**SHAPE, num_experts=3, segment_length=CONTEXT, router_initializer_range=1.0)
        return LoryForCausalLM(config).eval()
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)).eval()


def make_windows(lengths=(100, 5, 41), seed=0):
    """Streams of random tokens; every stream is one document, with an end-of-document token at its end."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, sum(lengths)).astype(np.uint32)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    owners[np.cumsum(lengths) - 1] = NO_DOCUMENT
    table = plan_windows(list(lengths), LENGTH, CONTEXT)
    return Windows(tokens, owners, table, CONTEXT, LENGTH, np.full(len(lengths), 2.0))


def add_up(model, windows, process=None, batch=4):
    return score(model, windows, len(windows.bytes_per_token), process or Process(), batch, lambda done, total: None)


@pytest.mark.parametrize("lengths", [[0], [8], [9], [32], [33], [100, 5, 41], [31, 57, 1000]])
def test_every_token_past_the_context_of_its_stream_is_scored_in_exactly_one_window(lengths):
    counts = np.zeros(sum(lengths), int)
    for start, length, fresh, stream in plan_windows(lengths, LENGTH, CONTEXT):
        begin = sum(lengths[:stream])
        assert begin <= start and start + length <= begin + lengths[stream]
        assert CONTEXT < length <= LENGTH
        assert fresh == (0 if start == begin else CONTEXT)
        counts[start + CONTEXT : start + length] += 1
    expected = np.concatenate([np.arange(length) >= CONTEXT for length in lengths]).astype(int)
    assert (counts == expected).all()


def test_a_context_that_leaves_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="context must be 1 to 7"):
        plan_windows([100], 8, 8)


@pytest.mark.parametrize("kind", ["dense", "lory", "moe"])
def test_no_scored_token_depends_on_what_comes_after_it(kind):
    """Scores of tokens before a position do not depend on how the stream continues, or whether it does."""
    model, tokens = make_model(kind), make_windows((60,)).tokens
    other = (tokens + np.where(np.arange(60) < 45, 0, 1)) % VOCABULARY
    owners = np.where(np.arange(60) < 45, 0, NO_DOCUMENT)
    bits = [
        add_up(
            model,
            Windows(each, owners, plan_windows([len(each)], LENGTH, CONTEXT), CONTEXT, LENGTH, np.ones(1)),
        ).bits[0]
        for each in (tokens, other, tokens[:45])
    ]
    assert bits[1] == pytest.approx(bits[0], rel=1e-6)
    assert bits[2] == pytest.approx(bits[0], rel=1e-6)


def test_the_first_segment_of_lory_looks_ahead_and_is_therefore_in_no_score():
    model, windows = make_model("lory"), make_windows((60,))
    changed = Windows(
        np.where(np.arange(60) == CONTEXT - 1, 0, windows.tokens), *[getattr(windows, n) for n in
        ("documents", "table", "context", "length", "bytes_per_token")]
    )  # fmt: skip
    first = [add_up(model, each).positions[0, 0, 0] for each in (windows, changed)]
    assert first[0] != pytest.approx(first[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["dense", "lory", "moe"])
def test_batches_of_any_size_give_the_same_sums(kind):
    model, windows = make_model(kind), make_windows()
    one, many = (add_up(model, windows, batch=batch) for batch in (1, 16))
    np.testing.assert_allclose(many.bits, one.bits, rtol=1e-6)
    np.testing.assert_allclose(many.positions, one.positions, rtol=1e-5)
    for left, right in zip(one.shares + one.chosen, many.shares + many.chosen, strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-5)


def test_routing_is_counted_once_for_each_token_and_once_for_each_whole_segment():
    windows = make_windows((100, 5, 41))
    assert add_up(make_model("moe"), windows).routed.tolist() == [100, 0, 41]
    assert add_up(make_model("lory"), windows).routed.tolist() == [100 // CONTEXT, 0, 41 // CONTEXT]
    assert add_up(make_model("dense"), windows).routed.tolist() == [0, 0, 0]


def score_in_a_group(out):
    process, model = Process.current(), make_model("moe")
    # The second stream is one window, so that the second process has nothing to do and must still end with the sums.
    sums = [add_up(model, make_windows(lengths), process, 2) for lengths in ((70, 3), (30,))]
    written = generate(model, PROMPTS, 4, 0.0, [0], 0, process)
    if process.rank == 1:
        for number, each in enumerate(sums):
            np.savez(f"{out}/{number}.npz", bits=each.bits, tokens=each.tokens, shares=each.shares)
        np.save(f"{out}/written.npy", np.array([len(ids) for ids, _ in written]))


def test_two_processes_both_get_the_sums_of_one(tmp_path):
    run_group(2, score_in_a_group, tmp_path)
    model = make_model("moe")
    for number, lengths in enumerate(((70, 3), (30,))):
        one, two = add_up(model, make_windows(lengths)), np.load(tmp_path / f"{number}.npz")
        for name in ("bits", "tokens", "shares"):
            np.testing.assert_allclose(two[name], getattr(one, name), rtol=1e-6)
    alone = generate(model, PROMPTS, 4, 0.0, [0], 0, Process())
    assert np.load(tmp_path / "written.npy").tolist() == [len(ids) for ids, _ in alone]


@pytest.mark.parametrize("kind", ["dense", "lory", "moe"])
def test_interrupted_scoring_resumes_to_the_same_sums(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "KEEP_SECONDS", 0.0)
    model, windows = make_model(kind), make_windows()
    whole = add_up(model, windows, batch=1)
    progress = []

    def die(done, total):
        progress.append(done)
        if len(progress) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, windows, len(windows.bytes_per_token), Process(), 1, die, tmp_path)
    again = score(
        model, windows, len(windows.bytes_per_token), Process(), 1, lambda done, total: progress.append(done), tmp_path
    )
    assert progress[3] == 4  # three windows were not scored again
    for name in ("bits", "tokens", "positions", "routed"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    for left, right in zip(again.shares + again.chosen, whole.shares + whole.chosen, strict=True):
        np.testing.assert_array_equal(left, right)


def test_logits_that_are_not_finite_are_an_error_that_names_the_document():
    model = make_model("dense")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(NotFinite) as error:
        add_up(model, make_windows())
    assert error.value.document == 0


def apart(documents, tokens, context=CONTEXT):
    """Windows over one stream of documents of these lengths that stand apart; each ends with a token of its own."""
    numbers = np.repeat(np.arange(len(documents)), documents)
    owners = np.where(np.append(np.diff(numbers), 1) > 0, NO_DOCUMENT, numbers)
    table = plan_windows([len(tokens)], LENGTH, context)
    return Windows(tokens, owners, table, context, LENGTH, np.ones(len(documents)), (), numbers)


@pytest.mark.parametrize("kind", ["dense", "lory", "moe"])
def test_a_document_that_stands_apart_has_the_score_that_it_has_behind_any_other(kind):
    model, lengths = make_model(kind), [11, 13, 30, 3, 12]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, sum(lengths)).astype(np.uint32)
    changed = np.where(np.arange(len(tokens)) < 11, (tokens + 5) % VOCABULARY, tokens)
    one, other = (add_up(model, apart(lengths, each), batch=2) for each in (tokens, changed))
    np.testing.assert_allclose(other.bits[1:], one.bits[1:], rtol=1e-5)
    assert one.tokens.tolist() == [2, 11, 28, 1, 10]
    assert one.routed.sum() > 0 or kind == "dense"
    together = dataclasses.replace(apart(lengths, tokens), numbers=None)
    assert add_up(model, together).tokens.tolist() == [2, 12, 29, 2, 11]


def test_no_document_that_stands_apart_looks_ahead_in_its_first_segment():
    model, tokens = make_model("lory"), np.arange(24) % VOCABULARY
    windows = apart([9, 15], tokens, context=1)
    # Within the first segment, 9 to 16, of the second document.
    changed = dataclasses.replace(windows, tokens=np.where(np.arange(24) == 15, 60, tokens))
    hidden = [np.where(np.arange(24) < 15, each.documents, NO_DOCUMENT) for each in (windows, changed)]
    bits = [
        add_up(model, dataclasses.replace(each, documents=owners)).bits
        for each, owners in zip((windows, changed), hidden, strict=True)
    ]
    np.testing.assert_allclose(bits[1], bits[0], rtol=1e-6)


def test_segments_of_documents_that_stand_apart_are_counted_once_in_their_own_window():
    model, lengths = make_model("lory"), [10, 6, 17]
    windows = apart(lengths, np.arange(33) % VOCABULARY)
    # A window of 32 tokens: segments of 8, 2; 6; 8, 8. The next has 8 tokens of context and one more.
    assert add_up(model, windows).routed.tolist() == [5 + 1, 0, 0]
