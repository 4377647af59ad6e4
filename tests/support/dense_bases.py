"""Tiny random dense checkpoints of the four families, real ones, written by transformers itself."""

from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.support import tokenizers
from tests.support.gguf_files import spread, write_model

# Tiny matrices: threads only wait for each other.
torch.set_num_threads(1)
VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BASES = {
    "llama": LlamaConfig(
        **SHAPE, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    "llama tied": LlamaConfig(**SHAPE, num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=16),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "qwen2 tied": Qwen2Config(**SHAPE, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5),
    "qwen3 tied": Qwen3Config(
        **SHAPE, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, attention_bias=True
    ),
}


def write_base(directory: Path, name: str, dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """Saves the base of that name; weights spread widely enough that an error in any of them shows in the logits."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(BASES[name], dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.2)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5)
    model.to(dtype).save_pretrained(directory, **save)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", extra_special_tokens=["w2"]
    ).save_pretrained(directory)
    return directory


def dense(folder, kind=LlamaConfig, tokenizer=tokenizers.byte_level, **changed):
    """A dense checkpoint with a tokenizer that llama.cpp can read."""
    config = kind(**{**SHAPE, "vocab_size": 304, "num_key_value_heads": 2, **changed})
    spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).save_pretrained(folder)
    if tokenizer:
        tokenizer(folder)
    return folder


def tokens(length: int = 40, rows: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(directory: Path, token_ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(input_ids=token_ids).logits


def write_gguf(path: Path) -> None:
    """A tiny llama in GGUF, half precision, with a byte-level BPE tokenizer."""
    config = LlamaConfig(
        **SHAPE, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}
    )
    model = spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    write_model(path, model, kind=gguf.GGMLQuantizationType.F16)
