"""Configuration of a Lory model: LLaMA's, plus experts, segments and routing (docs/methods.md 1)."""

from typing import Any, ClassVar

from transformers import LlamaConfig

ROUTINGS = ("causal_segment", "prefix", "dense")
FIRST_SEGMENTS = ("stop_gradient", "uniform")
GENERATION_ROUTINGS = ("prompt", "segment")

# 0.3b and 1.5b are the paper's (docs/methods.md 1.5); the others are named by their active parameters per token.
PRESETS: dict[str, dict[str, Any]] = {
    "1.5b": dict(hidden_size=1536, intermediate_size=4096, num_hidden_layers=48, num_attention_heads=24,
                 max_position_embeddings=4096),
    "0.3b": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
                 max_position_embeddings=4096),
    "100m": dict(hidden_size=768, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=12,
                 max_position_embeddings=2048, tie_word_embeddings=True),
    "30m": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=6,
                max_position_embeddings=2048, tie_word_embeddings=True),
    "laptop": dict(vocab_size=4096, hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
                   max_position_embeddings=512, tie_word_embeddings=True, segment_length=64,
                   router_initializer_range=0.1),
}  # fmt: skip


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError naming the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


class LoryConfig(LlamaConfig):
    """A LLaMA-shaped model whose FFNs are mixtures of merged experts. LLaMA's fields keep their meaning.

    Args:
        num_experts: E, expert FFNs per layer. With 1 the model is dense and has no router.
        segment_length: T, tokens that share one routing decision.
        routing: "causal_segment" routes a segment by the one before it (docs/methods.md 1.2); "prefix" routes
            everything by the first segment (the paper's ablation); "dense" uses expert 0 alone.
        first_segment: how the first segment is routed. "stop_gradient": by its own tokens, detached (as in the paper;
            it looks ahead within the segment). "uniform": with equal weights, which is strictly causal.
        generation_routing: how `generate` routes. "prompt" merges the experts once by the whole prompt (docs/methods.md
            1.4); "segment" routes again at every segment border, as in training.
        router_initializer_range: standard deviation of the routers' initial weights. It must not be 0: a constant
            router never separates experts that start as copies (docs/methods.md 1.3).
        output_router_weights: return every layer's routing weights from the forward pass.
        merge_block_bytes: memory for merged weights in one layer's pass; chosen by device when None.
    """

    model_type = "lory"
    base_model_tp_plan: ClassVar = {}
    base_model_pp_plan: ClassVar = {}

    num_experts: int = 8
    segment_length: int = 256
    routing: str = "causal_segment"
    first_segment: str = "stop_gradient"
    generation_routing: str = "prompt"
    router_initializer_range: float = 0.02
    output_router_weights: bool = False
    merge_block_bytes: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("first_segment", self.first_segment, FIRST_SEGMENTS)
        check_choice("generation_routing", self.generation_routing, GENERATION_ROUTINGS)
        for name in ("num_experts", "segment_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1.")
        if self.hidden_act != "silu" or self.mlp_bias:
            raise ValueError(
                f"Lory's experts are SwiGLU FFNs without biases, but hidden_act is {self.hidden_act!r} and mlp_bias is "
                f"{self.mlp_bias}; set hidden_act='silu' and mlp_bias=False."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LoryConfig":
        """The named size ("0.3b", "1.5b", "100m", "30m", "laptop") with any field overridden."""
        check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LoryConfig":
        """As in transformers, but refuses a checkpoint of another architecture instead of loading a part of it."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This checkpoint's config.json says model_type {model_type!r}, expected 'lory'; load it with its own "
                "class and convert a Llama model with LoryForCausalLM.from_dense."
            )
        return super().from_dict(config_dict, **kwargs)
