"""Model FLOPs utilisation of a training step (MFU, PaLM: arXiv 2204.02311, appendix B).

    FLOPs per token = 6 x active parameters  +  12 x layers x heads x head size x length
    MFU             = tokens per second x FLOPs per token / peak of the devices

Experts count as often as a token passes through one, so a Lory model has the FLOPs of its dense twin: merging experts,
recomputing merged weights and gradient checkpointing are overhead, which MFU is meant to show. Embedding lookups do not
count. The peak is the vendor's figure for dense bf16 on a known GPU (models/forecast/gpus.py); on others it is measured
with a matrix product.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from eclectus.models.forecast.gpus import gpu_of_device
from eclectus.models.training.flops import count_parameters
from eclectus.models.training.parallel import config_of


def flops_per_token(model: nn.Module, length: int) -> float:
    """Forward and backward FLOPs of one token in instances of `length` tokens."""
    config = config_of(model)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * active_parameters(model) + 12.0 * config.num_hidden_layers * heads * head_size * length


def active_parameters(model: nn.Module) -> int:
    """Parameters that a token is multiplied with: matrices, norms, and those experts that it passes through."""
    _, active = count_parameters(model)
    lookups = (
        0
        if config_of(model).tie_word_embeddings
        else sum(parameter.numel() for name, parameter in model.named_parameters() if "embed_tokens" in name)
    )
    return active - lookups


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of one device: the vendor's figure, else measured."""
    if device.type == "cuda":
        found = gpu_of_device(torch.cuda.get_device_name(device))
        if found is not None:
            return found.dense * 1e12
    return _measured_peak(device)


@torch.no_grad()
def _measured_peak(device: torch.device, size: int = 768, turns: int = 5) -> float:
    """FLOP/s of the fastest of some products of two square matrices, in the dtype of training."""
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
