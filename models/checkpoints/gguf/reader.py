"""Reading a dense model in a GGUF file: config, tensors on demand, tokenizer, and a reference that reads it again.

Metadata keys and tensors follow llama.cpp (`gguf-py/gguf/constants.py`, `src/llama-model.cpp`). Whatever is in the file
is read, is known to change no logit, or is named in a refusal. (The reader of transformers drops scaled positions.) The
two readings of a file share nothing but the bytes:

    config and tensors    q and k rows of Llama put back in transformers' order, positions as rope_parameters
    reference             the file's own order and positions, computed as llama.cpp does

Tensors are dequantised to fp32 one at a time, by the gguf package. Files in several shards are read as one.
"""

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from eclectus.models.checkpoints.config_file import check_config
from eclectus.models.checkpoints.expected_tensors import expected_tensors
from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.gguf.header import Metadata, StoredTensor, read_header
from eclectus.models.checkpoints.gguf.rope import reference_rope, rope_parameters
from eclectus.models.checkpoints.gguf.tokenizer import check_split, read_gguf_tokenizer
from eclectus.models.checkpoints.reference import LAYER_NAMES, MODEL_NAMES, ReferenceModel, stored_name
from eclectus.models.checkpoints.tensor_files import CheckpointError, TensorSpec
from eclectus.models.checkpoints.writing import plain_config

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds, as transformers names it."""

    config: PretrainedConfig
    config_dict: dict[str, Any]
    """config.json of the model."""
    tensors: "GgufTensors"
    tokenizer: Any
    reference: ReferenceModel


class GgufTensors:
    """The tensors of a GGUF file as a TensorSource, by transformers' names, dequantised to fp32 one at a time."""

    def __init__(self, path: Path, stored: dict[str, StoredTensor], unpermuted: dict[str, int]) -> None:
        """unpermuted: by part (attn_q, attn_k), the heads whose rows llama.cpp reordered."""
        self._path, self._stored, self._unpermuted = path, stored, unpermuted
        self._sources: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        for name, tensor in stored.items():
            if name == "rope_freqs.weight":
                continue
            own = _transformers_name(path, name)
            self._sources[own] = name
            self.specs[own] = TensorSpec(own, torch.float32, tensor.shape)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises CheckpointError if there is none."""
        if name not in self._sources:
            raise CheckpointError(f"{self._path} has no tensor {name}")
        stored = self._sources[name]
        value = self.raw(stored)
        assert value is not None
        heads = self._unpermuted.get(stored.split(".")[-2])
        return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else value

    def raw(self, stored: str) -> Tensor | None:
        """The tensor of llama.cpp's name as it is in the file, None if there is none."""
        return torch.from_numpy(self._stored[stored].values()) if stored in self._stored else None


def read_gguf(path: Path) -> GgufModel:
    """The model in a GGUF file, or in several, of which `path` is the first.

    Raises CheckpointError for a file that cannot be read, UnsupportedModelError for a model that holds what is not
    known here.
    """
    with _named_errors(path):
        values, stored = _read_shards(path)
        config, config_dict, tensors, reference = _described(path, values, stored)
        tokenizer = read_gguf_tokenizer(path, values)
    return GgufModel(config, config_dict, tensors, tokenizer, reference)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """config.json of the model in a GGUF file, from its header alone. Raises as `read_gguf` does."""
    with _named_errors(path):
        return _described(path, *_read_shards(path))[1]


def _described(
    path: Path, values: dict[str, Any], stored: dict[str, StoredTensor]
) -> tuple[PretrainedConfig, dict[str, Any], GgufTensors, ReferenceModel]:
    metadata = Metadata(path, values)
    _check_kind(metadata)
    check_split(path, values)
    freqs = _frequency_divisors(stored)
    config_dict = _config(metadata, stored, freqs)
    config = AutoConfig.for_model(**config_dict)
    config_dict = plain_config(config) | {"architectures": config_dict["architectures"], "dtype": "float32"}
    # llama.cpp stores the rows of Llama's q and k so that neighbours rotate together.
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = GgufTensors(path, stored, heads if metadata.architecture == "llama" else {})
    metadata.check_rest()
    _check_tensors(path, config_dict, tensors)
    return config, config_dict, tensors, _reference(path, values, stored, freqs)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """What the gguf package and transformers raise for a damaged file, as CheckpointError."""
    try:
        yield
    except (UnsupportedModelError, CheckpointError):
        raise
    except ImportError as error:
        raise CheckpointError(f"{path} needs the gguf package: pip install 'eclectus[gguf]'") from error
    except (ValueError, OSError, RuntimeError, LookupError, ArithmeticError, TypeError, struct.error) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({first}); fetch it again, or give the safetensors checkpoint"
        ) from error


def _read_shards(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata of the first shard, tensors of all."""
    values, stored = _read_file(path)
    shards = values.get("split.count", 1)
    if shards <= 1:
        return values, stored
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match[3]) != shards or int(match[2]) != 1 or values.get("split.no") != 0:
        raise CheckpointError(
            f"{path} is one of {shards} shards; give the first, whose name ends in -00001-of-{shards:05d}.gguf"
        )
    for number in range(2, shards + 1):
        other = path.with_name(f"{match[1]}-{number:05d}-of-{shards:05d}.gguf")
        if not other.is_file():
            raise CheckpointError(f"{path.parent}: shard {other.name} is missing; fetch it again and retry")
        own, more = _read_file(other)
        if own.get("split.no") != number - 1 or stored.keys() & more.keys():
            raise CheckpointError(f"{other} is not shard {number} of {path.name}; fetch the shards again")
        stored |= more
    expected = values.get("split.tensors.count", len(stored))
    if len(stored) != expected:
        raise CheckpointError(f"{path}: its {shards} shards hold {len(stored)} tensors, expected {expected}")
    return values, stored


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    values, stored = read_header(path)
    for tensor in {tensor.kind: tensor for tensor in stored.values()}.values():
        tensor.check_kind()
    return values, stored


def _check_kind(metadata: Metadata) -> None:
    path, values, architecture = metadata.path, metadata.values, metadata.architecture
    if (kind := values.get("general.type", "model")) != "model":
        raise UnsupportedModelError(f"{path} holds a GGUF {kind}, expected a whole model")
    if architecture not in CLASSES:
        raise UnsupportedModelError(
            f"{path} is of architecture {architecture!r}; GGUF bases that can be read: {', '.join(CLASSES)} (Mistral's "
            "is llama)"
        )
    if experts := metadata.get("expert_count"):
        raise UnsupportedModelError(f"{path} is a mixture of {experts} experts already; a base is dense")


def _frequency_divisors(stored: dict[str, StoredTensor]) -> list[float]:
    """Llama 3.1's rope_freqs, empty for a model without."""
    if "rope_freqs.weight" not in stored:
        return []
    return stored["rope_freqs.weight"].values().flatten().tolist()


def _config(metadata: Metadata, stored: dict[str, StoredTensor], freqs: list[float]) -> dict[str, Any]:
    """config.json from the metadata. Raises CheckpointError for what does not fit together."""
    path, values = metadata.path, metadata.values
    heads = metadata.whole("attention.head_count")
    hidden = metadata.whole("embedding_length")
    layers, limit = metadata.whole("block_count"), metadata.whole("context_length")
    width = metadata.whole("attention.key_length", metadata.whole("rope.dimension_count", max(1, hidden // heads)))
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.whole(key, width) != width:
            raise UnsupportedModelError(
                f"{path}: {metadata.architecture}.{key} is {metadata.get(key)}, the heads are {width} wide; both must "
                "be equal"
            )
    found = {int(match[1]) for match in map(_NAME.fullmatch, stored) if match and match[1]}
    if len(found) != layers or max(found) != layers - 1:
        raise CheckpointError(f"{path}: its metadata has {layers} layers, its tensors are of {len(found)}")
    expected = {"token_embd": (None, hidden), "blk.0.attn_q": (heads * width, hidden), "blk.0.attn_k": (None, hidden)}
    for name, shape in expected.items():
        if (own := stored.get(f"{name}.weight")) is None:
            raise CheckpointError(f"{path} has no tensor {name}.weight")
        if len(own.shape) != 2 or shape not in (own.shape, (None, own.shape[1])):
            raise CheckpointError(
                f"{path}: {name}.weight has shape {own.shape}, its metadata says {heads} heads of {width} and an "
                f"embedding_length of {hidden}"
            )
    _check_window(metadata, limit)
    return {
        "model_type": metadata.architecture,
        "architectures": [CLASSES[metadata.architecture]],
        "max_position_embeddings": limit,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": metadata.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole("attention.head_count_kv", heads),
        **({"head_dim": width} if metadata.architecture != "qwen2" or width * heads != hidden else {}),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocabulary(metadata, stored),
        "tie_word_embeddings": "output.weight" not in stored,
        **({} if metadata.architecture == "qwen2" else {"attention_bias": "blk.0.attn_q.bias" in stored}),
        "rope_parameters": rope_parameters(metadata, freqs, width, limit),
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }


def _check_tensors(path: Path, config: dict[str, Any], tensors: GgufTensors) -> None:
    check_config(config, path)
    expected = expected_tensors(config, config["model_type"], None)
    if missing := sorted(expected.keys() - tensors.specs.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors that its class has, first {missing[0]}")
    for name, spec in tensors.specs.items():
        if name not in expected:
            raise UnsupportedModelError(f"{path} holds {name}, which its class does not know: give the safetensors one")
        shape, fields = expected[name]
        if spec.shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {spec.shape}, its config says {shape} ({fields})")


def _vocabulary(metadata: Metadata, stored: dict[str, StoredTensor]) -> int:
    """Rows of the embeddings. Raises CheckpointError if metadata or token list say otherwise."""
    rows = stored["token_embd.weight"].shape[0]
    said = metadata.whole("vocab_size", rows)
    tokens = metadata.values.get("tokenizer.ggml.tokens", 0)
    if said != rows or tokens > rows:
        raise CheckpointError(
            f"{metadata.path} has {rows} embeddings, a vocab_size of {said} and {tokens} tokens: this is not the "
            "model's tokenizer, or the file is damaged"
        )
    return rows


def _check_window(metadata: Metadata, limit: int) -> None:
    window = metadata.get("attention.sliding_window") or 0
    if 0 < window < limit:
        raise UnsupportedModelError(
            f"{metadata.path} has {metadata.architecture}.attention.sliding_window = {window}, and does not say of "
            "which layers: give the safetensors checkpoint"
        )


def _transformers_name(path: Path, name: str) -> str:
    match = _NAME.fullmatch(name)
    block, part, kind = match.groups() if match else (None, None, None)
    if part in LAYER_NAMES if block is not None else part in MODEL_NAMES and kind == "weight":
        return stored_name(name)
    raise UnsupportedModelError(
        f"{path} has a tensor {name}, which is not read here, so that the result would be another model: give the "
        "safetensors checkpoint"
    )


def _reference(
    path: Path, values: dict[str, Any], stored: dict[str, StoredTensor], freqs: list[float]
) -> ReferenceModel:
    """The file read again, as llama.cpp computes it."""
    arch = values["general.architecture"]
    heads, layers = values[f"{arch}.attention.head_count"], values[f"{arch}.block_count"]
    width = stored["blk.0.attn_q.weight"].shape[0] // heads
    weight: Callable[[str], Tensor | None] = GgufTensors(path, stored, {}).raw
    return ReferenceModel(
        layers,
        heads,
        stored["blk.0.attn_k.weight"].shape[0] // width,
        width,
        float(values[f"{arch}.attention.layer_norm_rms_epsilon"]),
        reference_rope(values, arch, freqs),
        "neighbours" if arch == "llama" else "halves",
        (None,) * layers,
        "silu",
        weight,
    )
