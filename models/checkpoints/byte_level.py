"""Tokens appended to a byte-level BPE, and taken away again (docs/methods.md 2.8), as changes of a tokenizer.json.

    merges      new ones behind all old ones, so that they apply where no old merge applies any more
    ids         behind all ids and all rows of the model's embeddings; whatever lies between gets a token that no text
                yields. Added tokens that the vocabulary lacked are written into it: `tokenizers` numbers them by its
                size, which grows

Only the standard library is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A space is no character of the alphabet of bytes, so no text is ever cut to such a token.
UNUSED = "<unused {}>"
Merge = tuple[str, str]


def byte_alphabet() -> dict[str, int]:
    """Bytes by the characters that stand for them in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [each for each in range(256) if each not in shown]
    return {chr(each): each for each in shown} | {chr(256 + place): each for place, each in enumerate(hidden)}


def check_byte_level(path: Path, data: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, for a tokenizer.json that no tokens can be appended to."""
    model = data["model"]
    kind, reason = model.get("type", "BPE"), ""
    if kind == "Unigram":
        kind, reason = (
            "SentencePiece unigram",
            "its pieces have scores and no ranks, so new ones change how text is cut",
        )
    elif kind != "BPE":
        reason = "it has no merges that new ones could be ranked behind"
    elif model.get("byte_fallback") or not _has(data, "ByteLevel") or _has(data, "Metaspace"):
        kind, reason = "BPE over characters (SentencePiece)", "only byte-level ones are extended so far"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        kind, reason = "BPE with marks for parts of words", "only byte-level ones are extended so far"
    elif model.get("dropout"):
        kind, reason = f"BPE with dropout {model['dropout']}", "the same text gets different tokens each time"
    if reason:
        raise ValueError(
            f"{path} is a {kind} tokenizer, which cannot be extended: {reason}; set extension_vocabulary to 0, or give "
            "a base with a byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2)"
        )


def _has(data: dict[str, Any], kind: str) -> bool:
    """Whether a part of that kind prepares or cuts text before merges apply."""
    return any(each.get("type") == kind for name in ("normalizer", "pre_tokenizer") for each in _steps(data[name]))


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(part, dict):
        return
    yield part
    for name in ("normalizers", "pretokenizers"):
        for each in part.get(name) or ():
            yield from _steps(each)


def append_merges(data: dict[str, Any], merges: Sequence[Merge], first: int) -> dict[str, Any]:
    """A tokenizer.json with more merges, whose tokens have the ids from `first` on; the given one stays as it is.

    first: at least the number of all ids so far. Raises ValueError for a merge whose token is there already.
    """
    data = copy.deepcopy(data)
    model = data["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for token in data["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    taken = set(vocabulary.values())
    if max(taken, default=-1) >= first:
        raise ValueError(f"ids up to {max(taken)} are taken; new ones cannot begin at {first}")
    for number in range(first):
        if number not in taken:
            vocabulary[UNUSED.format(number)] = number
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for number, pair in enumerate(merges, first):
        if pair[0] + pair[1] in vocabulary:
            raise ValueError(f"token '{pair[0] + pair[1]}' is in the vocabulary already")
        vocabulary[pair[0] + pair[1]] = number
        model["merges"].append(" ".join(pair) if as_text else list(pair))
    return data


def cut_vocabulary(data: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """A tokenizer.json without what `append_merges` added to it. vocabulary: rows of the model before."""
    data = copy.deepcopy(data)
    model, added = data["model"], {token["content"] for token in data["added_tokens"]}
    gone = {
        token
        for token, number in model["vocab"].items()
        if token not in added and (number >= vocabulary or token == UNUSED.format(number))
    }
    model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in gone}
    pairs = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    model["merges"] = [each for each, pair in zip(model["merges"], pairs, strict=True) if pair[0] + pair[1] not in gone]
    return data
