"""config.json as it comes from the world: reading it, and refusing values that no model has, by file and field.

Checked are the fields that decide what a Llama, Mistral, Qwen2 or Qwen3 computes (and what was made of them here: its
mixtures and Lory). A missing field is filled by transformers with its class's default; where the default is another
model for most checkpoints (`rope_theta`, `rms_norm_eps`, `sliding_window` of Mistral), the field must be there.
Cost: nothing but the reading of one small file.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = "config.json"
# A config is a few kilobytes; a larger file is something else.
LARGEST = 2**24
DTYPES = ("float64", "float32", "float16", "bfloat16")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2")
LAYER_TYPES = ("full_attention", "sliding_attention")
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# The largest values that are taken for meant.
WHOLE = {
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
    "sliding_window": 10**9,
    "num_experts_per_tok": 10**4,
    "num_local_experts": 10**4,
    "num_experts": 10**4,
    "shared_expert_intermediate_size": 10**7,
    "moe_intermediate_size": 10**7,
    "segment_length": 10**9,
    "merge_block_bytes": 10**15,
}
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window", "merge_block_bytes")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache")
# By rope_type: what it must have, apart from rope_theta.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
ROPE_LISTS = ("short_factor", "long_factor")
THETA = (100, 1e11)
# What a class takes if the field is missing, where that differs from class to class or is another model.
NO_DEFAULT = {
    "mistral": ("num_key_value_heads", "sliding_window"),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or damaged; the message names the file and the field or tensor."""

    def __init__(self, message: str) -> None:
        # Names and values come from the world and may hold line breaks.
        super().__init__(message.replace("\n", " "))


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory. Raises CheckpointError if it is missing or not a JSON object in UTF-8."""
    path = directory / CONFIG
    if not path.exists():
        raise CheckpointError(_no_config(directory))
    return read_json_object(path)


def _no_config(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return (
            f"{directory} holds an adapter (adapter_config.json) without its base: merge it into the base with peft's "
            "merge_and_unload, save that, and give its folder"
        )
    if directory.is_dir() and not any(directory.iterdir()):
        return f"{directory} is empty; expected a Hugging Face checkpoint directory or a .gguf file"
    return f"{directory} has no config.json; expected a Hugging Face checkpoint directory"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises CheckpointError naming the file and what is wrong with it."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is no regular file; expected a file of JSON")
        if path.is_file() and path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, too many for JSON; fetch it again")
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise CheckpointError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
        value = json.loads(text)
    except CheckpointError:
        raise
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a directory; expected a file of JSON") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 (byte {error.start}); fetch it again, or save it as UTF-8"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; fetch it again, or correct it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {_shown(value)}; expected a JSON object")
    return value


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError naming the first field of a config.json, read from `path`, that cannot be meant."""
    check = _Fields(config, path)
    check.required()
    for name, largest in WHOLE.items():
        check.whole(name, largest)
    for name in SWITCHES:
        check.each(name, lambda value: isinstance(value, bool), "true or false")
    check.each("rms_norm_eps", lambda value: _is_number(value) and 0 < value <= 0.1, "a number above 0, at most 0.1")
    check.each("initializer_range", lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
    check.each("attention_dropout", lambda v: v is None or (_is_number(v) and 0 <= v < 1), "a number from 0, below 1")
    check.each("hidden_act", lambda value: value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
    check.each("return_dict", lambda value: value is True, "true")
    for name in ("dtype", "torch_dtype"):
        check.each(name, lambda value: value is None or value in DTYPES, f"null or one of {', '.join(DTYPES)}")
    check.tokens()
    check.heads()
    check.experts()
    check.layer_types()
    check.rope()


class _Fields:
    """The fields of one config.json; every method raises CheckpointError naming file, field and expectation."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        self.config, self.path = config, path

    def wrong(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} is {_shown(self.config.get(name))}; expected {expected}")

    def each(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        """Checks a field if it is there. A value of a type that cannot be hashed or compared does not hold."""
        if name in self.config:
            value = self.config[name]
            scalar = value is None or isinstance(value, bool | int | float | str)
            if not scalar or not holds(value):
                raise self.wrong(name, expected)

    def required(self) -> None:
        for name in (*REQUIRED, "rms_norm_eps", *NO_DEFAULT.get(self.config["model_type"], ())):
            if name not in self.config:
                raise CheckpointError(
                    f"{self.path} lacks {name}, whose default would be another model; take it from the original "
                    "config.json"
                )

    def whole(self, name: str, largest: int) -> None:
        def holds(value: Any) -> bool:
            if value is None:
                return name in MAY_BE_NULL
            if value == 0 and name == "sliding_window" and self.config.get("use_sliding_window") is False:
                # So writes transformers' Qwen2Moe.
                return True
            return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest

        null = " or null" if name in MAY_BE_NULL else ""
        self.each(name, holds, f"a whole number from 1 to {largest:,}{null}")

    def tokens(self) -> None:
        """Ids of special tokens; the padding's selects a row of the embeddings."""
        vocabulary = self.config["vocab_size"]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = self.config.get(name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if not all(each is None or _is_whole(each) for each in ids):
                raise self.wrong(name, "a token id or null")
        padding = self.config.get("pad_token_id")
        if padding is not None and not -vocabulary <= padding < vocabulary:
            raise CheckpointError(
                f"{self.path}: pad_token_id is {padding}, outside the {vocabulary} rows of the embeddings "
                "(vocab_size): set it to null or to a token of the vocabulary, or resize the embeddings"
            )

    def heads(self) -> None:
        config = self.config
        heads, width, size = config["num_attention_heads"], config["hidden_size"], config.get("head_dim")
        groups = config.get("num_key_value_heads") or heads
        if heads % groups:
            raise self.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        if size is None and width % heads:
            raise self.wrong("hidden_size", f"a multiple of num_attention_heads, {heads}, since head_dim is not given")
        if (size or width // heads) % 2:
            name = "head_dim" if size else "num_attention_heads"
            raise self.wrong(name, "heads of an even size, which rotary positions need")

    def experts(self) -> None:
        """Numbers of experts, which two keys hold: of transformers 4 and of 5."""
        config, layers, counts = self.config, self.config["num_hidden_layers"], self.config.get("experts_per_layer")
        most = WHOLE["num_local_experts"]
        if counts is not None and not (
            isinstance(counts, list)
            and len(counts) == layers
            and all(_is_whole(each) and 0 < each <= most for each in counts)
        ):
            raise self.wrong("experts_per_layer", f"a list of {layers} numbers, one for each of num_hidden_layers")
        if config.get("decoder_sparse_step", 1) != 1:
            raise self.wrong("decoder_sparse_step", "1: every layer has experts")
        if config.get("mlp_only_layers"):
            raise self.wrong("mlp_only_layers", "an empty list: every layer has experts")
        inner = config["intermediate_size"]
        if config["model_type"].endswith(("qwen2_moe", "qwen3_moe")) and config.get("moe_intermediate_size") != inner:
            raise self.wrong("moe_intermediate_size", f"{inner}, as intermediate_size: an expert is the base's FFN")
        experts = config.get("num_local_experts", config.get("num_experts"))
        if "num_experts" in config and config["num_experts"] != experts:
            raise self.wrong("num_experts", f"{experts}, as num_local_experts")
        fewest = min(counts) if counts else experts
        if fewest is not None and config.get("num_experts_per_tok", 1) > fewest:
            raise self.wrong("num_experts_per_tok", f"at most the number of experts, {fewest}")

    def layer_types(self) -> None:
        config, layers = self.config, self.config["num_hidden_layers"]
        types, window = config.get("layer_types"), config.get("sliding_window")
        if types is not None:
            if not isinstance(types, list) or len(types) != layers:
                raise self.wrong("layer_types", f"a list of {layers}, one for each of num_hidden_layers")
            if wrong := [each for each in types if each not in LAYER_TYPES]:
                raise CheckpointError(
                    f"{self.path}: layer_types holds {_shown(wrong[0])}; expected {' or '.join(LAYER_TYPES)}"
                )
        if config.get("model_type") not in ("qwen2", "qwen3"):
            return
        self.each("max_window_layers", lambda value: _is_whole(value) and value >= 0, "a whole number from 0")
        slides = bool(config.get("use_sliding_window"))
        if slides and window is None:
            raise self.wrong("sliding_window", "a number of tokens, since use_sliding_window is true")
        if slides and types is None and "max_window_layers" not in config:
            raise CheckpointError(f"{self.path} lacks max_window_layers, which use_sliding_window: true needs")
        if not slides and types is not None and "sliding_attention" in types:
            raise self.wrong("use_sliding_window", "true, since layer_types has sliding_attention")

    def rope(self) -> None:
        """Rotary positions, as transformers 5 (rope_parameters) and 4 (rope_theta and rope_scaling) write them."""
        config = self.config
        for name in ("rope_parameters", "rope_scaling"):
            if not isinstance(config.get(name), dict | None):
                raise self.wrong(name, "an object or null")
        if config.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.wrong("partial_rotary_factor", "1: the class rotates whole heads")
        new, old = config.get("rope_parameters"), config.get("rope_scaling")
        in_4 = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
        in_4 |= old or {}
        if new:
            self._rope_of("rope_parameters", new)
        if old:
            self._rope_of("rope_scaling", in_4)
        elif "rope_theta" in config:
            self._theta("rope_theta", config["rope_theta"])
        if new and (old or "rope_theta" in config) and (differs := _difference(new, in_4, "rope_scaling" in config)):
            raise CheckpointError(
                f"{self.path} says {differs} of rotary positions twice and differently, in rope_parameters "
                "(transformers 5) and in rope_theta or rope_scaling (transformers 4); leave one of them, the right one"
            )
        theta = "rope_theta" in config or "rope_theta" in (new or {}) or "rope_theta" in (old or {})
        if not theta and not self._may_lack_theta():
            raise CheckpointError(
                f"{self.path} lacks rope_theta (or rope_parameters), whose default of 10000 would be another model; "
                "take it from the original config.json"
            )

    def _may_lack_theta(self) -> bool:
        """Configs of the first Llama models have no rope_theta: transformers knows it since 4.32."""
        numbers = str(self.config.get("transformers_version") or "0").split(".")[:2]
        if self.config.get("model_type") != "llama" or not all(each.isdigit() for each in numbers):
            return False
        return tuple(int(each) for each in numbers) < (4, 32)

    def _theta(self, name: str, value: Any) -> None:
        if not _is_number(value) or not THETA[0] <= value <= THETA[1]:
            raise CheckpointError(
                f"{self.path}: {name} is {_shown(value)}; expected a number from {THETA[0]} to {THETA[1]:g}"
            )

    def _rope_of(self, field: str, rope: dict[str, Any]) -> None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if "type" in rope and rope["type"] != kind:
            raise CheckpointError(f"{self.path}: {field} has rope_type {_shown(kind)} and type {_shown(rope['type'])}")
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise CheckpointError(
                f"{self.path}: {field} has rope_type {_shown(kind)}; expected one of {', '.join(ROPE_TYPES)}"
            )
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise CheckpointError(f"{self.path}: {field} has a partial_rotary_factor; expected 1")
        if kind in ("dynamic", "longrope") and "max_position_embeddings" not in self.config:
            raise CheckpointError(f"{self.path} lacks max_position_embeddings, which rope_type {kind} needs")
        for name in ROPE_TYPES[kind]:
            if rope.get(name) is None:
                raise CheckpointError(
                    f"{self.path}: {field} of rope_type {kind} lacks {name}; take it from the original config.json"
                )
        if kind == "default" and len(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
            named = sorted(rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})[0]
            raise CheckpointError(
                f"{self.path}: {field} has {named}, but no rope_type that uses it; expected one of "
                f"{', '.join(ROPE_TYPES)}"
            )
        if "rope_theta" in rope:
            self._theta(f"{field}.rope_theta", rope["rope_theta"])
        for name, value in rope.items():
            self._rope_value(f"{field}.{name}", name, value)
        if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise CheckpointError(f"{self.path}: {field}.high_freq_factor must be above low_freq_factor")

    def _rope_value(self, shown: str, name: str, value: Any) -> None:
        if (
            name in ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", "truncate")
            or value is None
        ):
            return
        if name in ROPE_LISTS:
            size = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
            if not isinstance(value, list) or len(value) != size // 2 or not all(map(_is_number, value)):
                raise CheckpointError(f"{self.path}: {shown} must be a list of {size // 2} numbers, half the head size")
        elif name == "original_max_position_embeddings":
            most = self.config.get("max_position_embeddings", WHOLE["max_position_embeddings"])
            if not _is_whole(value) or not 1 <= value <= most:
                raise CheckpointError(
                    f"{self.path}: {shown} is {_shown(value)}; expected a number of positions, at most the {most} of "
                    "max_position_embeddings"
                )
        elif not _is_number(value) or not 0 < value <= 1000 or (name == "factor" and value < 1):
            raise CheckpointError(
                f"{self.path}: {shown} is {_shown(value)}; expected a number above 0 (factor: 1 or more), at most 1000"
            )


def _difference(new: dict[str, Any], old: dict[str, Any], has_scaling: bool) -> str | None:
    """The first key on which rope_parameters and the keys of transformers 4 differ, None if they agree.

    has_scaling: whether the keys of transformers 4 say anything about scaling, if only that there is none.
    """

    def plain(rope: dict[str, Any]) -> dict[str, Any]:
        named = {key: value for key, value in rope.items() if key not in ("type", "finetuned") and value is not None}
        return {"rope_type": rope.get("type", "default"), **named}

    new, old = plain(new), plain(old)
    keys = (new.keys() | old.keys()) if has_scaling else {"rope_theta"}
    if "rope_theta" not in old or "rope_theta" not in new:
        keys = keys - {"rope_theta"}
    return next((key for key in sorted(keys) if new.get(key) != old.get(key)), None)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_whole(value)


def _shown(value: Any) -> str:
    """A value as JSON, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
