"""Names and shapes of the tensors of a checkpoint, from its config.json alone: without building the model.

    model.embed_tokens [V, H]   model.norm [H]   lm_head [V, H] unless tied
    layer   input_layernorm, post_attention_layernorm [H]
            self_attn  q_proj [heads * D, H]   k_proj, v_proj [groups * D, H]   o_proj [H, heads * D]
                       biases: qwen2 for q, k, v; others with attention_bias; qwen3 q_norm, k_norm [D]
            dense      mlp gate_proj, up_proj [I, H]   down_proj [H, I]
            mixture    the same for each expert, a router [experts, H], Qwen2Moe's shared expert
            Lory       mlp.experts [experts, 3 I, H], mlp.router [experts, H] if there are several

Each shape comes with the fields of config.json that it follows from, for messages.
"""

from collections.abc import Iterator
from typing import Any

from eclectus.models.checkpoints.families import MATRICES, Family, dense_ffn

# Shape, and the fields of config.json that decide it.
Expected = tuple[tuple[int, ...], str]
HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def expected_tensors(config: dict[str, Any], dense_type: str, moe: Family | None) -> dict[str, Expected]:
    """By name, every tensor that a checked config.json asks for.

    dense_type: the model type of the dense model (llama for Lory). moe: the family of a mixture.
    """
    vocabulary, width = config["vocab_size"], config["hidden_size"]
    table = (vocabulary, width), "vocab_size and hidden_size"
    found: dict[str, Expected] = {EMBEDDINGS: table, "model.norm.weight": ((width,), "hidden_size")}
    if not config.get("tie_word_embeddings"):
        found[HEAD] = table
    for layer in range(config["num_hidden_layers"]):
        found.update(_attention(config, dense_type, layer, moe is not None))
        if moe is not None:
            found.update(_mixture(config, moe, layer))
        elif config.get("model_type") == "lory":
            found.update(_lory(config, layer))
        else:
            found.update(_matrices(config, {matrix: dense_ffn(layer, matrix) for matrix in MATRICES}))
    return found


def _attention(config: dict[str, Any], dense_type: str, layer: int, mixture: bool) -> Iterator[tuple[str, Expected]]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    groups = config.get("num_key_value_heads") or heads
    prefix = f"model.layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{norm}.weight", ((width,), "hidden_size")
    asked = "num_attention_heads, head_dim and hidden_size"
    shared = "num_key_value_heads, head_dim and hidden_size"
    rows = {"q_proj": (heads * size, asked), "k_proj": (groups * size, shared), "v_proj": (groups * size, shared)}
    if dense_type == "qwen2":
        biased = {"q_proj", "k_proj", "v_proj"}
    else:
        biased = {*rows, "o_proj"} if config.get("attention_bias") and dense_type != "mistral" else set()
    for name, (count, fields) in rows.items():
        yield f"{prefix}self_attn.{name}.weight", ((count, width), fields)
        if name in biased:
            yield f"{prefix}self_attn.{name}.bias", ((count,), f"attention_bias, {fields}")
    yield f"{prefix}self_attn.o_proj.weight", ((width, heads * size), asked)
    if "o_proj" in biased:
        yield f"{prefix}self_attn.o_proj.bias", ((width,), "attention_bias and hidden_size")
    if dense_type == "qwen3":
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{norm}.weight", ((size,), "head_dim")


def _matrices(config: dict[str, Any], names: dict[str, str]) -> Iterator[tuple[str, Expected]]:
    """The three matrices of an FFN, named by matrix."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    for matrix, name in names.items():
        shape = (width, inner) if matrix == "down_proj" else (inner, width)
        yield name, (shape, "intermediate_size and hidden_size")
        if config.get("mlp_bias"):
            yield name.replace(".weight", ".bias"), (shape[:1], "mlp_bias")


def _mixture(config: dict[str, Any], family: Family, layer: int) -> Iterator[tuple[str, Expected]]:
    width = config["hidden_size"]
    layered = config.get("experts_per_layer")
    experts = layered[layer] if layered else config["num_local_experts"]
    yield family.router_name(layer), ((experts, width), "the number of experts and hidden_size")
    for expert in range(experts):
        yield from _matrices(config, {each: family.expert_name(layer, expert, each) for each in MATRICES})
    if family.stock_moe == "qwen2_moe":
        inner, prefix = config["shared_expert_intermediate_size"], f"model.layers.{layer}.mlp."
        fields = "shared_expert_intermediate_size and hidden_size"
        for matrix in MATRICES:
            shape = (width, inner) if matrix == "down_proj" else (inner, width)
            yield f"{prefix}shared_expert.{matrix}.weight", (shape, fields)
        yield f"{prefix}shared_expert_gate.weight", ((1, width), "hidden_size")


def _lory(config: dict[str, Any], layer: int) -> Iterator[tuple[str, Expected]]:
    width, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    prefix = f"model.layers.{layer}.mlp."
    yield f"{prefix}experts", ((experts, 3 * inner, width), "num_experts, intermediate_size and hidden_size")
    if experts > 1:
        yield f"{prefix}router.weight", ((experts, width), "num_experts and hidden_size")
