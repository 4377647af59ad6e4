"""Conversations as texts: every form of record is read, kept whole, and what is none is rejected with a reason."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents.conversations import as_text, decode, encode, readable
from eclectus.tasks.documents.ingest import IngestSettings, ingest, read_duplicates, read_rejected
from eclectus.tasks.documents.normalise import normalised
from eclectus.tasks.documents.readers import Fault
from eclectus.tasks.documents.table import read_table
from tests.support.chats import chat

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(record, text_field="text"):
    return decode(as_text(record, text_field))


def test_messages_are_read_as_they_are():
    messages = [
        *chat("1 + 1?", system="Be brief."),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "", "reasoning_content": "easy"},
    ]
    assert read({"messages": messages, "tools": [{"name": "add"}]}) == (messages, [{"name": "add"}])
    assert read({"dialog": messages}, "dialog") == (messages, None)
    assert read({"messages": json.dumps(messages)}) == (messages, None)


def test_sharegpt_and_alpaca_become_messages():
    shared = {"system": "S", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert read(shared) == (chat("q", "a", system="S"), None)
    assert read({"instruction": "do", "input": "it", "output": "done"}) == (chat("do\nit", "done"), None)
    told = {"instruction": "[1, 2]", "input": "", "output": "3", "history": [["a", "b"]], "system": ""}
    assert read(told) == (chat("a", "b", "[1, 2]", "3"), None)
    assert read({"instruction": "do", "context": "", "response": "done"}) == (chat("do", "done"), None)
    call = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ]
    assert read({"conversations": call})[0][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "one "}, "two ", {"text": "three"}]
    assert read({"messages": [{"role": "user", "content": parts}, *chat("", "x")[1:]]})[0] == chat("one two three", "x")


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"text": "plain"}, "no text", "there is no field messages, conversations, instruction"),
        ({"messages": []}, "empty", "holds no message"),
        ({"messages": chat("alone")}, "no assistant", "nothing to learn"),
        ({"messages": chat("q", "")}, "no assistant", "nothing to learn"),
        ({"messages": [{"role": "user"}, *chat("q", "a")]}, "empty", "message 1 holds neither"),
        ({"messages": [5]}, "wrong type", "message 1 is of type int"),
        ({"messages": {"role": "user"}}, "wrong type", "field 'messages' is of type dict"),
        ({"messages": [{"role": "king", "content": "x"}]}, "unknown role", "message 1 has role 'king'; known: human"),
        ({"messages": [{"role": "user", "content": 5}]}, "wrong type", "content of message 1 is of type int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "not text",
            "message 1 has a part of type image_url; only text",
        ),
        ({"messages": "[{"}, "not JSON", "field 'messages' is text that is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "not JSON", "calls a function"),
        ({"messages": chat("a\x1eb", "c")}, "control character", "holds U+001E"),
        ({"messages": chat("\ud800", "c")}, "not UTF-8", "surrogate"),
        ({"messages": [{**chat("q")[0], "weight": 0}, *chat("", "a")[1:]]}, "weights", "message 1 has weight 0"),
        ({"instruction": " ", "output": "x"}, "empty", "holds no instruction"),
        ({"instruction": "x", "output": None}, "no assistant", "nothing to learn"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "wrong type", "no list of pairs"),
        ({"messages": chat("q", "a"), "tools": "add"}, "wrong type", "field 'tools' is of type str"),
    ],
)
def test_what_is_no_conversation_is_rejected_with_the_reason(record, reason, detail):
    fault = as_text(record, "text")
    assert isinstance(fault, Fault) and fault.reason == reason and detail in fault.detail


@pytest.mark.parametrize("seed", range(50))
def test_every_conversation_comes_back_as_it_was(seed):
    draw = random.Random(seed)
    letters, roles = ' \n\t\0\x1b{}"\\aλ中😀\u2028', ["system", "user", "assistant", "tool", "developer"]
    messages = [
        {"role": draw.choice(roles), "content": "".join(draw.choices(letters, k=draw.randrange(9)))}
        for _ in range(draw.randrange(6))
    ]
    messages.append({"role": "assistant", "content": "x", **draw.choice([{}, {"name": "\x1c\x1f"}])})
    assert decode(encode(messages)) == (messages, None)


def test_only_what_is_said_counts_for_duplicates_and_languages():
    assert normalised(encode(chat("Hello there", "Hi", system="S"))) == "s hello there hi"


def test_people_read_who_says_what():
    text = encode([*chat("2?", system="S"), {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert readable(text).startswith("system: S\nuser: 2?\nassistant:  [{") and readable("plain") == "plain"


@pytest.mark.parametrize("text", ["", "plain", "\x1fnot json\x1f"])
def test_another_text_is_no_conversation(text):
    with pytest.raises(ValueError):
        decode(text)


def ingested(tmp_path, **settings):
    store = ArtifactStore(tmp_path / "home")
    with store.draft("documents") as draft:
        ingest.function(IngestSettings(sources=[str(tmp_path / "in")], conversations=True, **settings), draft)
        return store.commit(draft)


def test_files_of_every_kind_become_documents_and_bad_lines_are_kept_apart(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"id": "one", "messages": chat("q one", "a one")}), "{broken", json.dumps({"messages": []})]
    (folder / "a.jsonl").write_text("\n".join([*lines, json.dumps({"messages": chat("Q  one", "a ONE")})]))
    rows = [{"messages": chat("q two", "a two"), "domain": "cars"}, {"messages": chat("alone"), "domain": None}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet")
    pairs = [{"from": "human", "value": "q three"}, {"from": "gpt", "value": "a three"}]
    pq.write_table(pa.Table.from_pylist([{"conversations": pairs}]), folder / "c.parquet")
    (folder / "d.csv").write_text("instruction,input,output\nq four,,a four\n")
    (folder / "e.txt").write_text("plain text")
    made = ingested(tmp_path)
    table = read_table(made)
    found = [decode(text)[0] for text in table["text"].to_pylist()]
    assert sorted(each[0]["content"] for each in found) == ["q four", "q one", "q three", "q two"]
    assert table["name"].to_pylist()[0] == "one" and "cars" in table["domain"].to_pylist()
    reasons = read_rejected(made)["reason"].to_pylist()
    assert sorted(reasons) == ["empty", "no assistant", "no text", "not JSON"] and len(read_duplicates(made)) == 1


def test_a_field_of_the_user_s_own_name_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [{"dialog": chat("q", "a"), "text": "not this"}]
    (tmp_path / "in/a.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist([{"dialog": chat("q2", "a2")}]), tmp_path / "in/b.parquet")
    made = ingested(tmp_path, text_field="dialog")
    assert len(read_table(made)) == 2
