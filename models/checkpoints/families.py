"""The dense families that can be upcycled, with the names of tensors and config keys in their MoE counterparts.

Llama and Mistral become Mixtral, Qwen2 becomes Qwen2Moe, Qwen3 becomes Qwen3Moe: stock transformers classes, so that
any server loads the result. Names of tensors and config keys are defined only here. Checkpoint files have one tensor
per expert and matrix (which vLLM and transformers 4 and 5 read); the modules of transformers 5 hold one `[experts,
...]` parameter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eclectus.models.checkpoints.writing import with_both_generations

MATRICES = ("gate_proj", "up_proj", "down_proj")
# Qwen2Moe always has a shared expert. With width 0, vLLM refuses its empty tensors (KeyError) and transformers reports
# them as missing; a narrow one of zeros adds exactly 0 and loads everywhere, also with tensor parallelism.
SHARED_EXPERT_WIDTH = 32
_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")


# Prefix of a stock MoE type for different numbers of experts per layer (models/mixture/layered.py).
LAYERED = "layered_"


class UnsupportedModelError(ValueError):
    """A checkpoint that cannot be upcycled; the message names it, what is supported, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", " "))


@dataclass(frozen=True)
class Family:
    """A dense architecture and the MoE architecture of its upcycled checkpoints."""

    dense: str
    moe: str
    architecture: str
    block: str
    """Name of the MoE block inside a layer, in checkpoint files."""
    matrices: tuple[str, str, str]
    """Names of an expert's gate, up and down projection, in checkpoint files."""

    @property
    def stock_moe(self) -> str:
        """The stock MoE type, without the prefix of a layered one."""
        return self.moe.removeprefix(LAYERED)

    def layered(self) -> "Family":
        """The same family in our class with different numbers of experts per layer."""
        return replace(self, moe=LAYERED + self.moe, architecture="Layered" + self.architecture)

    def expert_name(self, layer: int, expert: int, matrix: str) -> str:
        """Checkpoint name of one matrix (`gate_proj`, `up_proj`, `down_proj`) of one expert."""
        stored = self.matrices[MATRICES.index(matrix)]
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{stored}.weight"

    def stacked_names(self, module_name: str, experts: int) -> list[list[str]] | None:
        """For each expert, the checkpoint names of what a transformers 5 stack of experts holds of it, one behind the
        other (gate and up, or down); None for any other parameter."""
        owner, _, leaf = module_name.rpartition(".")
        if not owner.endswith(".mlp.experts"):
            return None
        layer, matrices = int(module_name.split(".")[2]), MATRICES[2:] if leaf == "down_proj" else MATRICES[:2]
        return [[self.expert_name(layer, expert, matrix) for matrix in matrices] for expert in range(experts)]

    def router_name(self, layer: int) -> str:
        """Checkpoint name of a layer's router, `[experts, hidden]`."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def parse_expert(self, name: str) -> tuple[int, int, str] | None:
        """(layer, expert, matrix) of an expert's checkpoint tensor, None for any other tensor."""
        match = re.fullmatch(rf"model\.layers\.(\d+)\.{self.block}\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is None or match[3] not in self.matrices:
            return None
        return int(match[1]), int(match[2]), MATRICES[self.matrices.index(match[3])]

    def is_routing(self, name: str) -> bool:
        """Whether a checkpoint tensor belongs to the router or the zero shared expert, which the base does not have."""
        return f".{self.block}.gate." in name or ".shared_expert" in name

    def stored_name(self, module_name: str) -> str:
        """Checkpoint name of a transformers 5 parameter outside the experts."""
        return module_name.replace(".mlp.", f".{self.block}.")


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
FAMILIES = {
    "llama": Family("llama", "mixtral", "MixtralForCausalLM", "block_sparse_moe", _MIXTRAL),
    "mistral": Family("mistral", "mixtral", "MixtralForCausalLM", "block_sparse_moe", _MIXTRAL),
    "qwen2": Family("qwen2", "qwen2_moe", "Qwen2MoeForCausalLM", "mlp", _QWEN),
    "qwen3": Family("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", "mlp", _QWEN),
}
MOE_FAMILIES = {family.moe: family for family in FAMILIES.values()}
_LAYERED_FAMILIES = [family.layered() for family in MOE_FAMILIES.values()]
MOE_FAMILIES |= {family.moe: family for family in _LAYERED_FAMILIES}


def dense_ffn(layer: int, matrix: str) -> str:
    """Name of a dense FFN matrix, in checkpoint files and modules alike."""
    return f"model.layers.{layer}.mlp.{matrix}.weight"


def parse_dense_ffn(name: str) -> tuple[int, str] | None:
    """(layer, matrix) of a dense FFN tensor, None for any other tensor."""
    match = _FFN.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def family_of(config: dict[str, Any], where: str | Path, trust_remote_code: bool = False) -> Family:
    """The dense family of a config. Raises UnsupportedModelError with the reason if it cannot be upcycled.

    trust_remote_code: whether a model of a supported family may have its own code (auto_map).
    """
    model_type = config.get("model_type")
    supported = ", ".join(FAMILIES)
    if config.get("auto_map") and not trust_remote_code:
        raise UnsupportedModelError(
            f"{where} brings its own code (auto_map in config.json), which is not run by default: read it, then use "
            f"eclectus upcycle --trust-remote-code, or save it from a stock class first (supported: {supported})"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"{where} is a {model_type!r} model; bases that can be upcycled: {supported}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedModelError(f"{where} is quantised ({method}): upcycle the unquantised checkpoint instead")
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModelError(f"{where} is a {architectures[0]}, expected a causal language model")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and model_type in ("llama", "mistral"):
            raise UnsupportedModelError(f"{where} has {key}: true, which its MoE class (Mixtral) does not support")
    windows = set(config.get("layer_types") or ["full_attention"])
    if len(windows) > 1 and model_type != "qwen2":
        raise UnsupportedModelError(
            f"{where} mixes {' and '.join(sorted(windows))} layers, which its MoE class ({FAMILIES[model_type].moe}) "
            "cannot represent: all layers must be of one kind"
        )
    return FAMILIES[model_type]


def moe_family_of(config: dict[str, Any], where: str | Path) -> Family:
    """The family of an upcycled config: by its recorded base, else by its model type."""
    recorded = (config.get("upcycled_from") or {}).get("model_type")
    for family in (FAMILIES[recorded], FAMILIES[recorded].layered()) if recorded in FAMILIES else ():
        if family.moe == config.get("model_type"):
            return family
    if config.get("model_type") not in MOE_FAMILIES:
        raise UnsupportedModelError(
            f"{where} is a {config.get('model_type')!r} model, expected an upcycled one: {', '.join(MOE_FAMILIES)}"
        )
    return MOE_FAMILIES[config["model_type"]]


def moe_config(base: dict[str, Any], family: Family, experts: Sequence[int], top_k: int) -> dict[str, Any]:
    """config.json of the upcycled model: the base's values, routing, and the keys of transformers 4 and 5.

    base: the base's config from plain_config, every default resolved. experts: number per layer.
    """
    dropped = {"architectures", "model_type", "transformers_version", "pretraining_tp", "mlp_bias"}
    config = {key: value for key, value in base.items() if key not in dropped}
    config |= {
        "model_type": family.moe,
        "architectures": [family.architecture],
        "num_experts_per_tok": top_k,
        "num_local_experts": max(experts),
        "output_router_logits": False,
        # Our training has its own router losses; transformers' would be added to them.
        "router_aux_loss_coef": 0.0,
        "upcycled_from": base,
    }
    windows = base.get("layer_types") or []
    sliding = "sliding_attention" in windows
    if family.moe != family.stock_moe:
        config["experts_per_layer"] = list(experts)
    if family.stock_moe == "mixtral":
        config["router_jitter_noise"] = 0.0
        config.pop("attention_bias", None)
    else:
        config |= {
            "moe_intermediate_size": base["intermediate_size"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": sliding,
            "max_window_layers": windows.index("sliding_attention") if sliding else base["num_hidden_layers"],
        }
    if family.stock_moe == "qwen2_moe":
        config |= {"shared_expert_intermediate_size": SHARED_EXPERT_WIDTH, "qkv_bias": True}
    elif family.stock_moe == "qwen3_moe":
        config.pop("layer_types", None)
    return with_both_generations(config)
