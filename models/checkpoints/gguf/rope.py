"""Rotary positions in a GGUF file: as transformers' rope_parameters, and as llama.cpp computes them.

    ARCHITECTURE.rope.scaling.type    none, linear (also without a type), yarn; longrope is refused
    ARCHITECTURE.rope.scaling.factor, or rope.scale_linear of old files
    rope_freqs.weight                 a divisor for each frequency: Llama 3.1's scaling, whose settings the file lacks

Llama 3.1 divides frequencies of few turns within the original context by `factor`, leaves those of many, and mixes in
between by m = (turns - low) / (high - low), turns = original * frequency / 2 pi. So 1 / divisor = m + (1 - m) / factor,
m is linear in the frequency, and only two of (original, low, high) can be seen; low is 1 in all published models.
"""

import math
from typing import Any

import numpy as np

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.gguf.header import Metadata
from eclectus.models.checkpoints.reference import Rope

# Relative difference of divisors that are stored in fp32.
ROUNDING = 1e-5
# Context lengths of published models before their range was extended.
ORIGINALS = tuple(2**power for power in range(5, 21))


def rope_parameters(metadata: Metadata, divisors: list[float], width: int, limit: int) -> dict[str, Any]:
    """rope_parameters of config.json. divisors: rope_freqs. width: of a head. limit: the context length.

    Raises UnsupportedModelError, naming it, for scaling that transformers cannot express.
    """
    where, base = metadata.path, metadata.number("rope.freq_base", 10000.0)
    kind = metadata.get("rope.scaling.type")
    # A factor of 0 is none.
    given = [key for key in ("rope.scaling.factor", "rope.scale_linear") if metadata.get(key)]
    factor = metadata.number(given[0]) if given else 1.0
    original = metadata.whole("rope.scaling.original_context_length", limit)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind not in (None, "", "none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{where} has {metadata.architecture}.rope.scaling.type = {kind}, which is not read here: give the "
            "safetensors checkpoint"
        )
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(factor)}
        rope["original_max_position_embeddings"] = original
        rope |= _yarn_settings(metadata)
    elif kind != "none" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    if any(divisor != 1.0 for divisor in divisors):
        if rope["rope_type"] != "default":
            raise UnsupportedModelError(f"{where} has both rope_freqs.weight and {rope['rope_type']} scaling")
        rope |= _llama3(where, divisors, base, width, original, limit)
    return rope


def _yarn_settings(metadata: Metadata) -> dict[str, float]:
    """Yarn's settings beyond the factor. Its temperature is llama.cpp's times `attn_factor`."""
    settings = {}
    for key, name, usual in (("yarn_beta_fast", "beta_fast", 32.0), ("yarn_beta_slow", "beta_slow", 1.0)):
        value = metadata.number(f"rope.scaling.{key}", usual)
        if value != usual:
            settings[name] = float(value)
    temperature = metadata.number("rope.scaling.yarn_attn_factor", 1.0)
    temperature *= metadata.number("rope.scaling.attn_factor", 1.0)
    if temperature != 1.0:
        settings["attention_factor"] = temperature * (1 + 0.1 * math.log(metadata.number("rope.scaling.factor", 1.0)))
    if metadata.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{metadata.path} has {metadata.architecture}.rope.scaling.yarn_ext_factor, which transformers cannot "
            "express: give the safetensors checkpoint"
        )
    return settings


def _llama3(where: object, divisors: list[float], base: float, width: int, original: int, limit: int) -> dict[str, Any]:
    """The settings of Llama 3.1 that give these divisors. original: a first guess. limit: the context length."""
    frequency = base ** (-2 * np.arange(width // 2) / width)
    found = np.array(divisors)
    if len(found) == len(frequency) and found.min() >= 1 - ROUNDING:
        factor = float(_rounded(found.max()))
        guesses = [(size, 1.0, 4.0) for size in (original, 8192, *ORIGINALS)]
        for guess in [*guesses, *_solved(found, frequency, factor)]:
            turns = guess[0] * frequency / (2 * math.pi)
            mix = np.clip((turns - guess[1]) / (guess[2] - guess[1]), 0, 1)
            if np.abs((mix + (1 - mix) / factor) * found - 1).max() <= ROUNDING:
                # Only their ratio matters, and there is no original context beyond the present one.
                shrunk = min(1.0, limit / guess[0])
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": guess[1] * shrunk,
                    "high_freq_factor": guess[2] * shrunk,
                    "original_max_position_embeddings": min(limit, guess[0]),
                }
    raise UnsupportedModelError(
        f"{where} has a tensor rope_freqs.weight that is not Llama 3.1's scaling of positions: give the safetensors "
        "checkpoint"
    )


def _rounded(value: float) -> float:
    """A number that was stored in fp32, as it was written."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 1e-6 * value else value


def _solved(found: np.ndarray, frequency: np.ndarray, factor: float) -> list[tuple[int, float, float]]:
    """(original, 1, high) from the divisors between 1 and the factor; or from where they jump, if there are none."""
    between = (found > 1 + ROUNDING) & (found < factor * (1 - ROUNDING))
    mix = (1 / found[between] - 1 / factor) / (1 - 1 / factor)
    if between.sum() == 1:
        return [(max(1, round((1 + 3 * mix[0]) * 2 * math.pi / frequency[between][0])), 1.0, 4.0)]
    if between.any():
        slope, offset = np.polyfit(frequency[between], mix, 1)
        high = 1 - 1 / offset if offset else 0.0
        return [(max(1, round(slope * (high - 1) * 2 * math.pi)), 1.0, float(f"{high:.6g}"))] if high > 1 else []
    kept = int((found < 1 + ROUNDING).sum())
    original = math.floor(2 * math.pi / frequency[kept]) if kept < len(found) else 0
    high = min(4.0, original * frequency[kept - 1] / (2 * math.pi)) if kept else 4.0
    return [(original, 1.0, float(high))] if original and high > 1 else []


def reference_rope(values: dict[str, Any], architecture: str, divisors: list[float]) -> Rope:
    """The positions as llama.cpp computes them (`llama_context`, `ggml_rope_yarn`)."""

    def value(key: str, default: Any) -> Any:
        return values.get(f"{architecture}.rope.{key}", default)

    factor = value("scaling.factor", 0.0) or value("scale_linear", 0.0) or 1.0
    kind = value("scaling.type", "") or "linear"
    base = float(value("freq_base", 10000.0))
    if kind == "yarn":
        scale = (
            (1 + 0.1 * math.log(factor)) * value("scaling.attn_factor", 1.0) * value("scaling.yarn_attn_factor", 1.0)
        )
        return Rope(
            base,
            "yarn",
            float(factor),
            float(value("scaling.original_context_length", values[f"{architecture}.context_length"])),
            fast=float(value("scaling.yarn_beta_fast", 32.0)),
            slow=float(value("scaling.yarn_beta_slow", 1.0)),
            scale=scale,
            divisors=tuple(divisors),
        )
    return Rope(base, "linear", 1.0 if kind == "none" else float(factor), divisors=tuple(divisors))
