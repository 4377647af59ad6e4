"""Lory: a fully differentiable mixture of experts for language models (docs/methods.md 1; arXiv 2405.03133).

A LLaMA whose FFNs are merged, segment by segment, from E experts: the mean hidden state of a segment gives the weights
with which the *next* segment's FFN is averaged. There is no top-k, no noise and no auxiliary loss. Attention, norms and
rotary embeddings are transformers' own, so that with one expert it is exactly a stock LlamaForCausalLM.

Cost over the dense model: E/T of the FFN's FLOPs (models/lory/merge.py) and E times its parameters.

    model = LoryForCausalLM(LoryConfig.preset("laptop"))
    model = LoryForCausalLM.from_dense(llama, num_experts=8, segment_length=256)
    model.generate(prompt_ids)                                     experts merged once by the prompt
    model.generate(prompt_ids, generation_routing="segment")       routed again at every segment border

Shapes: B rows, L tokens, N segments of T tokens, D width, F FFN width, E experts.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers before 5.18

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


from .config import FIRST_SEGMENTS, ROUTINGS, LoryConfig, check_choice
from .dense import dense_ffn_names, expand_dense_tensors
from .documents import DocumentPlan, document_mask
from .ffn import LoryFFN, LoryRouter
from .routing import LoryCache, RoutingPlan, check_expert_weights


@dataclass
class LoryModelOutput(BaseModelOutputWithPast):
    """The base model's output. router_weights: by layer `[B, N, E]`, the weights from each segment's own tokens.

    Of packed documents: `[1, P, E]`, and segments `[B, L]`, the number of each token's segment.
    """

    router_weights: tuple[Tensor, ...] | None = None
    segments: Tensor | None = None


@dataclass
class LoryCausalLMOutput(CausalLMOutputWithPast):
    """The language model's output; `router_weights` and `segments` as in LoryModelOutput."""

    router_weights: tuple[Tensor, ...] | None = None
    segments: Tensor | None = None


class LoryDecoderLayer(GradientCheckpointingLayer):
    """LLaMA's decoder layer with a LoryFFN."""

    def __init__(self, config: LoryConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = LoryFFN(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        plan: RoutingPlan,
        expert_weights: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden), past_key_values=past_key_values, **kwargs
        )
        hidden = hidden + attended
        cache = past_key_values if isinstance(past_key_values, LoryCache) else None
        return hidden + self.mlp(self.post_attention_layernorm(hidden), plan, expert_weights, cache)


class LoryPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to build, load, checkpoint and observe a Lory model."""

    config_class = LoryConfig
    config: LoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # transformers declares these four as instance variables, so ClassVar, which RUF012 asks for, would be a type error.
    _no_split_modules = ["LoryDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LoryDecoderLayer,
        "attentions": LlamaAttention,
        "router_weights": OutputRecorder(LoryRouter),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LoryRouter):
            init.normal_(module.weight, std=self.config.router_initializer_range)
        elif isinstance(module, LoryFFN):
            init.normal_(module.experts, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class LoryModel(LoryPreTrainedModel):
    """Embeddings, decoder layers and the final norm."""

    def __init__(self, config: LoryConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LoryDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        first_segment: str | None = None,
        expert_weights: Tensor | None = None,
        documents: Tensor | None = None,
        document_segments: int | None = None,
        **kwargs: Any,
    ) -> LoryModelOutput:
        """As LlamaModel; the further arguments are those of LoryForCausalLM."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")
        check_choice("routing", self.config.routing, ROUTINGS)
        check_choice("first_segment", first_segment or self.config.first_segment, FIRST_SEGMENTS)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if not hidden.shape[1]:
            raise ValueError("The input has no token; Lory needs at least one to route by.")
        if documents is not None:
            if attention_mask is not None or past_key_values is not None:
                raise ValueError("documents are of whole rows: leave out attention_mask and past_key_values.")
            use_cache = False
        past_key_values = self._check_cache(past_key_values, use_cache)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past_length).unsqueeze(0)
        if documents is None:
            plan = RoutingPlan.make(self.config, first_segment, hidden, attention_mask, past_length)
            causal_mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values, position_ids)
        else:
            plan = DocumentPlan.of_documents(self.config, first_segment, documents, document_segments)
            causal_mask = document_mask(self.config, hidden, documents)
        shared = dict(
            plan=plan,
            expert_weights=check_expert_weights(self.config, expert_weights),
            attention_mask=causal_mask,
            position_embeddings=self.rotary_emb(hidden, position_ids=position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        for layer in self.layers:
            hidden = layer(hidden, **shared)
        return LoryModelOutput(self.norm(hidden), past_key_values, segments=plan.numbers)

    def _check_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to use; a new one routes by segment, as a pass without a cache does."""
        dense = self.config.routing == "dense" or self.config.num_experts == 1
        if cache is None and use_cache:
            return DynamicCache(config=self.config) if dense else LoryCache(self.config, "segment")
        if cache is not None and not dense and not isinstance(cache, LoryCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, but Lory keeps its merged experts in the cache; pass "
                "LoryCache(model.config) instead."
            )
        return cache


class LoryForCausalLM(LoryPreTrainedModel, GenerationMixin):
    """A Lory model with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LoryConfig) -> None:
        super().__init__(config)
        self.model = LoryModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        first_segment: str | None = None,
        expert_weights: Tensor | None = None,
        documents: Tensor | None = None,
        document_segments: int | None = None,
        **kwargs: Any,
    ) -> LoryCausalLMOutput:
        """As LlamaForCausalLM (`labels` are shifted inside), with routing.

        Args:
            attention_mask: `[B, L]`, 0 at padding on either side. Padding is not part of any segment's mean, and
                segments start at a row's first real token. Leave it out if there is no padding.
            first_segment: overrides the configuration's for this call; "uniform" gives losses without look-ahead.
            expert_weights: `[layers, E]` or `[layers, B, E]`, used for every token instead of the routers'.
            documents: `[B, L]`, equal numbers within each document of a packed row: a document is then computed as if
                it stood alone, attention and routing (models/lory/documents.py). No cache, no attention_mask.
            document_segments: P, the segments of these documents, if it is known; else a GPU is waited for.
            output_router_weights: (keyword) return `router_weights`, a tuple over layers of `[B, N, E]`: the weights
                from each segment's own tokens, before the shift to the segment that uses them.
        """
        if use_cache is None and (self.training or labels is not None):
            use_cache = False
        outputs: LoryModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            first_segment=first_segment,
            expert_weights=expert_weights,
            documents=documents,
            document_segments=document_segments,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None  # optional only in the type of transformers' output
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return LoryCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_weights=outputs.router_weights,
            segments=outputs.segments,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, generation_routing: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers. `generation_routing`, which the cache uses, is listed so that `generate` accepts it."""
        # GenerationMixin types `self` by a protocol of its own, which no user's model class satisfies.
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(  # type: ignore[override]  # positional arguments differ between versions
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        routing = model_kwargs.pop("generation_routing", None) or self.config.generation_routing
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]  # `self` as above
        if self.config.routing == "dense" or self.config.num_experts == 1:
            return prepare(generation_config, model_kwargs, *args)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation is {generation_config.cache_implementation!r}, but Lory keeps its merged "
                    "experts in a dynamic cache; leave it unset."
                )
            positions = model_kwargs.get("position_ids")
            prompt_length = None if positions is None else positions.shape[-1]
            model_kwargs["past_key_values"] = LoryCache(self.config, routing, prompt_length=prompt_length)
        if routing == "prompt" and generation_config.use_cache is False:
            raise ValueError(
                "Prompt routing keeps its merged experts in the cache: set use_cache=True, or "
                "generation_routing='segment'."
            )
        if routing == "prompt" and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "Prompt routing looks at the whole prompt at once: unset prefill_chunk_size, or set "
                "generation_routing='segment'."
            )
        return prepare(generation_config, model_kwargs, *args)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the parent lists every keyword
        cls, pretrained_model_name_or_path: str | PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but weights that do not fit the configuration are an error, not initialised at random.

        Returns a LoryForCausalLM, with output_loading_info=True a pair of it and transformers' loading report.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"A safetensors file in {pretrained_model_name_or_path} is damaged or cut short ({error}); fetch or "
                "write the checkpoint again."
            ) from error
        model, info = loaded
        wrong = {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
        if any(wrong.values()):
            examples = "; ".join(f"{name}: {', '.join(keys[:3])}" for name, keys in wrong.items() if keys)
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit its configuration ({examples}); "
                "config.json and the safetensors files must come from one save_pretrained."
            )
        return (model, info) if with_info else model

    @classmethod
    def from_dense(
        cls,
        llama: LlamaForCausalLM,
        num_experts: int = 8,
        segment_length: int = 256,
        router_initializer_range: float = 0.02,
        seed: int = 0,
        shared_memory: bool = False,
        **config: Any,
    ) -> "LoryForCausalLM":
        """Copies a dense model's FFNs into experts: equal logits at the start for any router (docs/methods.md 1.5, 3).

        Args:
            llama: the dense model, SwiGLU without FFN biases. Its weights are copied.
            num_experts, segment_length, router_initializer_range: as in LoryConfig. The routers must not be zero, or
                the copies stay equal for ever.
            seed: of the routers' initial weights.
            shared_memory: make a layer's experts views of one FFN, so that the model is no larger than the dense one.
                They need memory of their own before any of them changes
                (`eclectus.models.training.parallel.copy_shared_experts`).
            config: any other LoryConfig field.
        """
        fields = {key: value for key, value in llama.config.to_dict().items() if key not in ("model_type", "auto_map")}
        fields |= dict(architectures=[cls.__name__], num_experts=num_experts, segment_length=segment_length)
        lory_config = LoryConfig(**{**fields, "router_initializer_range": router_initializer_range, **config})
        with torch.device("meta"):
            model = cls(lory_config)
        state = expand_dense_tensors(llama.state_dict(), num_experts, shared_memory=shared_memory)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith(".mlp.router.weight"):
                drawn = torch.randn(parameter.shape, generator=generator) * router_initializer_range
                state[name] = drawn.to(llama.dtype).to(llama.device)
        model.load_state_dict(state, assign=True)
        model.model.rotary_emb = LlamaRotaryEmbedding(config=lory_config).to(llama.device)
        model.tie_weights()
        return model.train(llama.training)

    def expert_parameter_map(self) -> dict[str, tuple[str, str, str]]:
        """By experts parameter, the dense (gate, up, down) parameters that `from_dense` copies into its experts.

        All other parameters, except the routers, have the names of the dense model.
        """
        return {f"model.layers.{index}.mlp.experts": dense_ffn_names(index) for index in range(len(self.model.layers))}


LoryConfig.register_for_auto_class()
LoryForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if "lory" not in CONFIG_MAPPING:
    AutoConfig.register("lory", LoryConfig)
    AutoModel.register(LoryConfig, LoryModel)
    AutoModelForCausalLM.register(LoryConfig, LoryForCausalLM)
