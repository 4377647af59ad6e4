"""The tokenizer in a GGUF file, as transformers reads it, with the split of text that the file names.

`tokenizer.ggml.pre` says how text is cut before merges apply (llama.cpp, `src/llama-vocab.cpp`). transformers reads
some of its values and takes GPT-2's split for all others, silently: those whose split is known here are put right, any
other is refused, since other token ids are another model.
"""

import logging
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from eclectus.models.checkpoints.families import UnsupportedModelError

# As llama.cpp groups them: GPT-2's split, and the same after every digit was cut out.
GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def check_split(path: Path, metadata: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for a byte-level tokenizer whose split is not known. metadata: by key."""
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split is None:
        return
    if split not in GPT2 and split not in DIGITS_APART and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise UnsupportedModelError(
            f"{path} has tokenizer.ggml.pre = {str(split)[:60]!r}, a way to split text that is not known here, so that "
            "the result would read other tokens: give the safetensors checkpoint"
        )


def read_gguf_tokenizer(path: Path, metadata: dict[str, Any]) -> Any:
    """The tokenizer of a GGUF file that passed `check_split`. metadata: by key."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer
    if split is None:
        logging.getLogger("eclectus").warning(
            "%s does not say how its tokenizer splits text (tokenizer.ggml.pre): GPT-2's way is taken; if the model's "
            "is another one, give the safetensors checkpoint",
            path,
        )
    elif split in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer
