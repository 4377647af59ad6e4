"""How much of the machine a training step uses: model FLOPs utilisation (MFU, PaLM: arXiv 2204.02311, appendix B).

    FLOPs a token = 6 x parameters that a token is multiplied with  +  12 x layers x heads x head size x length
    MFU           = tokens a second x FLOPs a token / the devices' peak

Experts count as often as a token passes through one, so a Lory model has its dense twin's FLOPs: merging experts, computing
merged weights again and gradient checkpointing are overhead, which MFU is meant to show. Embeddings are looked up, not multiplied.
The peak is the maker's figure for dense bf16 on a known GPU; elsewhere it is what a matrix product reaches here and now.
"""

from __future__ import annotations

import time

import torch
from torch import nn

# Dense bf16 FLOP/s by a part of the name that CUDA tells; the longer names first.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def flops_per_token(model: nn.Module, length: int) -> float:
    """Forward and backward FLOPs of one token in instances of `length` tokens."""
    config = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * active_parameters(model) + 12.0 * config.num_hidden_layers * heads * head_size * length


def active_parameters(model: nn.Module) -> int:
    """Parameters that a token is multiplied with: matrices and norms, experts as often as it passes one."""
    config, active = model.config, 0
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    for name, parameter in model.named_parameters():
        if ".mlp.experts" in name and parameter.ndim == 3:
            active += parameter.numel() // parameter.shape[0] * min(chosen, parameter.shape[0])
        elif "embed_tokens" not in name or config.tie_word_embeddings:
            active += parameter.numel()
    return active


def peak_flops(device: torch.device) -> float:
    """FLOP/s that one process's device can reach."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak
    return _measured_peak(device)


@torch.no_grad()
def _measured_peak(device: torch.device, size: int = 768, turns: int = 5) -> float:
    """The fastest of some products of two square matrices, in the type that training computes in."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size *= 1 if device.type == "cpu" else 8
    left = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(turns + 1):
        begin = time.perf_counter()
        product = left @ left
        product[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
