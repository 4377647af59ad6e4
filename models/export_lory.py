"""Write a Lory model as a stock dense LLaMA for one prompt, domain or language (papers.md 1.4).

With the weights fixed, every layer's experts are one merged FFN, which is an ordinary LlamaMLP: any server can run it, at
the dense model's cost. Its logits are those of prompt-only routing with the same weights.

    weights = mean_routing_weights(model, batches_of_one_domain)       or prompt_routing_weights(model, prompt_ids)
    export_dense(model, "arxiv-dense", weights=weights)
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .lory import LoryForCausalLM
from .lory_config import LoryConfig
from .lory_dense import dense_ffn_names, split_expert
from .lory_routing import LoryCache, RoutingPlan, check_expert_weights
from .merge import merge_experts


@torch.no_grad()
def prompt_routing_weights(model: LoryForCausalLM, prompt_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Prompt-only routing's weights `[layers, B, E]` for prompts `[B, L]`; padding on either side is masked."""
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
    """Mean routing weights `[layers, E]` over token batches, say of one domain or language.

    Args:
        model: with a router, that is E > 1.
        batches: `[B, L]` token ids, or mappings with `input_ids` and possibly `attention_mask`. Each segment counts by
            its real tokens.

    Raises ValueError when there is no token at all.
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
    prompt_ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> LlamaForCausalLM:
    """Write a stock LlamaForCausalLM with every layer's experts merged, and return it.

    Args:
        model: the Lory model; left as it is.
        out_dir: directory to write, in safetensors.
        prompt_ids: `[1, L]`: merge by this prompt.
        weights: `[layers, E]` (or `[layers, 1, E]`): merge by these. Exactly one of the two is given, unless the model
            is dense already.

    The directory loads in transformers 4 and 5: its config.json carries the rotary settings under both names.
    """
    weights = _choose_weights(model, prompt_ids, weights)
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
    llama.eval().save_pretrained(out_dir)
    _write_both_rope_forms(Path(out_dir) / "config.json", config)
    return llama


def _choose_weights(model: LoryForCausalLM, prompt_ids: Tensor | None, weights: Tensor | None) -> Tensor:
    """The weights `[layers, E]` to merge by."""
    config = model.config
    if config.num_experts == 1 or config.routing == "dense":
        first = torch.zeros(config.num_hidden_layers, config.num_experts)
        first[:, 0] = 1
        return first
    if (prompt_ids is None) == (weights is None):
        raise ValueError("export_dense needs either prompt_ids or weights to merge the experts by: give one of them.")
    if weights is None:
        weights = prompt_routing_weights(model, prompt_ids)
    rows = check_expert_weights(config, weights)
    if rows.shape[1] != 1:
        raise ValueError(
            f"export_dense merges by one set of weights a layer, but got {rows.shape[1]}; give one prompt, or one of "
            "them."
        )
    return rows[:, 0]


def _check_routed(model: LoryForCausalLM) -> None:
    if model.config.num_experts == 1 or model.config.routing == "dense":
        raise ValueError(
            f"This model has no routing to look at: num_experts is {model.config.num_experts}, routing is "
            f"{model.config.routing!r}."
        )


def _write_both_rope_forms(path: Path, config: LlamaConfig) -> None:
    """transformers 4 reads `rope_theta` and `rope_scaling` where 5 writes `rope_parameters`."""
    rope = dict(config.rope_parameters)
    written = json.loads(path.read_text())
    written["rope_theta"] = rope.pop("rope_theta")
    written["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
