"""Does Lory's routing matter where its experts differ? Held-out text scored with weights that no router chose.

A trained model is scored again, without training, with the same expert weights for every segment of a domain:

    own      the mean of the weights that its routers gave to this domain
    other    the mean weights of another domain, for several others
    mean     the mean over all domains

If `other` is much worse than `own`, the experts hold knowledge that belongs to domains. If `own` is as good as the
routers themselves, nothing is gained by routing finer than by domain. Weights are measured on the very text that is
scored, which favours `own` and `mean` a little.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from eclectus.models.evaluation.scoring import Sums, Windows, score
from eclectus.models.training.process import Process

# Domains further along the list whose weights are tried.
OTHERS = (1, 4, 7)


class FixedRouting(nn.Module):
    """A Lory model whose routers are replaced by fixed expert weights `[layers, E]`; gives logits only."""

    def __init__(self, model: Any, weights: np.ndarray) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.weights = torch.from_numpy(weights.copy()).float()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        output = self.model(input_ids=input_ids, use_cache=False, expert_weights=self.weights.to(input_ids.device))
        output.router_weights = None
        return output


def with_fixed_weights(
    model: Any, windows: Windows, shares: list[np.ndarray], process: Process, batch: int = 16
) -> dict[str, list[float]]:
    """Bits by document for `own`, `mean` and each of the others (`other 1`, ...).

    shares: by layer [S, E], mean expert weights by domain, as the model's own routers gave them on the same text.
    """
    weights = np.stack(shares, axis=1)
    domains = len(weights)
    plans = {"own": weights, "mean": np.broadcast_to(weights.mean(0), weights.shape)}
    plans |= {f"other {shift}": np.roll(weights, -shift, axis=0) for shift in OTHERS if shift < domains}
    found = {}
    for name, of_domain in plans.items():
        bits = np.zeros(len(windows.bytes_per_token))
        for domain in range(domains):
            own = replace(windows, table=windows.table[windows.table[:, 3] == domain])
            if len(own.table):
                fixed = FixedRouting(model, of_domain[domain])
                sums: Sums = score(fixed, own, domains, process, batch, lambda done, total: None)
                bits += sums.bits
        found[name] = bits.round(2).tolist()
    return found
