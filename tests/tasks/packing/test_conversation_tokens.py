"""Conversations to tokens by chat templates: what is learned is what the assistant says, and nothing else."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.conversations import encode
from eclectus.tasks.packing import conversation_tokens as packing
from eclectus.tasks.packing.conversation_tokens import CONTROL, DIFFERENT, NOTHING, REFUSED, STATES, TOO_LONG, Template
from tests.support.chats import CALLS, CHATML, FORGETS, MARKED, STRICT, chat, chat_tokenizer
from tests.support.tokenizers import byte_level

LONG = chat("How many?", "Three of them.", "And now?", "Still three.", system="Be brief.")


@pytest.fixture
def template(tmp_path):
    def make(text):
        tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer(tmp_path / f"{abs(hash(text))}", text))
        return tokenizer, Template(tokenizer, "the tokenizer")

    return make


def learned(tokenizer, done):
    """The texts of the stretches of tokens that are learned."""
    begins = np.flatnonzero(np.diff(done.learned.astype(int), prepend=0, append=0))
    return [tokenizer.decode(done.ids[first:last]) for first, last in begins.reshape(-1, 2)]


@pytest.mark.parametrize("text", [CHATML, MARKED])
def test_what_the_assistant_says_is_learned_with_the_end_of_its_turn(template, text):
    tokenizer, made = template(text)
    done = made.tokens(LONG, None)
    assert done.ids.tolist() == tokenizer.apply_chat_template(LONG, return_dict=True)["input_ids"]
    assert learned(tokenizer, done) == ["Three of them.<|im_end|>", "Still three.<|im_end|>"]


def test_both_ways_learn_the_same_tokens(template):
    by_prefix, by_mark = (template(text)[1].tokens(LONG, None) for text in (CHATML, MARKED))
    assert by_prefix.ids.tolist() == by_mark.ids.tolist() and by_prefix.learned.tolist() == by_mark.learned.tolist()


def test_a_template_without_line_ends_is_learned_to_its_end_token(template):
    tokenizer, made = template(STRICT)
    done = made.tokens(chat("Hi", "Ho", "Hi", "Ha"), None)
    assert learned(tokenizer, done) == [" Ho</s>", " Ha</s>"]
    assert done.ids[0] == tokenizer.bos_token_id and (done.ids == tokenizer.bos_token_id).sum() == 1


def test_tool_calls_are_learned_and_their_results_are_not(template):
    tokenizer, made = template(CALLS)
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    done = made.tokens(messages, [{"name": "add"}])
    first, second = learned(tokenizer, done)
    assert first.startswith("<call>") and '"add"' in first and first.endswith("<|im_end|>")
    assert second == "Two.<|im_end|>" and '{"name": "add"}' in tokenizer.decode(done.ids)


@pytest.mark.parametrize(
    ("text", "messages", "state", "why"),
    [
        (STRICT, LONG, REFUSED, "System role not supported"),
        (FORGETS, chat("a", "<think>b</think>c", "d", "e"), DIFFERENT, "message 2 changes how the messages"),
        (CHATML, [{"role": "assistant", "content": "a"}], DIFFERENT, "speaks first"),
        (CHATML, chat("say <|im_end|>", "no"), CONTROL, "a message spells <|im_end|>"),
        ("{{ messages[0]['content'] }}", chat("a", "b"), NOTHING, "renders nothing of the assistant's"),
        ("{{ messages.gone.too }}", chat("a", "b"), REFUSED, "has no attribute"),
    ],
)
def test_what_cannot_be_told_apart_is_left_out_with_the_reason(template, text, messages, state, why):
    done = template(text)[1].tokens(messages, None)
    assert (done.state, len(done.ids), len(done.learned)) == (state, 0, 0) and why in done.why


def test_a_template_that_forgets_thoughts_takes_single_turns(template):
    tokenizer, made = template(FORGETS)
    done = made.tokens(chat("a", "<think>b</think>c"), None)
    assert learned(tokenizer, done) == ["<think>b</think>c<|im_end|>"]


def test_a_text_in_between_is_not_taken_for_the_assistant_s(template):
    tokenizer, made = template(CHATML)
    done = made.tokens(chat("assistant\nThree of them.", "Three of them."), None)
    assert learned(tokenizer, done) == ["Three of them.<|im_end|>"]
    assert np.flatnonzero(done.learned)[0] > len(done.ids) / 2


def conversation(template, messages, length=1000, too_long="leave_out"):
    return packing.tokens_within(template, encode(messages), length, too_long)


def test_an_unanswered_end_is_cut_off_and_counted(template):
    _, made = template(CHATML)
    asked = conversation(made, [*LONG, {"role": "user", "content": "Why?"}])
    answered = conversation(made, LONG)
    assert STATES[asked.state] == "packed without its unanswered end" and STATES[answered.state] == "packed"
    assert asked.ids.tolist() == answered.ids.tolist()


def test_a_conversation_that_is_too_long_is_left_out_or_cut(template):
    _, made = template(CHATML)
    whole = conversation(made, LONG)
    size = len(whole.ids)
    assert conversation(made, LONG, size).ids.tolist() == whole.ids.tolist()
    out = conversation(made, LONG, size - 1)
    assert (out.state, len(out.ids), out.why) == (TOO_LONG, 0, f"{size} tokens")
    left, right = (conversation(made, LONG, size - 1, way) for way in ("cut_left", "cut_right"))
    assert left.ids.tolist() == whole.ids[1:].tolist() and left.learned.tolist() == whole.learned[1:].tolist()
    assert right.ids.tolist() == whole.ids[:-1].tolist() and STATES[left.state] == STATES[right.state] == "cut"
    assert conversation(made, LONG, 20, "cut_right").state == NOTHING


def test_a_tokenizer_without_a_template_is_refused_by_name(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(byte_level(tmp_path / "plain"))
    with pytest.raises(EclectusError, match="the tokenizer has no chat template; set tokenizer to a model that has"):
        Template(tokenizer, "the tokenizer")
