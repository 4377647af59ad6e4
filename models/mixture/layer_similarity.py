"""How similar languages are in each layer of a dense model, and how many new experts each layer needs (LayerMoE).

    S_l = mean over pairs (known language, new language) of the cosine between their mean FFN inputs in layer l
    N_l proportional to 1 / S_l, sum N_l = budget                              (docs/methods.md 2.7; arXiv 2505.22582)

A layer in which languages are similar treats them alike and needs few new experts. LayerMoE rounds every N_l up, which
exceeds the budget by up to one expert per layer; here N_l is rounded down and the largest remainders get the rest, so
that the sum is the budget. Cost: one forward pass over the sample, one vector per layer and language.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# A smaller similarity, of opposite or unrelated languages, would assign the whole budget to its layer.
LEAST_SIMILARITY = 0.01


@torch.no_grad()
def ffn_input_means(model: PreTrainedModel, samples: Mapping[str, Tensor], batch: int = 8) -> dict[str, Tensor]:
    """Mean input of every layer's FFN by language, `[layers, hidden]` fp32 on the CPU.

    model: a dense (or upcycled) causal language model with `model.layers[i].mlp`. samples: by language, token ids
    `[n, length]` without padding. batch: rows per forward pass. Raises ValueError for an empty sample.
    """
    layers = list(model.model.layers)
    sums: list[Tensor] = []
    hooks = [layer.mlp.register_forward_pre_hook(_summing(sums)) for layer in layers]
    device = next(model.parameters()).device
    means = {}
    was_training = model.training
    model.eval()
    try:
        for language, tokens in samples.items():
            if tokens.numel() == 0:
                raise ValueError(f"the sample of language '{language}' is empty; give some token ids")
            total = torch.zeros(len(layers), model.config.hidden_size, dtype=torch.float64)
            for rows in tokens.split(batch):
                sums.clear()
                model.model(input_ids=rows.to(device), use_cache=False)
                total += torch.stack(sums).double().cpu()
            means[language] = (total / tokens.numel()).float()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return means


def layer_similarity(means: Mapping[str, Tensor], known: Sequence[str], new: Sequence[str]) -> list[float]:
    """S_l: by layer, the mean cosine between the mean FFN inputs of each known and each new language.

    Raises ValueError for a language without a sample, for no language, and for one that is both known and new.
    """
    if not known or not new:
        raise ValueError("similarity needs at least one known and one new language")
    for language in (*known, *new):
        if language not in means:
            raise ValueError(f"no sample of language '{language}'; there are samples of {', '.join(means)}")
    if both := set(known) & set(new):
        raise ValueError(f"'{min(both)}' is given as a known and as a new language; leave it out of one")
    pairs = [F.cosine_similarity(means[a], means[b], dim=-1) for a in known for b in new]
    return torch.stack(pairs).mean(0).tolist()


def propose_experts(similarity: Sequence[float], budget: int) -> list[int]:
    """New experts per layer, `budget` in all: in inverse proportion to similarity, at least one per layer.

    Raises ValueError if the budget is less than one expert per layer.
    """
    layers = len(similarity)
    if budget < layers:
        raise ValueError(f"a budget of {budget} new experts is less than one for each of {layers} layers")
    inverse = [1 / max(value, LEAST_SIMILARITY) for value in similarity]
    counts = [0] * layers
    open_layers = list(range(layers))
    # Layers whose share is below one get one, at the expense of the others.
    while True:
        left = budget - sum(counts[layer] for layer in range(layers) if layer not in open_layers)
        weight = sum(inverse[layer] for layer in open_layers)
        short = [layer for layer in open_layers if left * inverse[layer] / weight < 1]
        if not short:
            break
        for layer in short:
            counts[layer] = 1
            open_layers.remove(layer)
    shares = {layer: left * inverse[layer] / weight for layer in open_layers}
    for layer, share in shares.items():
        counts[layer] = int(share)
    by_remainder = sorted(open_layers, key=lambda layer: (counts[layer] - shares[layer], layer))
    for layer in by_remainder[: budget - sum(counts)]:
        counts[layer] += 1
    return counts


def _summing(sums: list[Tensor]) -> Callable[..., None]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.append(inputs[0].float().flatten(0, -2).sum(0))

    return add
