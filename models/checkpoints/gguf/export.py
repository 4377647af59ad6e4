"""Writing a checkpoint as a GGUF file, as llama.cpp reads it, with a proof made by another reading of the file.

    Llama, Mistral, Mixtral    architecture llama: rows of q and k in llama.cpp's order, experts stacked
    Qwen2, Qwen3, Qwen3Moe     qwen2, qwen3, qwen3moe

Refused by name, because llama.cpp computes something else, silently: Qwen2Moe (its top-k weights are not normalised
there), positions that its class does not scale, activations other than SiLU, layers with different numbers of experts.
It has no sliding window for these classes: the context is cut to the window, within which the results are the same.

Vectors and routers stay float32, as llama.cpp's own converter has it; matrices get the type that is asked for. The
proof: the file, read as llama.cpp reads it and computed in float64, gives the checkpoint's logits.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eclectus.models.checkpoints.config_file import CheckpointError
from eclectus.models.checkpoints.door import check_checkpoint, read_transformers_config
from eclectus.models.checkpoints.expected_tensors import EMBEDDINGS, HEAD
from eclectus.models.checkpoints.families import FAMILIES, MATRICES, Family, UnsupportedModelError, moe_family_of
from eclectus.models.checkpoints.gguf.file_writer import PlannedTensor, Value, write_gguf_file
from eclectus.models.checkpoints.gguf.mixture_reader import gguf_reference
from eclectus.models.checkpoints.gguf.tokenizer_writer import tokenizer_metadata
from eclectus.models.checkpoints.proof import (
    FREQUENCY,
    TOLERANCE,
    Probes,
    StepZero,
    StepZeroError,
    checked,
    parameters_of,
    probes_for,
)
from eclectus.models.checkpoints.reference import LAYER_NAMES, ROUTER, ReferenceModel, reference_of, stored_name
from eclectus.models.checkpoints.side_files import has_tokenizer
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.checkpoints.writing import Converted, plain_config

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama"}
ARCHITECTURES |= {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NO_TOKENIZER: dict[str, Value] = {"tokenizer.ggml.model": "none"}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


@dataclass(frozen=True)
class GgufExport:
    """What was written, with its proof. notes: what users of the file should know."""

    architecture: str
    dtype: torch.dtype
    proof: StepZero
    notes: tuple[str, ...]


def export_gguf(directory: Path, path: Path, dtype: torch.dtype | None = None) -> GgufExport:
    """Writes the checkpoint in `directory` as the GGUF file `path`.

    dtype: of the matrices, float32, bfloat16 or float16; by default that of the checkpoint's embeddings. Raises
    UnsupportedModelError naming what llama.cpp cannot compute, CheckpointError, ValueError for a weight beyond the
    range of `dtype`, StepZeroError if the file computes something else; `path` is then there, and must not be used.
    """
    checked_in = check_checkpoint(directory)
    family = moe_family_of(checked_in.config, directory) if checked_in.kind == "mixture" else None
    model_type = str(checked_in.config["model_type"])
    _check_supported(directory, checked_in.config, family)
    config = read_transformers_config(directory)
    described = plain_config(config)
    with CheckpointReader(directory) as reader:
        if dtype is None:
            dtype = reader.specs[EMBEDDINGS].dtype
        if dtype not in _FILE_TYPES:
            raise UnsupportedModelError(
                f"{directory} is stored as {dtype}; choose --dtype float32, bfloat16 or float16"
            )
        stored = _Stored(reader, dtype)
        reference = reference_of(checked_in.config, described, stored, directory, family)
        metadata, freqs = _metadata(directory, described, reference, ARCHITECTURES[model_type], family)
        metadata["general.file_type"] = _FILE_TYPES[dtype]
        rows = described["vocab_size"]
        tokens = tokenizer_metadata(directory, rows) if has_tokenizer(directory) else NO_TOKENIZER
        tensors = list(_planned(stored, reference, described, dtype, family, ARCHITECTURES[model_type]))
        if freqs is not None:
            tensors.append(PlannedTensor("rope_freqs.weight", torch.float32, tuple(freqs.shape), (lambda: freqs,)))
        write_gguf_file(path, metadata | tokens, tensors)
        limit = int(str(metadata[f"{ARCHITECTURES[model_type]}.context_length"]))
        probes = probes_for(config, parameters_of(reader)).first(limit)
        proof = _prove(path, directory, reference, probes)
    return GgufExport(ARCHITECTURES[model_type], dtype, proof, _notes(reference, described, limit))


def _prove(path: Path, directory: Path, reference: ReferenceModel, probes: Probes) -> StepZero:
    """Compares the file, as llama.cpp computes it, with the checkpoint. Raises StepZeroError."""
    written, positions = gguf_reference(path), probes.last_position + 1
    theirs, own = (each.rope.frequencies(each.head_width, positions) for each in (written, reference))
    if not ((theirs - own).abs() <= FREQUENCY * own).all():
        raise StepZeroError(f"{path} has other rotary frequencies than {directory}: it must not be used")
    expected = reference.logits(probes.tokens, probes.positions, own)
    ours = written.logits(probes.tokens, probes.positions, own)
    return checked(f"{path} differs from {directory}", ours, expected, TOLERANCE, probes)


def _check_supported(directory: Path, config: dict[str, Any], family: Family | None) -> None:
    model_type = config["model_type"]
    if family is not None and family.stock_moe == "qwen2_moe":
        raise UnsupportedModelError(
            f"{directory} is a Qwen2Moe, which llama.cpp computes otherwise, silently: it does not normalise the top-k "
            "weights and divides by the gate of the shared expert, which is 0; serve Qwen2 bases with transformers or "
            "vLLM, or choose a Llama, Mistral or Qwen3 base"
        )
    if family is not None and family.moe != family.stock_moe:
        raise UnsupportedModelError(
            f"{directory} has different numbers of experts in its layers (experts_per_layer), and llama.cpp knows one "
            "for all: serve it with transformers or vLLM"
        )
    if config.get("attention_bias") and ARCHITECTURES.get(model_type) != "llama" and model_type != "qwen2":
        raise UnsupportedModelError(
            f"{directory} has attention_bias: true, and llama.cpp's {model_type} has no biases: serve it with "
            "transformers or vLLM"
        )
    if model_type not in ARCHITECTURES:
        hint = "export it first, with --domain, --language or --prompt" if model_type == "lory" else "it is not written"
        known = ", ".join(name for name in (*FAMILIES, "mixtral", "qwen3_moe"))
        raise UnsupportedModelError(f"{directory} is a {model_type!r} model; GGUF holds {known}: {hint}")


class _Stored:
    """The tensors as the file will hold them (a TensorSource): rounded to its type, vectors and routers to none."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype) -> None:
        self._narrow, self._wide = Converted(reader, dtype), Converted(reader, torch.float32)
        self.specs = {
            name: (self._wide if len(spec.shape) < 2 or _is_router(name) else self._narrow).specs[name]
            for name, spec in reader.specs.items()
        }

    def tensor(self, name: str) -> Tensor:
        return (self._wide if self.specs[name] is self._wide.specs[name] else self._narrow).tensor(name)


def _is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".shared_expert_gate.weight"))


def _metadata(
    directory: Path, config: dict[str, Any], reference: ReferenceModel, architecture: str, family: Family | None
) -> tuple[dict[str, Value], Tensor | None]:
    """(metadata without the tokenizer, the divisors of Llama 3.1's frequencies or None)."""
    if reference.activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{directory} has hidden_act {reference.activation!r}; llama.cpp computes SiLU here"
        )
    limit, width = config["max_position_embeddings"], reference.head_width
    window = min((each for each in reference.windows if each is not None), default=limit)
    rope, freqs = _rope(directory, reference, architecture, limit)
    values: dict[str, Value] = {
        "block_count": reference.layers,
        "context_length": min(limit, window),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": reference.heads,
        "attention.head_count_kv": reference.key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(reference.epsilon),
        "rope.dimension_count": width,
        "rope.freq_base": reference.rope.base,
        "vocab_size": config["vocab_size"],
        **rope,
    }
    if family is not None:
        values |= {"expert_count": config["num_local_experts"], "expert_used_count": reference.experts_per_token}
        if architecture != "llama":
            values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    named: dict[str, Value] = {"general.architecture": architecture, "general.name": directory.resolve().name}
    return named | {f"{architecture}.{key}": value for key, value in values.items()}, freqs


def _rope(
    directory: Path, reference: ReferenceModel, architecture: str, limit: int
) -> tuple[dict[str, Value], Tensor | None]:
    rope, values = reference.rope, dict[str, Value]()
    if rope.kind == "llama3" and architecture == "llama":
        plain = rope.base ** (-2 * torch.arange(reference.head_width // 2, dtype=torch.float64) / reference.head_width)
        return values, (plain / rope.frequencies(reference.head_width, 1)).float()
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}, None
    if rope.kind == "yarn" and rope.truncate:
        values = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": int(rope.original),
            "rope.scaling.yarn_beta_fast": rope.fast,
            "rope.scaling.yarn_beta_slow": rope.slow,
        }
        # llama.cpp multiplies its own temperature by this.
        usual = 1 + 0.1 * math.log(rope.factor)
        return values | ({"rope.scaling.attn_factor": rope.scale / usual} if rope.scale != usual else {}), None
    if rope.kind != "default":
        raise UnsupportedModelError(
            f"{directory} scales positions by {rope.kind}, which llama.cpp's {architecture} does not compute: serve it "
            "with transformers or vLLM"
        )
    return values, None


def _planned(
    stored: _Stored,
    reference: ReferenceModel,
    config: dict[str, Any],
    dtype: torch.dtype,
    family: Family | None,
    architecture: str,
) -> Iterator[PlannedTensor]:
    """All tensors of the file, in llama.cpp's order."""

    def plain(name: str, own: str, change: Callable[[Tensor], Tensor] = lambda value: value) -> PlannedTensor:
        spec = stored.specs[own]
        return PlannedTensor(name, spec.dtype, spec.shape, (lambda: change(stored.tensor(own)),))

    for name in ("token_embd.weight", "output_norm.weight", "output.weight"):
        own = stored_name(name)
        if own != HEAD or not config.get("tie_word_embeddings"):
            yield plain(name, own)
    heads = {"attn_q": reference.heads, "attn_k": reference.key_value_heads} if architecture == "llama" else {}
    for layer in range(reference.layers):
        for part in LAYER_NAMES:
            for kind in ("weight", "bias"):
                name = f"blk.{layer}.{part}.{kind}"
                if (own := stored_name(name)) in stored.specs:
                    yield plain(name, own, partial(_interleaved, heads=heads.get(part, 0)))
        if family is not None:
            yield plain(f"blk.{layer}.{ROUTER}", family.router_name(layer))
            for matrix in MATRICES:
                yield _stacked(stored, family, layer, matrix, config["num_local_experts"], dtype)


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order in which neighbours rotate together; 0 heads: unchanged."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else value


def _stacked(
    stored: _Stored, family: Family, layer: int, matrix: str, experts: int, dtype: torch.dtype
) -> PlannedTensor:
    names = [family.expert_name(layer, number, matrix) for number in range(experts)]
    shapes = {stored.specs[name].shape for name in names}
    if len(shapes) != 1:
        raise CheckpointError(f"experts of layer {layer} have different shapes: {sorted(shapes)}")
    part = matrix.removesuffix("_proj")
    pieces = tuple(partial(stored.tensor, name) for name in names)
    return PlannedTensor(f"blk.{layer}.ffn_{part}_exps.weight", dtype, (experts, *shapes.pop()), pieces)


def _notes(reference: ReferenceModel, config: dict[str, Any], limit: int) -> tuple[str, ...]:
    if limit < config["max_position_embeddings"]:
        return (
            f"llama.cpp has no sliding window for this class: the file's context is {limit} tokens, the window, within "
            "which the results are the same",
        )
    return ()
