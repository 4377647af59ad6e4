"""Mixtures whose layers hold different numbers of experts: the stock MoE classes with a count for each layer.

Mixtral, Qwen2Moe and Qwen3Moe have one `num_local_experts` for all layers, and no exact way to leave places of a layer
empty: a router row without a bias cannot keep an expert out of the top K for every input (models/mixture/extend_again.py says why). So
LayerMoE's lists (docs/methods.md 2.7) train in these classes of ours. Everything but the counts is stock, and so are the tensor names
in the files. Price: only this package opens the checkpoints (`import eclectus.models` registers the classes); no server does.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from eclectus.models.mixture.families import LAYERED


class _Layered:
    """What the three classes share; stands before the stock class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        counts = config.experts_per_layer
        if not isinstance(counts, list | tuple) or len(counts) != config.num_hidden_layers:
            raise ValueError(
                f"experts_per_layer is {counts!r} for {config.num_hidden_layers} layers; give one number of experts each"
            )
        for layer, count in zip(self.model.layers, counts, strict=True):
            own = copy.copy(config)
            own.num_local_experts = own.num_experts = count
            layer.mlp = type(layer.mlp)(own)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> MoeCausalLMOutputWithPast:
        """As the stock class, without its auxiliary loss, which is defined for one number of experts only."""
        outputs: MoeModelOutputWithPast = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep if logits_to_keep else None :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class LayeredMixtralConfig(MixtralConfig):
    """experts_per_layer: experts of each layer, the original one included."""

    model_type = LAYERED + "mixtral"
    experts_per_layer: list[int] | None = None


class LayeredQwen2MoeConfig(Qwen2MoeConfig):
    """experts_per_layer: experts of each layer, the original one included."""

    model_type = LAYERED + "qwen2_moe"
    experts_per_layer: list[int] | None = None


class LayeredQwen3MoeConfig(Qwen3MoeConfig):
    """experts_per_layer: experts of each layer, the original one included."""

    model_type = LAYERED + "qwen3_moe"
    experts_per_layer: list[int] | None = None


class LayeredMixtralForCausalLM(_Layered, MixtralForCausalLM):
    config_class: ClassVar = LayeredMixtralConfig


class LayeredQwen2MoeForCausalLM(_Layered, Qwen2MoeForCausalLM):
    config_class: ClassVar = LayeredQwen2MoeConfig


class LayeredQwen3MoeForCausalLM(_Layered, Qwen3MoeForCausalLM):
    config_class: ClassVar = LayeredQwen3MoeConfig


for _model in (LayeredMixtralForCausalLM, LayeredQwen2MoeForCausalLM, LayeredQwen3MoeForCausalLM):
    _type = _model.config_class.model_type
    AutoConfig.register(_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
    # Files hold one tensor an expert and matrix; the stock rule that stacks them serves here too.
    register_checkpoint_conversion_mapping(
        _type, get_checkpoint_conversion_mapping(_type.removeprefix(LAYERED)), overwrite=True
    )
