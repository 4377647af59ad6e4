"""GGUF files of tiny models, written as llama.cpp's convert_hf_to_gguf.py writes them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors by llama.cpp's names, q and k of Llama permuted."""
    config, named = model.config, {}
    for name, value in model.state_dict().items():
        array, (*path, kind) = value.float().numpy(), name.split(".")
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                named["output.weight"] = array
        elif path[1] == "layers":
            part = LAYER[".".join(path[3:])]
            if config.model_type == "llama" and part in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            named[f"blk.{path[2]}.{part}.{kind}"] = array
        else:
            named[{"embed_tokens": "token_embd", "norm": "output_norm"}[path[1]] + f".{kind}"] = array
    return named


def metadata_of(model: PreTrainedModel) -> dict[str, Any]:
    """The metadata that every converter writes, by keys without the architecture."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": width,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def rope_freqs(model: PreTrainedModel) -> np.ndarray:
    """llama.cpp's `generate_extra_tensors` for Llama 3.1."""
    rope, config = model.config.rope_parameters, model.config
    width = config.head_dim
    factors = []
    for index in range(0, width, 2):
        frequency = 1.0 / rope["rope_theta"] ** (index / width)
        length = 2 * math.pi / frequency
        old = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if length < old / high:
            factors.append(1.0)
        elif length > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokens: int,
    general: Mapping[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    split: tuple[int, int, int] | None = None,
    endianness: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> None:
    """general: keys with their full name. kind: of matrices. split: number, count and tensors of all shards."""
    writer = gguf.GGUFWriter(str(path), architecture, endianess=endianness)
    for key, value in [(f"{architecture}.{key}", value) for key, value in metadata.items()] + list(
        (general or {}).items()
    ):
        _add(writer, key, value)
    if split is not None:
        for key, value in zip(("split.no", "split.count", "split.tensors.count"), split, strict=True):
            writer.add_uint16(key, value) if "tensors" not in key else writer.add_int32(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + i) for i in range(tokens - 1)), "!!"])
    writer.add_token_types([1] * tokens)
    writer.add_token_merges(["! !"])
    for name, value in tensors.items():
        if value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_model(path: Path, model: PreTrainedModel, **more: Any) -> None:
    """The model as a GGUF file. more: metadata (overriding; None leaves a key out), tensors (added), and arguments of
    `write_file`."""
    metadata = metadata_of(model) | more.pop("metadata", {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tensors = tensors_of(model) | more.pop("tensors", {})
    more = {"tokens": model.config.vocab_size} | more
    write_file(path, more.pop("architecture", model.config.model_type), metadata, tensors, **more)


def spread(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights so wide that an error in any of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()
