"""A plain forward pass in float64, by which the proofs check what transformers computes.

A proof made by the reader that may be wrong proves nothing, so this shares no code with transformers and reads the
config or a GGUF file's metadata by itself: RMSNorm, grouped-query attention with rotary positions (docs/methods.md
2.7), SwiGLU, and in mixtures the softmax of the router, whose top-k weights are made to sum to 1. Weights are read one
matrix at a time. Cost: memory for one matrix in float64 and one head group's scores.

Names are llama.cpp's: `blk.3.attn_q.weight`. `halves` rotates dimension i with i + d/2 (transformers, Qwen in
llama.cpp), `neighbours` 2i with 2i + 1 (Llama in llama.cpp, whose q and k rows are stored in that order).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eclectus.models.checkpoints.families import Family, UnsupportedModelError
from eclectus.models.checkpoints.tensor_files import CheckpointError, TensorSource

# Rows of the output matrix that are widened to float64 at once.
HEAD_ROWS = 8192
ROUTER = "ffn_gate_inp.weight"
# Names in a transformers checkpoint.
MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * x.sigmoid(),
    "swish": lambda x: x * x.sigmoid(),
    "gelu": lambda x: 0.5 * x * (1 + (x / math.sqrt(2)).erf()),
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": lambda x: x.clamp_min(0),
    "relu2": lambda x: x.clamp_min(0).square(),
}


@dataclass(frozen=True)
class Rope:
    """How positions rotate queries and keys."""

    base: float
    kind: str = "default"
    factor: float = 1.0
    original: float = 0.0
    """Positions of the model before its range was extended."""
    fast: float = 32.0
    slow: float = 1.0
    """Of yarn: rotations within `original` from which a dimension stays, and up to which it is interpolated."""
    truncate: bool = True
    low: float = 1.0
    high: float = 4.0
    """Of llama3: the same, as `original` divided by the wavelength."""
    long: tuple[float, ...] = ()
    short: tuple[float, ...] = ()
    divisors: tuple[float, ...] = ()
    """A divisor for each frequency, on top of the rest (rope_freqs of a GGUF file)."""
    scale: float = 1.0
    """Factor of rotated queries and keys."""

    def frequencies(self, width: int, positions: int) -> Tensor:
        """Angle per position of each pair of dimensions, `[width / 2]`. positions: the largest one, plus 1."""
        pair = torch.arange(width // 2, dtype=torch.float64)
        base = self.base
        if self.kind == "dynamic" and positions > self.original:
            base *= (self.factor * positions / self.original - (self.factor - 1)) ** (width / (width - 2))
        plain = base ** (-2 * pair / width)
        if self.kind == "linear":
            plain = plain / self.factor
        elif self.kind == "yarn":
            plain = self._mixed(plain, 1 - self._yarn_ramp(pair, width))
        elif self.kind == "llama3":
            turns = self.original * plain / (2 * math.pi)
            plain = self._mixed(plain, ((turns - self.low) / (self.high - self.low)).clamp(0, 1))
        elif self.kind == "longrope":
            plain = plain / torch.tensor(self.long if positions > self.original else self.short, dtype=torch.float64)
        return plain / torch.tensor(self.divisors, dtype=torch.float64) if self.divisors else plain

    def _mixed(self, plain: Tensor, kept: Tensor) -> Tensor:
        return plain * kept + plain / self.factor * (1 - kept)

    def _yarn_ramp(self, pair: Tensor, width: int) -> Tensor:
        ends = [
            width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.base))
            for turns in (self.fast, self.slow)
        ]
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if self.truncate else ends
        low, high = max(low, 0), min(high, width - 1)
        return ((pair - low) / max(high - low, 0.001)).clamp(0, 1)


@dataclass(frozen=True)
class ReferenceModel:
    """A dense model or a mixture of experts as its files describe it."""

    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    epsilon: float
    rope: Rope
    pairs: Literal["halves", "neighbours"]
    windows: tuple[int | None, ...]
    """By layer, tokens that a token sees, itself included."""
    activation: str
    """Of the FFN's gate, by transformers' name."""
    weight: Callable[[str], Tensor | None]
    """The tensor of one of llama.cpp's names, None if the model has none."""
    experts_per_token: int = 0
    expert: Callable[[int, int, str], Tensor] | None = None
    """Of a mixture, the matrix (`ffn_gate`, `ffn_up`, `ffn_down`) of an expert, by layer and expert."""

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor, frequencies: Tensor | None = None) -> Tensor:
        """Logits `[n, length, vocabulary]` in float64 on tokens and positions `[n, length]`.

        frequencies: rounded ones to use, `[head_width / 2]`, in fp32. At far positions their last bit shows, so compare
        these first.
        """
        if frequencies is None:
            frequencies = self.rope.frequencies(self.head_width, int(positions.max()) + 1).float()
        angles = (positions.float().unsqueeze(-1) * frequencies.float()).double().unsqueeze(1)
        rotation = angles.cos() * self.rope.scale, angles.sin() * self.rope.scale
        x = self._needed("token_embd.weight")[tokens].double()
        for layer in range(self.layers):
            x = x + self._attention(layer, self._norm(x, f"blk.{layer}.attn_norm"), rotation)
            x = x + self._feed_forward(layer, self._norm(x, f"blk.{layer}.ffn_norm"))
        x, head = self._norm(x, "output_norm"), self.weight("output.weight")
        rows = self._needed("token_embd.weight") if head is None else head
        return torch.cat([x @ part.double().T for part in rows.split(HEAD_ROWS)], -1)

    def _feed_forward(self, layer: int, y: Tensor) -> Tensor:
        router = self.weight(f"blk.{layer}.{ROUTER}")
        if router is None:
            gate = _ACTIVATIONS[self.activation](self._linear(y, f"blk.{layer}.ffn_gate"))
            return self._linear(gate * self._linear(y, f"blk.{layer}.ffn_up"), f"blk.{layer}.ffn_down")
        assert self.expert is not None
        chosen = (y @ router.double().T).softmax(-1).topk(self.experts_per_token)
        shares, mixed = chosen.values / chosen.values.sum(-1, keepdim=True), torch.zeros_like(y)
        for number in range(len(router)):
            share = (shares * (chosen.indices == number)).sum(-1)
            if (rows := share > 0).any():
                gate, up, down = (self.expert(layer, number, f"ffn_{part}").double() for part in ("gate", "up", "down"))
                inner = _ACTIVATIONS[self.activation](y[rows] @ gate.T) * (y[rows] @ up.T)
                mixed[rows] += share[rows].unsqueeze(-1) * (inner @ down.T)
        return mixed

    def _needed(self, name: str) -> Tensor:
        value = self.weight(name)
        if value is None:
            raise CheckpointError(f"the model has no tensor {name} (in llama.cpp's naming)")
        return value

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weight(f"{name}.bias")
        y = x @ self._needed(f"{name}.weight").double().T
        return y if bias is None else y + bias.double()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self._needed(f"{name}.weight").double()

    def _attention(self, layer: int, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        prefix, length = f"blk.{layer}.attn", x.shape[1]
        q, k, v = (
            self._linear(x, f"{prefix}_{part}").unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in "qkv"
        )
        if self.weight(f"{prefix}_q_norm.weight") is not None:
            q, k = self._norm(q, f"{prefix}_q_norm"), self._norm(k, f"{prefix}_k_norm")
        q, k = self._rotated(q, rotation), self._rotated(k, rotation)
        index = torch.arange(length)
        distance = index[:, None] - index
        hidden = distance < 0
        if (window := self.windows[layer]) is not None:
            hidden = hidden | (distance >= window)
        mixed = []
        for head in range(self.heads):
            of = head * self.key_value_heads // self.heads
            scores = q[:, head] @ k[:, of].transpose(1, 2) / math.sqrt(self.head_width)
            mixed.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, of])
        return self._linear(torch.cat(mixed, -1), f"{prefix}_output")

    def _rotated(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rotation
        if self.pairs == "halves":
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def reference_of(
    raw: dict[str, Any], resolved: dict[str, Any], tensors: TensorSource, where: object, moe: Family | None = None
) -> ReferenceModel:
    """The model of a transformers checkpoint.

    raw: config.json as it stands. resolved: the config with the defaults of its class, for keys that `raw` lacks.
    moe: the family of a mixture; Qwen2Moe's shared expert, which is 0, is left out. Raises UnsupportedModelError for
    positions that are not known here.
    """
    config = resolved | {key: value for key, value in raw.items() if value is not None}
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    width = config.get("head_dim") or config["hidden_size"] // heads

    def weight(name: str) -> Tensor | None:
        if name.endswith(ROUTER):
            return tensors.tensor(moe.router_name(int(name.split(".")[1]))) if moe else None
        stored = stored_name(name)
        return tensors.tensor(stored) if stored in tensors.specs else None

    def expert(layer: int, number: int, matrix: str) -> Tensor:
        assert moe is not None
        return tensors.tensor(moe.expert_name(layer, number, f"{matrix.removeprefix('ffn_')}_proj"))

    return ReferenceModel(
        layers,
        heads,
        config.get("num_key_value_heads") or heads,
        width,
        config["rms_norm_eps"],
        _rope_of(raw, config, width, where),
        "halves",
        _windows(raw, config, layers),
        _activation(config, where),
        weight,
        config["num_experts_per_tok"] if moe else 0,
        expert if moe else None,
    )


def _activation(config: dict[str, Any], where: object) -> str:
    name = config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"{where} has hidden_act {name!r}, which no proof here can check")
    return name


def stored_name(name: str) -> str:
    """The name in a transformers checkpoint of one of llama.cpp's, such as `blk.3.attn_q.weight`."""
    *block, part, kind = name.split(".")
    return f"model.layers.{block[1]}.{LAYER_NAMES[part]}.{kind}" if block else f"{MODEL_NAMES[part]}.{kind}"


def _windows(raw: dict[str, Any], config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    # A null is a value here: no window.
    window = raw.get("sliding_window", config.get("sliding_window"))
    qwen = config["model_type"].startswith("qwen")
    if not window or config["model_type"] == "llama" or (qwen and not config.get("use_sliding_window")):
        return (None,) * layers
    if kinds := raw.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", layers) if qwen else 0
    return tuple(window if layer >= first else None for layer in range(layers))


def _rope_of(raw: dict[str, Any], config: dict[str, Any], width: int, where: object) -> Rope:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base = rope.get("rope_theta") or raw.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    if partial != 1.0 or kind not in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"):
        found = f"rope_type {kind!r}" if partial == 1.0 else f"partial_rotary_factor {partial}"
        raise UnsupportedModelError(f"{where} has {found}, which no proof here can check: it is not converted")
    limit = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or limit
    factor = float(rope.get("factor") or (limit / original if kind in ("yarn", "longrope", "default") else 0))
    if not factor:
        raise CheckpointError(f"{where}/config.json: rope_type {kind!r} has no factor; add it to rope_parameters")
    scale = 1.0
    if kind == "yarn":
        scale = _yarn_scale(rope, factor)
    elif kind == "longrope":
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        float(base),
        kind,
        factor,
        limit if kind == "dynamic" else original,
        fast=rope.get("beta_fast") or 32.0,
        slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
        low=rope.get("low_freq_factor", 1.0),
        high=rope.get("high_freq_factor", 4.0),
        long=tuple(rope.get("long_factor", ())),
        short=tuple(rope.get("short_factor", ())),
        scale=scale if rope.get("attention_factor") is None else rope["attention_factor"],
    )


def _yarn_scale(rope: dict[str, Any], factor: float) -> float:
    """The temperature of yarn (arXiv 2309.00071), and its form with two factors (DeepSeek)."""

    def one(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return one(rope["mscale"]) / one(rope["mscale_all_dim"])
    return one(1.0)
