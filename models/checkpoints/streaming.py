"""Logits of a checkpoint too large for memory: the stock model, with one layer's weights loaded at a time.

The model is built without weights. Before a layer runs, its weights are read and stacked as in transformers 5; after it
they are dropped. Cost: memory for one layer in fp32, one pass over the files.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from eclectus.models.checkpoints.families import Family
from eclectus.models.checkpoints.tensor_files import TensorSource


@torch.no_grad()
def streamed_logits(
    source: TensorSource,
    config: PretrainedConfig,
    family: Family | None,
    tokens: Tensor,
    only_expert: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits `[n, length, vocabulary]` in fp32 of a dense, an upcycled or a Lory checkpoint on tokens `[n, length]`.

    family: None for Lory. only_expert: send every token to that expert with weight 1 instead of routing. positions: of
    the tokens, by default 0, 1, 2, ...
    """
    with torch.device("meta"):
        how = {"experts_implementation": "eager"} if misaligned(config) else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how).eval()
    # Rotary frequencies are computed, not stored: they need a real device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    tied = bool(config.tie_word_embeddings)
    body = model.model
    parts = {"model.embed_tokens.": body.embed_tokens, "model.norm.": body.norm, "lm_head.": model.lm_head}
    parts |= {f"model.layers.{i}.": layer for i, layer in enumerate(body.layers)}
    for prefix, part in parts.items():
        stored_prefix = "model.embed_tokens." if tied and prefix == "lm_head." else prefix
        part.register_forward_pre_hook(_loader(source, family, stored_prefix))
        part.register_forward_hook(_drop_weights)
    if only_expert is not None:
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(_forced(only_expert))
    return logits_at(model, tokens, positions)


@torch.no_grad()
def logits_at(model: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """A model's logits on tokens and positions `[n, length]`; by default the positions 0, 1, 2, ..."""
    if positions is None:
        return model(input_ids=tokens, use_cache=False).logits
    # Without a mask, transformers takes jumps in the positions for borders between packed documents.
    mask = torch.ones_like(tokens)
    return model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits


def misaligned(config: PretrainedConfig) -> bool:
    """Whether rows of this model's matrices are not aligned to 16 bytes in bf16, as grouped matrix products require."""
    return any(width % 8 for width in (config.hidden_size, config.intermediate_size))


def _loader(source: TensorSource, family: Family | None, prefix: str) -> Callable[..., None]:
    def load(module: nn.Module, inputs: tuple) -> None:
        for name in dict(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = read_parameter(source, family, prefix + name, module.get_parameter(name).shape[0])
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))

    return load


def _drop_weights(module: nn.Module, _: tuple, __: object) -> None:
    module.to("meta")


def read_parameter(source: TensorSource, family: Family | None, name: str, rows: int) -> Tensor:
    """A module's parameter in fp32, read from checkpoint files; experts are stacked as `[experts, ...]`."""
    stacked = family.stacked_names(name, rows) if family else None
    if stacked is None:
        stored = name if family is None or name in source.specs else family.stored_name(name)
        return source.tensor(stored).float()
    return torch.stack([torch.cat([source.tensor(each) for each in names]).float() for names in stacked])


def _forced(expert: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def force(_: nn.Module, __: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = output
        only = torch.zeros_like(weights)
        only[:, 0] = 1.0
        # The other choices have weight 0, but must differ: some kernels require distinct experts.
        order = (torch.arange(indices.shape[1]) + expert) % logits.shape[1]
        return logits, only, order.expand_as(indices).contiguous()

    return force
