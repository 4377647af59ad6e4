"""Tokens of conversations as a model's chat template puts them, and which of them are learned.

    tokens, mask   the conversations of a part end to end, uint16 or uint32; uint8, 1 where the assistant speaks
    rows, sizes, control   as in document_tokens.py; a conversation that is left out has size 0
    states.npy     uint8 [n], what became of each: an index of STATES

What the assistant says is learned, its end-of-turn token included, and nothing else. Where the template marks it by
{% generation %}, transformers tells which tokens these are; otherwise the prompt before every assistant message is
rendered too, and must be how the whole conversation begins, as must the conversation up to the message: a message is
what comes between the two. What stands behind its last control token, such as the line end of ChatML, is no part of it.
A conversation of which that is not true, which the template refuses, or whose text spells a control token is left out
and counted, with the reason. Trailing messages to which no assistant answers are not rendered: nothing learns from
them. Price: two renderings for each assistant message without {% generation %}, one with it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.conversations import ConversationSettings, Messages, decode
from eclectus.tasks.documents.readers.records import first_line
from eclectus.tasks.documents.table import parts
from eclectus.tasks.evaluation.chat import FIXED
from eclectus.tasks.over_parts import Done
from eclectus.tasks.packing.document_tokens import belongs, chosen_rows, groups_and_training, texts_of
from eclectus.tasks.packing.tokenizer import load_tokenizer

MASK, STATES_FILE = "mask", "states.npy"
WINDOW = 8
"""Among so many next conversations one is looked for that fits, where `pack_fit` is 0."""
PACKED, UNANSWERED, CUT = "packed", "packed without its unanswered end", "cut"
STATES = (
    PACKED,
    UNANSWERED,
    CUT,
    "too long",
    "nothing to learn",
    "refused by the chat template",
    "beginning rendered differently",
    "control token in the text",
)
TOO_LONG, NOTHING, REFUSED, DIFFERENT, CONTROL = range(3, 8)
DATE = {"date_string": FIXED["date_string"]}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ConversationPackSettings(ConversationSettings):
    conversation_too_long: str = Field(
        "leave_out",
        pattern="^(leave_out|cut_left|cut_right)$",
        description="What to do with a conversation longer than instance_tokens: leave_out, cut_left (its beginning "
        "goes) or cut_right (its end goes). All others are packed whole.",
    )

    def key_values(self) -> dict[str, Any]:
        values = super().key_values()
        if not self.conversations:
            values.pop("conversation_too_long")
        return values


def check_template(tokenizer: Artifact) -> None:
    """Raises EclectusError for a tokenizer without a chat template, by its files alone."""
    folder = Path(tokenizer.path)
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and json.loads(config.read_text("utf-8")).get("chat_template")):
        raise EclectusError(
            "conversations is true, but the tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); set tokenizer to the folder or hub name of a model that has one"
        )


@dataclass(frozen=True)
class Rendered:
    """ids, int64 [n]; learned, bool [n]; n is 0 where it is left out. state: of STATES. why: it is left out, or ""."""

    ids: np.ndarray
    learned: np.ndarray
    state: int = 0
    why: str = ""


def _left_out(state: int, why: str) -> Rendered:
    return Rendered(np.empty(0, np.int64), np.empty(0, bool), state, why)


class Template:
    """A tokenizer with its chat template: `tokens(messages, tools)`."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        from eclectus.models.checkpoints.tokenizer_files import control_ids

        template = tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if not template:
            raise EclectusError(f"{name} has no chat template; set tokenizer to a model that has one")
        if not tokenizer.is_fast:
            raise EclectusError(f"{name} has no tokenizer.json, without which tokens cannot be told apart by message")
        self._tokenizer, self._marked = tokenizer, bool(_GENERATION.search(template))
        self._control = control_ids(tokenizer, frozenset())
        spelled = map(re.escape, tokenizer.convert_ids_to_tokens(sorted(self._control)))
        self._spelled = re.compile("|".join(spelled) or "(?!)")

    def tokens(self, messages: Messages, tools: list[Any] | None) -> Rendered:
        """The tokens of a conversation, of any length."""
        if found := self._spelled.search("\0".join(each["content"] or "" for each in messages)):
            return _left_out(CONTROL, f"a message spells {found[0]}")
        # A template is a program of its author, which may raise anything.
        try:
            done = (self._by_marks if self._marked else self._by_prefixes)(messages, tools)
        except _DifferentError as error:
            return _left_out(DIFFERENT, str(error))
        except Exception as error:
            return _left_out(REFUSED, first_line(error)[:200])
        learns = done.learned[1:].any()
        return done if learns else _left_out(NOTHING, "the template renders nothing of the assistant's")

    def _render(self, messages: Messages, tools: list[Any] | None, prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **DATE
        )
        return text

    def _by_marks(self, messages: Messages, tools: list[Any] | None) -> Rendered:
        done = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **DATE
        )
        return Rendered(np.array(done["input_ids"], np.int64), np.array(done["assistant_masks"], bool))

    def _by_prefixes(self, messages: Messages, tools: list[Any] | None) -> Rendered:
        whole = self._render(messages, tools)
        done = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = np.array(done["input_ids"], np.int64), np.array(done["offset_mapping"], np.int64).reshape(-1, 2)
        control, learned = np.isin(ids, list(self._control)), np.zeros(len(ids), bool)
        for number, each in enumerate(messages):
            if each["role"] != "assistant":
                continue
            if not number:
                raise _DifferentError("the assistant speaks first, without a prompt")
            before = self._render(messages[:number], tools, prompt=True)
            after = self._render(messages[: number + 1], tools)
            if not (whole.startswith(after) and after.startswith(before)):
                raise _DifferentError(f"message {number + 1} changes how the messages before or after it are rendered")
            inside = (offsets[:, 0] >= len(before)) & (offsets[:, 1] <= len(after)) & (offsets[:, 1] > offsets[:, 0])
            ends = np.flatnonzero(inside & control)
            if len(ends):
                inside[ends[-1] + 1 :] = False
            learned |= inside
        return Rendered(ids, learned)


class _DifferentError(Exception):
    """The rendering of a conversation's beginning is not the beginning of its rendering."""


def tokens_of_conversations(
    out: Path,
    path: Path,
    labels: Path | None,
    group: str | None,
    only_training: bool,
    tokenizer: Path,
    length: int,
    too_long: str,
    kind: str,
) -> dict[str, Any]:
    """Tokenises the conversations of a group in a part, at most `length` tokens of each.

    labels: of the part, which must be here when it is read. too_long: as `conversation_too_long`. Returns the first
    reason in words by state, as `first`.
    """
    template, dtype = Template(load_tokenizer(tokenizer), str(tokenizer)), np.dtype(kind)
    chosen = chosen_rows(path, group, only_training)
    sizes, states, first = [], [], dict[str, str]()
    with open(out / "tokens", "wb") as tokens, open(out / MASK, "wb") as mask:
        for text in (text for texts in texts_of(path, chosen) for text in texts):
            done = tokens_within(template, text, length, too_long)
            if done.why:
                first.setdefault(STATES[done.state], done.why)
            done.ids.astype(dtype).tofile(tokens)
            done.learned.astype(np.uint8).tofile(mask)
            sizes.append(len(done.ids))
            states.append(done.state)
    np.save(out / "rows.npy", np.flatnonzero(chosen).astype(np.uint32))
    np.save(out / "sizes.npy", np.array(sizes, np.uint32))
    np.save(out / STATES_FILE, np.array(states, np.uint8))
    np.save(out / "control.npy", np.empty((0, 3), np.int64))
    return {"documents": len(sizes), "tokens": sum(sizes), "first": first}


def tokens_within(template: Template, text: str, length: int, too_long: str) -> Rendered:
    """The tokens of a document, at most `length` of them."""
    try:
        messages, tools = decode(text)
    except ValueError as error:
        raise EclectusError(f"a document is no conversation ({error}); ingest it with conversations true") from error
    last = max(number for number, each in enumerate(messages) if each["role"] == "assistant")
    done = template.tokens(messages[: last + 1], tools)
    if done.why:
        return done
    if len(done.ids) <= length:
        return replace(done, state=STATES.index(PACKED if last + 1 == len(messages) else UNANSWERED))
    if too_long == "leave_out":
        return _left_out(TOO_LONG, f"{len(done.ids):,} tokens")
    kept = slice(len(done.ids) - length, None) if too_long == "cut_left" else slice(length)
    if not done.learned[kept][1:].any():
        return _left_out(NOTHING, f"the {length:,} tokens that are kept hold nothing of the assistant's")
    return Rendered(done.ids[kept], done.learned[kept], STATES.index(CUT))


def conversation_statistics(documents: Artifact, tokens: list[tuple[int, Done]], group: str) -> dict[str, Any]:
    """How many training conversations became what, by state, and the first reason of those that were left out.

    Raises EclectusError where none is packed.
    """
    counts, first = Counter[str](), dict[str, str]()
    for number, done in tokens:
        groups, names, training = groups_and_training(parts(documents)[number])
        wanted = training & np.array([belongs(name, group) for name in names])[groups]
        states = np.load(done.file(STATES_FILE))[wanted[np.load(done.file("rows.npy"))]]
        counts.update(dict(_counted(states)))
        for state, why in done.about["first"].items():
            first.setdefault(state, why)
    whys = {state: first.get(state, "") for state in STATES[TOO_LONG:] if counts[state]}
    if not any(counts[state] for state in STATES[:TOO_LONG]):
        reasons = "; ".join(f"{counts[state]:,} {state} ({why})" for state, why in whys.items())
        raise EclectusError(f"no conversation can be packed: {reasons}; raise instance_tokens, or change the template")
    return {"conversations": {state: counts[state] for state in STATES if counts[state]}, "conversations_why": whys}


def _counted(states: np.ndarray) -> Iterator[tuple[str, int]]:
    for state, count in zip(*np.unique(states, return_counts=True), strict=True):
        yield STATES[state], int(count)
