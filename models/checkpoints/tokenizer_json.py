"""The JSON files of a tokenizer: their fields checked, so that what is damaged is named and never read as another one.

`tokenizers` reads a tokenizer.json without its pre_tokenizer, or with two tokens of one id, without a word, and
panics on a merge whose result is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# All that save() writes, whether null or not; without one of them text gets other ids.
REQUIRED = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LARGEST_ID = 2**31
_KINDS = {str: "text", dict: "an object", list: "a list", bool: "true or false"}


class TokenizerError(ValueError):
    """A tokenizer that is missing, damaged or not the model's; the message names file, field and remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises TokenizerError, also for a name that is given twice."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _object(path, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise TokenizerError(f"{path} has '{twice}' twice in one object; keep one of them")
    return result


def check_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The object itself, if its fields have the types that they must have. Raises TokenizerError.

    path: tokenizer_config.json, special_tokens_map.json, added_tokens.json or the model's config.json.
    """
    if path.name == "added_tokens.json":
        _check_ids(path, "it", config)
        return config
    kinds: dict[str, tuple[type, ...]] = {"tokenizer_class": (str,), "model_type": (str,)}
    if path.name != "config.json":
        kinds |= {name: (str, dict) for name in config if name.endswith("_token") and not name.startswith("add_")}
        kinds |= {"auto_map": (dict, list, str), "added_tokens_decoder": (dict,), "chat_template": (str, list, dict)}
        kinds |= {"extra_special_tokens": (list, dict), "additional_special_tokens": (list,)}
        kinds |= {"add_bos_token": (bool,), "add_eos_token": (bool,)}
    for name, allowed in kinds.items():
        value = config.get(name)
        of_token = name.endswith("_token") and isinstance(value, dict) and not _is_token(value)
        if value is not None and (not isinstance(value, allowed) or of_token or (name == "eos_token" and not value)):
            expected = " or ".join(_KINDS[each] for each in allowed)
            raise TokenizerError(f"{path}: {name} is {_shown(value)}; expected {expected}")
    for name, value in config.items():
        # Of these, transformers opens some by the path that is given; the usual ones are another machine's, and gone.
        outside = isinstance(value, str) and not (path.parent / value).resolve().is_relative_to(path.parent.resolve())
        named = name.endswith("_file") or name in ("vocab", "merges")
        if named and outside and (path.parent / value).exists():
            raise TokenizerError(f"{path}: {name} names {_shown(value)}, outside its folder; remove {name}")
    if any(isinstance(each, str) for each in _list(config.get("init_inputs"))):
        raise TokenizerError(f"{path}: init_inputs is {_shown(config['init_inputs'])}; remove it")
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        if not number.isdecimal() or not (isinstance(token, dict) and _is_token(token)):
            raise TokenizerError(
                f"{path}: added_tokens_decoder has {_shown(number)}: {_shown(token)}; expected an id and a token"
            )
    return config


def check_tokenizer_json(path: Path, data: dict[str, Any]) -> dict[str, int]:
    """Checks the fields of a tokenizer.json; returns the ids of its added tokens. Raises TokenizerError."""
    for name in REQUIRED:
        if name not in data:
            raise TokenizerError(f"{path} lacks '{name}'; fetch it again")
    model = data["model"]
    if not isinstance(model, dict):
        raise TokenizerError(f"{path}: model is {_shown(model)}; expected an object")
    if model.get("type", MODELS[0]) not in MODELS:
        raise TokenizerError(f"{path}: model.type is {_shown(model['type'])}; expected {', '.join(MODELS)}")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if not isinstance(model.get(name), str | None):
            raise TokenizerError(f"{path}: model.{name} is {_shown(model[name])}; expected text or null")
    pieces = _check_vocabulary(path, model)
    _check_merges(path, model, pieces)
    if not model.get("byte_fallback") and "byte_fallback" not in model and all(each in pieces for each in BYTES):
        raise TokenizerError(f"{path} lacks model.byte_fallback, and its vocabulary has a piece for every byte; set it")
    added = _check_added(path, data["added_tokens"], pieces)
    _check_template(path, data["post_processor"], pieces | added)
    return added


def _check_vocabulary(path: Path, model: dict[str, Any]) -> dict[str, int]:
    """Ids by piece."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict) and model.get("type") != "Unigram":
        _check_ids(path, "model.vocab", vocab)
        return vocab
    if isinstance(vocab, list) and model.get("type", "Unigram") == "Unigram":
        for number, piece in enumerate(vocab):
            if not (isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str) and _is_real(piece[1])):
                raise TokenizerError(
                    f"{path}: model.vocab[{number}] is {_shown(piece)}; expected a piece and its score"
                )
        return {piece: number for number, (piece, _) in enumerate(vocab)}
    expected = "a list of pieces and scores" if model.get("type") == "Unigram" else "an object of tokens and ids"
    raise TokenizerError(f"{path}: model.vocab is {_shown(vocab)}; expected {expected}")


def _check_ids(path: Path, name: str, ids: dict[str, Any]) -> None:
    taken: dict[int, str] = {}
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < LARGEST_ID:
            raise TokenizerError(f"{path}: {name} gives token '{token}' the id {_shown(number)}; expected a number")
        if number in taken:
            raise TokenizerError(
                f"{path}: {name} gives '{taken[number]}' and '{token}' the same id {number}; correct one"
            )
        taken[number] = token


def _check_merges(path: Path, model: dict[str, Any], pieces: dict[str, int]) -> None:
    merges, prefix = model.get("merges"), len(model.get("continuing_subword_prefix") or "")
    if merges is None:
        if model.get("type") == "BPE":
            raise TokenizerError(f"{path} lacks model.merges; fetch it again")
        return
    if not isinstance(merges, list):
        raise TokenizerError(f"{path}: model.merges is {_shown(merges)}; expected a list")
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise TokenizerError(f"{path}: model.merges[{number}] is {_shown(merge)}; expected two tokens")
        for token in (*pair, pair[0] + pair[1][prefix:]):
            if token not in pieces:
                raise TokenizerError(f"{path}: model.merges[{number}] needs token '{token}', which model.vocab lacks")


def _check_added(path: Path, added: Any, pieces: dict[str, int]) -> dict[str, int]:
    if not isinstance(added, list):
        raise TokenizerError(f"{path}: added_tokens is {_shown(added)}; expected a list")
    ids: dict[str, int] = {}
    for number, token in enumerate(added):
        if not (isinstance(token, dict) and _is_token(token) and type(token.get("id")) is int):
            raise TokenizerError(
                f"{path}: added_tokens[{number}] is {_shown(token)}; expected an object with id and content"
            )
        content = token["content"]
        if content in ids or pieces.get(content, token["id"]) != token["id"]:
            other = ids.get(content, pieces.get(content))
            raise TokenizerError(
                f"{path}: added_tokens[{number}] gives '{content}' the id {token['id']}, but it has id {other} already"
            )
        ids[content] = token["id"]
    _check_ids(path, "added_tokens", ids)
    return ids


def _check_template(path: Path, processor: Any, ids: dict[str, int]) -> None:
    """What is put before and after a text must be tokens of the vocabulary, by their ids, and the text itself once."""
    if not isinstance(processor, dict):
        return
    kind, steps = processor.get("type"), processor.get("processors")
    for each in steps if isinstance(steps, list) else ():
        _check_template(path, each, ids)
    for side in ("cls", "sep") if kind in ("BertProcessing", "RobertaProcessing") else ():
        pair = processor.get(side)
        if not (isinstance(pair, list) and len(pair) == 2 and ids.get(str(pair[0])) == pair[1]):
            raise TokenizerError(f"{path}: post_processor.{side} is {_shown(pair)}, unlike the vocabulary")
    if kind != "TemplateProcessing":
        return
    special = processor.get("special_tokens")
    special = special if isinstance(special, dict) else {}
    for side in ("single", "pair"):
        pieces = _parts(processor.get(side))
        if side == "single" and [each.get("id") for each in _parts([p.get("Sequence") for p in pieces])] != ["A"]:
            raise TokenizerError(f"{path}: post_processor.single does not hold the text, Sequence A, once; correct it")
        for named in _parts([piece.get("SpecialToken") for piece in pieces]):
            if named.get("id") not in special:
                raise TokenizerError(
                    f"{path}: post_processor.{side} puts {_shown(named.get('id'))}, which its special_tokens lack"
                )
    for name, token in special.items():
        numbers, texts = (token.get(key) if isinstance(token, dict) else None for key in ("ids", "tokens"))
        if not isinstance(numbers, list) or not isinstance(texts, list) or [ids.get(str(t)) for t in texts] != numbers:
            raise TokenizerError(
                f"{path}: post_processor gives '{name}' the ids {_shown(numbers)}, unlike the vocabulary"
            )


def _parts(value: Any) -> list[dict[str, Any]]:
    """The objects in a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
