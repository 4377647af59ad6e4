"""Conversations as documents: the records of chat data sets, each as one text that can be read back.

    messages        [{role, content, tool_calls ...}], beside them `tools`       (OpenAI, Hugging Face)
    conversations   [{from, value}], beside them `system` and `tools`            (ShareGPT)
    instruction     with input, output, `system`, `history` [[asked, answered]]  (Alpaca; Dolly: context, response)

The text is what is said. Before every message stands one control character that tells who says it: U+001C system,
U+001D user, U+001E assistant, U+001F any other message, whose fields but its content follow as JSON up to the next
U+001F. All four are white space to Python, so duplicates, languages and embeddings see the words alone, and how a
model's chat template puts them into tokens is decided when they are packed
(tasks/packing/conversation_tokens.py): another model costs no other curation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from eclectus.tasks.documents.readers.records import Fault, Record, brief
from eclectus.tasks.settings import LaterSetting, Settings

HOLDERS = ("messages", "conversations", "instruction")
BESIDE = ("input", "context", "output", "response", "system", "history", "tools")
FIELDS = (*HOLDERS, *BESIDE)
NOT_NAMED = "text"
"""The default of `text_field`, which names no field of conversations."""
MARKS = {"system": "\x1c", "user": "\x1d", "assistant": "\x1e"}
OTHER = "\x1f"
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call")},
}
_MARK = re.compile("[\x1c-\x1f]")

Messages = list[dict[str, Any]]


class ConversationSettings(Settings):
    """Whether the documents are conversations."""

    conversations: bool = LaterSetting(
        False,
        description="Whether the sources hold conversations (messages, ShareGPT's conversations, or instruction and "
        "output), for supervised fine-tuning by other trainers: packs of similar ones, whole, with a loss mask by the "
        "chat template of `tokenizer`. text_field may name the field of the messages.",
    )


class NoConversation(Exception):
    """reason: category, to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def holder_among(names: Any, text_field: str) -> str | None:
    """The field that holds the messages, or an instruction: the one that the user names, or a usual one."""
    own = () if text_field == NOT_NAMED else (text_field,)
    return next((name for name in (*own, *HOLDERS) if name in names), None)


def as_text(record: Record, text_field: str) -> str | Fault:
    """The conversation of a record as a text, or why it has none."""
    field = holder_among(record, text_field)
    if field is None:
        there = ", ".join(list(map(str, record))[:20]) or "nothing"
        return Fault("no text", f"there is no field {', '.join(HOLDERS)}; the record has {there}", brief(record))
    try:
        messages, tools = _messages(record, field)
        return encode(messages, tools)
    except NoConversation as why:
        return Fault(why.reason, str(why), brief(record[field]))


def encode(messages: Messages, tools: list[Any] | None = None) -> str:
    """Messages as one text. Raises NoConversation for what no assistant has a part in, or what cannot be written."""
    if not messages:
        raise NoConversation("empty", "the conversation holds no message")
    if not any(each["role"] == "assistant" and (each["content"] or len(each) > 2) for each in messages):
        raise NoConversation("no assistant", "no message is the assistant's, so there is nothing to learn")
    parts = [OTHER, json.dumps({"tools": tools}, ensure_ascii=False), OTHER] if tools else []
    for each in messages:
        content = each["content"]
        about = {name: value for name, value in each.items() if name != "content" or value is None}
        if list(about) == ["role"] and about["role"] in MARKS:
            parts += [MARKS[about["role"]], content]
        else:
            parts += [OTHER, json.dumps(about, ensure_ascii=False), OTHER, content or ""]
        if content and (found := _MARK.search(content)):
            raise NoConversation(
                "control character", f"a message holds U+{ord(found[0]):04X}, which parts messages here; take it out"
            )
    return "".join(parts)


def decode(text: str) -> tuple[Messages, list[Any] | None]:
    """(messages, tools or None) of a text that `encode` made. Raises ValueError for another."""
    messages, tools = Messages(), None
    roles = {mark: role for role, mark in MARKS.items()}
    if not text or text[0] not in (*roles, OTHER):
        raise ValueError("the text is no conversation")
    ends = [match.start() for match in _MARK.finditer(text)] + [len(text)]
    at = 0
    while at < len(ends) - 1:
        begin, end = ends[at], ends[at + 1]
        if text[begin] != OTHER:
            messages.append({"role": roles[text[begin]], "content": text[begin + 1 : end]})
            at += 1
            continue
        about = json.loads(text[begin + 1 : end])
        content = text[end + 1 : ends[at + 2]]
        if "tools" in about and "role" not in about:
            tools = about["tools"]
        else:
            messages.append({"role": about["role"], "content": content} | about)
        at += 2
    return messages, tools


def readable(text: str) -> str:
    """A document's text for people: of a conversation, who says what, line by line."""
    if not _MARK.match(text):
        return text
    messages, _ = decode(text)
    lines = []
    for each in messages:
        called = f" {json.dumps(each['tool_calls'], ensure_ascii=False)}" if "tool_calls" in each else ""
        lines.append(f"{each['role']}: {each['content'] or ''}{called}")
    return "\n".join(lines)


def _messages(record: Record, field: str) -> tuple[Messages, list[Any] | None]:
    held = _unpacked(record[field], field)
    before = _text(record.get("system"), "system")
    messages = [{"role": "system", "content": before}] if before and before.strip() else []
    if isinstance(held, str):
        if not held.strip():
            raise NoConversation("empty", f"field '{field}' holds no instruction")
        return messages + _of_instruction(record, held), None
    if not isinstance(held, list):
        kind = type(held).__name__
        raise NoConversation("wrong type", f"field '{field}' is of type {kind}; expected a list of messages")
    messages += [_message(each, number) for number, each in enumerate(held, 1)]
    tools = _unpacked(record.get("tools"), "tools") or None
    if tools is not None and not isinstance(tools, list):
        raise NoConversation("wrong type", f"field 'tools' is of type {type(tools).__name__}; expected a list")
    return messages, tools


def _unpacked(value: Any, field: str) -> Any:
    """Lists that a table holds as JSON text, as lists."""
    if isinstance(value, str) and field != "instruction" and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise NoConversation("not JSON", f"field '{field}' is text that is no JSON ({error})") from error
    return value


def _of_instruction(record: Record, instruction: str) -> Messages:
    turns = list[tuple[str, Any]]()
    for each in record.get("history") or []:
        if not isinstance(each, list | tuple) or len(each) != 2:
            raise NoConversation("wrong type", "field 'history' is no list of pairs")
        turns += [("user", each[0]), ("assistant", each[1])]
    more = record.get("input", record.get("context"))
    answer = record.get("output", record.get("response"))
    asked = f"{instruction}\n{more}" if isinstance(more, str) and more.strip() else instruction
    turns += [("user", asked), ("assistant", answer)]
    return [{"role": role, "content": _text(content, role) or ""} for role, content in turns]


def _message(given: Any, number: int) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise NoConversation("wrong type", f"message {number} is of type {type(given).__name__}; expected an object")
    named = given.get("role", given.get("from"))
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise NoConversation("unknown role", f"message {number} has role {brief(named)!r}; known: {', '.join(ROLES)}")
    content = _text(given["value"] if "from" in given and "value" in given else given.get("content"), number)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content or "", number)}
    message: dict[str, Any] = {"role": role, "content": content}
    if given.get("weight") == 0 or given.get("loss_mask") == 0:
        raise NoConversation("weights", f"message {number} has weight 0; drop the conversation or the weight")
    extra = ("role", "from", "content", "value", "weight", "loss_mask")
    message |= {str(name): _plain(value) for name, value in given.items() if name not in extra and value is not None}
    if content is None and len(message) == 2:
        raise NoConversation("empty", f"message {number} holds neither content nor tool calls")
    return message


def _calls(content: str, number: int) -> list[dict[str, Any]]:
    """ShareGPT's role function_call: one call, or a list of them, as JSON."""
    try:
        calls = json.loads(content)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": each["name"], "arguments": each["arguments"]} for each in calls]
    except (ValueError, LookupError, TypeError) as error:
        raise NoConversation("not JSON", f"message {number} calls a function with text that is no call") from error
    return [{"type": "function", "function": each} for each in functions]


def _text(value: Any, what: Any) -> str | None:
    """Content as text: parts of text are joined, others refused."""
    if value is None or isinstance(value, str):
        if value:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise NoConversation("not UTF-8", "a message holds half of a surrogate pair") from error
        return value
    if not isinstance(value, list):
        raise NoConversation("wrong type", f"content of message {what} is of type {type(value).__name__}")
    parts = list[str]()
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise NoConversation("not text", f"message {what} has a part of type {kind}; only text is packed")
    return _text("".join(parts), what)


def _plain(value: Any) -> Any:
    """Without the nulls that a table puts where a record had no field."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
