"""Chat stays chat: ten fixed instructions in English, answered by every model whose tokenizer brings a chat template.

A model that was tuned to follow instructions should still follow them after it learned new languages. Its template
turns each instruction into a prompt, and it answers greedily until it ends its turn or has written
`evaluation_chat_tokens` tokens. The report shows the answers of all models side by side. Ten answers are no measurement
of quality, but they show at once when a model no longer ends its turn, answers in another language or not at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import Artifact

INSTRUCTIONS = (
    "What is the capital of France?",
    "List three fruits that are yellow.",
    "Write one sentence about the sea.",
    "Translate into French: Good morning, my friend.",
    "What is 7 plus 5?",
    "Explain in one sentence why the sky is blue.",
    "Give me a title for a story about a lost dog.",
    "Rewrite politely: Close the door now.",
    "Name the four seasons in order.",
    "Write a Python function that returns the square of a number.",
)
# Some templates put today's date, or room for thoughts, into the prompt: every day and every model gets the same.
FIXED = {"date_string": "01 Jan 2025", "enable_thinking": False}


@dataclass(frozen=True)
class Chat:
    """prompts: token ids by instruction; none without a template. ends: tokens that end a turn. problem: why none."""

    prompts: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    problem: str = ""


def read_chat(checkpoint: Artifact, tokenizer: Any, tokens: int, longest: int) -> Chat:
    """The instructions as the tokenizer's template puts them. tokens: of an answer. longest: positions of the model."""
    templates = tokenizer.chat_template
    if not templates or not tokens or (isinstance(templates, dict) and "default" not in templates):
        return Chat()
    prompts = []
    for instruction in INSTRUCTIONS:
        turn = [{"role": "user", "content": instruction}]
        # A template is a program of its author, which may raise anything.
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **FIXED)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Chat(problem=f"its chat template cannot be used: {first[:200]}")
        prompts.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if max(map(len, prompts)) + tokens > longest or not all(prompts):
        return Chat(problem=f"an instruction and {tokens} tokens of answer do not fit its {longest} positions")
    return Chat(prompts, _ends(checkpoint, tokenizer))


def _ends(checkpoint: Artifact, tokenizer: Any) -> list[int]:
    """The end of a document, and the ends of a turn that generation_config.json names."""
    try:
        config = json.loads(Path(checkpoint.path, "generation_config.json").read_text("utf-8"))
        named = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    named = named if isinstance(named, list) else [named]
    known = [each for each in named if isinstance(each, int) and 0 <= each < len(tokenizer)]
    return list(dict.fromkeys([tokenizer.eos_token_id, *known]))


def write_chat(chat: Chat, written: list[list[int]], tokenizer: Any, path: Path) -> None:
    """chat.json: instruction, answer, and whether the model ended its turn, one by one; none without a template."""
    answers = [
        {
            "instruction": instruction,
            "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
            "ended": bool(ids) and ids[-1] in chat.ends,
        }
        for instruction, ids in zip(INSTRUCTIONS, written, strict=False)
    ]
    path.write_text(json.dumps(answers, indent=1, ensure_ascii=False), "utf-8")
