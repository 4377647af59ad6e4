"""Mixtures with a different number of experts per layer: the stock MoE classes with a count for each layer.

Mixtral, Qwen2Moe and Qwen3Moe have one `num_local_experts` for all layers, and unused experts cannot be masked exactly:
a router row without a bias cannot keep an expert out of the top K for every input (see models/mixture/extend_again.py).
So the layouts of LayerMoE (docs/methods.md 2.7) need these classes. Apart from the counts they are stock, and tensor
names in the files are too. This package loads the checkpoints (`import eclectus.models` registers the classes). An
export carries this file, so that transformers 5 and vLLM load it with trust_remote_code: it imports nothing of ours.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2MoeModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

# As in models/checkpoints/families.py.
LAYERED = "layered_"

# The stock class is a later base of each class below; type checkers see its members through PreTrainedModel.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object


def _set_experts(layers: Any, config: Any) -> None:
    """Gives every layer the number of experts that config.experts_per_layer has for it."""
    counts = config.experts_per_layer
    if not isinstance(counts, list | tuple) or len(counts) != config.num_hidden_layers:
        raise ValueError(
            f"experts_per_layer is {counts!r} for {config.num_hidden_layers} layers; give one number per layer"
        )
    for layer, count in zip(layers, counts, strict=True):
        own = copy.copy(config)
        own.num_local_experts = own.num_experts = count
        layer.mlp = type(layer.mlp)(own)


class _LayeredBody(_Base):
    """The common part of the three classes without an output layer, which vLLM builds."""

    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _set_experts(self.layers, config)
        self.post_init()


class _Layered(_Base):
    """The common part of the three classes."""

    # From the stock class.
    model: Any
    lm_head: nn.Linear
    vocab_size: int

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _set_experts(self.model.layers, config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> MoeCausalLMOutputWithPast:
        """As in the stock class, without its auxiliary loss, which is defined for equal numbers of experts only."""
        outputs: MoeModelOutputWithPast = self.model(input_ids=input_ids, **kwargs)
        assert outputs.last_hidden_state is not None  # optional only in the type of transformers' output
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


class LayeredMixtralModel(_LayeredBody, MixtralModel):
    config_class = LayeredMixtralConfig


class LayeredMixtralForCausalLM(_Layered, MixtralForCausalLM):
    config_class = LayeredMixtralConfig


class LayeredQwen2MoeModel(_LayeredBody, Qwen2MoeModel):
    config_class = LayeredQwen2MoeConfig


class LayeredQwen2MoeForCausalLM(_Layered, Qwen2MoeForCausalLM):
    config_class = LayeredQwen2MoeConfig


class LayeredQwen3MoeModel(_LayeredBody, Qwen3MoeModel):
    config_class = LayeredQwen3MoeConfig


class LayeredQwen3MoeForCausalLM(_Layered, Qwen3MoeForCausalLM):
    config_class = LayeredQwen3MoeConfig


for _model, _body in (
    (LayeredMixtralForCausalLM, LayeredMixtralModel),
    (LayeredQwen2MoeForCausalLM, LayeredQwen2MoeModel),
    (LayeredQwen3MoeForCausalLM, LayeredQwen3MoeModel),
):
    _type = _model.config_class.model_type
    AutoConfig.register(_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _body, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
    # Files hold one tensor per expert and matrix; the stock rule that stacks them applies here too.
    register_checkpoint_conversion_mapping(
        _type, get_checkpoint_conversion_mapping(_type.removeprefix(LAYERED)), overwrite=True
    )
