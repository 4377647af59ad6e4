"""Exports a Lory model as a stock dense LLaMA for one prompt, domain or language (docs/methods.md 1.4).

With fixed routing weights, every layer's experts are one merged FFN, which is an ordinary LlamaMLP: any server can run
it, at the dense model's cost. Its logits are those of prompt-only routing with the same weights.

    model = LoryForCausalLM.from_pretrained("home/artifacts/checkpoint/...")
    export_dense(model, "legal-dense", domain="legal")                 measured by `eclectus pretrain` (or language=)
    export_dense(model, "mine-dense", prompt="The beginning of the text")
    export_dense(model, "arxiv-dense", weights=mean_routing_weights(model, batches_of_one_domain))
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models.checkpoints.side_files import has_tokenizer
from eclectus.models.checkpoints.tokenizer_files import open_tokenizer
from eclectus.models.checkpoints.writing import save_model
from eclectus.models.lory.config import LoryConfig
from eclectus.models.lory.dense import dense_ffn_names, split_expert
from eclectus.models.lory.merge import merge_experts
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.lory.routing import LoryCache, RoutingPlan, check_expert_weights
from eclectus.models.pretraining.routing_profiles import read_profile


@torch.no_grad()
def prompt_routing_weights(model: LoryForCausalLM, prompt_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The weights `[layers, B, E]` of prompt-only routing for prompts `[B, L]`; padding on either side is masked."""
    _check_routed(model)
    outputs = model.model(
        prompt_ids.to(model.device),
        attention_mask=None if attention_mask is None else attention_mask.to(model.device),
        past_key_values=LoryCache(model.config, "prompt"),
        output_router_weights=True,
    )
    return torch.stack(outputs.router_weights)


@torch.no_grad()
def mean_routing_weights(model: LoryForCausalLM, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> Tensor:
    """Mean routing weights `[layers, E]` over token batches, for example of one domain or language.

    Args:
        model: with a router, that is E > 1.
        batches: `[B, L]` token ids, or mappings with `input_ids` and possibly `attention_mask`. Each segment is
            weighted by its real tokens.

    Raises ValueError if there are no tokens.
    """
    _check_routed(model)
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.float64)
    tokens = 0.0
    for batch in batches:
        inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        ids, mask = inputs["input_ids"].to(model.device), inputs.get("attention_mask")
        mask = None if mask is None else mask.to(model.device)
        outputs = model.model(ids, attention_mask=mask, use_cache=False, output_router_weights=True)
        plan = RoutingPlan.make(model.config, None, outputs.last_hidden_state, mask, 0)
        real = plan.segment_sizes(outputs.router_weights[0])
        total += torch.stack([(weights * real).sum(dim=(0, 1)) for weights in outputs.router_weights]).double().cpu()
        tokens += real.sum().item()
    if not tokens:
        raise ValueError("mean_routing_weights got no tokens to average over; give it at least one non-empty batch.")
    return (total / tokens).float()


@torch.no_grad()
def export_dense(
    model: LoryForCausalLM,
    out_dir: str | Path,
    *,
    domain: str | None = None,
    language: str | None = None,
    prompt: str | None = None,
    prompt_ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> LlamaForCausalLM:
    """Writes a stock LlamaForCausalLM with every layer's experts merged, and returns it.

    Args:
        model: the Lory model; not changed.
        out_dir: directory to write to: safetensors, and the side files of the model's folder, if it has one.
        domain, language: merge by the mean routing of this part of the training data, stored in the folder that the
            model was loaded from (models/pretraining/routing_profiles.py).
        prompt: merge by this text, encoded with the tokenizer in that folder.
        prompt_ids: `[1, L]`: merge by these tokens.
        weights: `[layers, E]` (or `[layers, 1, E]`): merge by these weights.

    Exactly one of the five is given, unless the model is dense already. Raises ValueError otherwise, and if the folder
    lacks what is asked for. The directory loads in transformers 4.57 and 5.
    """
    weights = _choose_weights(model, domain, language, prompt, prompt_ids, weights)
    fields = model.config.to_dict()
    own = set(LoryConfig().to_dict()) - set(LlamaConfig().to_dict())
    fields = {key: value for key, value in fields.items() if key not in own | {"model_type", "auto_map"}}
    config = LlamaConfig(**{**fields, "architectures": ["LlamaForCausalLM"]})
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(model.model.layers):
        merged = merge_experts(weights[index].to(layer.mlp.experts.device), layer.mlp.experts.float())
        parts = split_expert(merged.to(layer.mlp.experts.dtype))
        state.update(zip(dense_ffn_names(index), parts, strict=True))
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=config).to(model.device)
    llama.tie_weights()
    llama.generation_config = model.generation_config
    folder = Path(model.name_or_path) if model.name_or_path else None
    save_model(llama.eval(), Path(out_dir), folder if folder and folder.is_dir() else None)
    return llama


def _choose_weights(
    model: LoryForCausalLM,
    domain: str | None,
    language: str | None,
    prompt: str | None,
    prompt_ids: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """The weights `[layers, E]` to merge by."""
    given = {"domain": domain, "language": language, "prompt": prompt, "prompt_ids": prompt_ids, "weights": weights}
    config = model.config
    if config.num_experts == 1 or config.routing == "dense":
        first = torch.zeros(config.num_hidden_layers, config.num_experts)
        first[:, 0] = 1
        return first
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(
            f"export_dense needs one of {', '.join(given)} to merge the experts by, but got "
            f"{' and '.join(chosen) or 'none'}; give exactly one."
        )
    if prompt is not None:
        prompt_ids = _tokens_of(model, prompt)
    if prompt_ids is not None:
        weights = prompt_routing_weights(model, prompt_ids)
    elif domain is not None:
        weights = read_profile(_folder_of(model), "domain", domain)
    elif language is not None:
        weights = read_profile(_folder_of(model), "language", language)
    rows = check_expert_weights(config, weights)
    assert rows is not None
    if rows.shape[1] != 1:
        raise ValueError(
            f"export_dense merges by one set of weights per layer, but got {rows.shape[1]}; give one prompt or set."
        )
    return rows[:, 0]


def _folder_of(model: LoryForCausalLM) -> Path:
    if not model.name_or_path:
        raise ValueError(
            "This model was not loaded from a folder, so its data and tokenizer are unknown; load it with "
            "from_pretrained, or give prompt_ids or weights."
        )
    return Path(model.name_or_path)


def _tokens_of(model: LoryForCausalLM, prompt: str) -> Tensor:
    folder = _folder_of(model)
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} has no tokenizer to encode the prompt with; give prompt_ids.")
    ids = open_tokenizer(folder)(prompt, return_tensors="pt", split_special_tokens=True)["input_ids"]
    if not ids.numel():
        raise ValueError("The prompt has no token; give a text to merge the experts by.")
    return ids


def _check_routed(model: LoryForCausalLM) -> None:
    if model.config.num_experts == 1 or model.config.routing == "dense":
        raise ValueError(
            f"This model has no routing: num_experts is {model.config.num_experts}, routing is "
            f"{model.config.routing!r}."
        )
