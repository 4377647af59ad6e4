"""Reading a dense model in a GGUF file, dequantised by transformers into memory."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.tensor_files import CheckpointError, ModuleTensors
from eclectus.models.checkpoints.writing import plain_config


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds, as transformers names it."""

    config: PretrainedConfig
    config_dict: dict[str, Any]
    """config.json of the model, without what it says of quantisation."""
    tensors: ModuleTensors
    tokenizer: Any


def read_gguf(path: Path) -> GgufModel:
    """The model in a GGUF file. Raises CheckpointError if it cannot be read."""
    try:
        return _read(path)
    except UnsupportedModelError:
        raise
    except (ValueError, OSError, RuntimeError, LookupError, struct.error) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as GGUF ({first}); fetch it again, or give the safetensors checkpoint"
        ) from error


def _read(path: Path) -> GgufModel:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = plain_config(model.config) | {"architectures": [type(model).__name__], "dtype": "float32"}
    config.pop("quantization_config", None)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return GgufModel(model.config, config, ModuleTensors(model), tokenizer)
