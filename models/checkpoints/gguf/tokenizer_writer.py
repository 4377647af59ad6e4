"""The tokenizer of a checkpoint as metadata of a GGUF file.

    byte-level BPE             model gpt2: tokens, types, merges, and `pre`, llama.cpp's name for how text is cut
    BPE with pieces for bytes  model llama (as converted from SentencePiece): scores in the order of the merges

llama.cpp knows a cut by its name only, so one that has no name there is refused: its tokens would be others. Unigram,
WordPiece and word-level tokenizers are refused too. A normalizer NFC (Qwen) is left out, as llama.cpp's own converter
does: text in another form than NFC gets other tokens there.
"""

import json
from pathlib import Path
from typing import Any

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.gguf.file_writer import Value
from eclectus.models.checkpoints.tokenizer_files import open_tokenizer, text_frame

# llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Names in llama.cpp for the splits that transformers knows by a regular expression, the usual one of each.
NAMED_SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")
_SPACE = "▁"


def tokenizer_metadata(directory: Path, rows: int) -> dict[str, Value]:
    """Metadata by key of the tokenizer in a checkpoint directory. rows: of the model's embeddings.

    Raises UnsupportedModelError naming what llama.cpp cannot do with it, TokenizerError for one that cannot be read.
    """
    tokenizer = open_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(directory, f"it is a {type(tokenizer).__name__}, without the parts of a tokenizer.json")
    described = json.loads(backend.to_str())
    kind = described["model"]["type"]
    if kind != "BPE":
        raise _refused(directory, f"it is of kind {kind}")
    if described["model"].get("byte_fallback"):
        values = _sentence_piece(directory, described, rows, tokenizer.unk_token)
    else:
        values = _byte_level(directory, described, rows)
    return values | _special(directory, tokenizer) | _templates(tokenizer)


def _refused(directory: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{directory} has a tokenizer that a GGUF file cannot hold: {what}; llama.cpp reads byte-level BPE and BPE "
        "converted from SentencePiece: serve this model with transformers or vLLM"
    )


def _byte_level(directory: Path, described: dict[str, Any], rows: int) -> dict[str, Value]:
    normalizer = (described.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _refused(directory, f"its normalizer is {normalizer}, and llama.cpp applies none")
    tokens, types = _tokens(described, rows)
    merges = [each if isinstance(each, str) else " ".join(each) for each in described["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split_name(directory, described.get("pre_tokenizer")),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }


def _tokens(described: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """(tokens by id, their types). Rows without a token are unused; tokens without a row, which no text yields, go."""
    found = {number: (token, NORMAL) for token, number in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        found[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    listed = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _split_name(directory: Path, pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of a way to cut text."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    cuts = [_cut(step) for step in steps]
    names = {("bytes", True): "gpt-2", ("digits", "bytes", True): "smollm"}
    names |= {(GGUF_PRE_TOKENIZER_SPLITS[each], "bytes", False): each for each in NAMED_SPLITS}
    key = tuple(part for cut in cuts for part in cut)
    if any(step.get("add_prefix_space") for step in steps):
        raise _refused(directory, "it puts a space before every text (add_prefix_space)")
    if key not in names:
        shown = json.dumps(pre_tokenizer, ensure_ascii=False)[:200]
        raise _refused(directory, f"llama.cpp has no name for how it cuts text ({shown})")
    return names[key]


def _cut(step: dict[str, Any]) -> tuple[str | bool, ...]:
    """A pre-tokenizer in short: digits one by one, a regular expression, or bytes (and whether GPT-2's split too)."""
    kind = step["type"]
    if kind == "ByteLevel":
        return "bytes", step.get("use_regex", True)
    if kind == "Digits" and step.get("individual_digits"):
        return ("digits",)
    regex = (step.get("pattern") or {}).get("Regex") if kind == "Split" else None
    if regex is None or step.get("behavior") != "Isolated" or step.get("invert"):
        return (json.dumps(step),)
    return ("digits",) if regex == r"\p{N}" else (regex,)


def _sentence_piece(directory: Path, described: dict[str, Any], rows: int, unknown: str | None) -> dict[str, Value]:
    tokens, types = _tokens(described, rows)
    # SentencePiece joins the pair whose piece has the largest score, BPE the pair that comes first among the merges.
    order: dict[str, int] = {}
    for number, merge in enumerate(described["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault("".join(pair), number)
    scores = [-float(order.get(token, len(order))) for token in tokens]
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = BYTE
        elif token == unknown:
            types[number] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": _puts_space_first(directory, described),
    }


def _puts_space_first(directory: Path, described: dict[str, Any]) -> bool:
    """Whether a text gets a space first. Raises UnsupportedModelError where spaces are no pieces, as llama.cpp asks."""
    normalizer, cut = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *cut.get("pretokenizers", [cut])]
    kinds = {part.get("type"): part for part in parts}
    if known := set(kinds) - {None, "Prepend", "Replace", "Metaspace"}:
        raise _refused(directory, f"it has a {sorted(map(str, known))[0]} where SentencePiece has none")
    if "Metaspace" in kinds:
        return kinds["Metaspace"].get("prepend_scheme", "always") != "never"
    if kinds.get("Replace", {}).get("content") != _SPACE:
        raise _refused(directory, "it does not write spaces as ▁")
    return "Prepend" in kinds


def _special(directory: Path, tokenizer: Any) -> dict[str, Value]:
    before, after = text_frame(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise _refused(directory, f"it puts tokens {before} before a text and {after} after it")
    named: dict[str, int | None] = {"bos": bos, "eos": eos, "unknown": tokenizer.unk_token_id}
    named["padding"] = tokenizer.pad_token_id
    values: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": number for name, number in named.items() if number is not None
    }
    return values | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _templates(tokenizer: Any) -> dict[str, Value]:
    templates = tokenizer.chat_template
    if not templates:
        return {}
    named: dict[str, str] = templates if isinstance(templates, dict) else {"default": templates}
    values: dict[str, Value] = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text for name, text in named.items()
    }
    others = [name for name in named if name != "default"]
    return values | ({"tokenizer.chat_templates": list(others)} if others else {})
