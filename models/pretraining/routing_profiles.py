"""Mean routing of a trained Lory model on its training data, by domain and language; `export_dense` merges by it.

    profile of a domain = mean over its tokens of the routing weights from their own segment     [layers, E]

The profiles are stored with the weights, in `routing_weights.json`:
{"domain": {"legal": [[...E], ...layers]}, "language": {...}}. Cost: a forward pass over at most INSTANCES_EACH
instances per domain and language.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.loop import autocast
from eclectus.models.training.process import Process

ROUTING_FILE = "routing_weights.json"
INSTANCES_EACH = 16
Profiles = dict[str, dict[str, list[list[float]]]]


@torch.no_grad()
def routing_profiles(model: LoryForCausalLM, instances: Instances, micro_batch: int, process: Process) -> Profiles:
    """Mean routing weights by domain and by language. All processes must call it, and get the same result."""
    model.eval()
    names = {"domain": instances.domains, "language": instances.languages}
    chosen = _spread(instances)
    # A sharded model needs equally many forward passes in all processes; repeated rows have weight 0.
    each_reads = -(-len(chosen) // process.world)
    rows = np.resize(chosen, each_reads * process.world)[process.rank :: process.world]
    counted = torch.arange(process.rank, each_reads * process.world, process.world) < len(chosen)
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    sums = {kind: torch.zeros(layers, len(each), experts, dtype=torch.float64) for kind, each in names.items()}
    tokens = {kind: torch.zeros(len(each), dtype=torch.float64) for kind, each in names.items()}
    for first in range(0, len(rows), micro_batch):
        batch = instances.batch(rows[first : first + micro_batch])
        with autocast(process.device):
            output = model(
                input_ids=batch.tokens.to(process.device), use_cache=False, output_router_weights=True, logits_to_keep=1
            )
        weights = torch.stack(output.router_weights).double().cpu()
        for kind, counts in _counts(batch, names, min(model.config.segment_length, instances.length)).items():
            counts = counts * counted[first : first + micro_batch].view(-1, 1, 1)
            sums[kind] += torch.einsum("lbne,bnc->lce", weights, counts)
            tokens[kind] += counts.sum((0, 1))
    profiles: Profiles = {}
    for kind, each in names.items():
        total = process.sum(sums[kind].to(process.device)).cpu()
        count = process.sum(tokens[kind].to(process.device)).cpu()
        profiles[kind] = {
            name: (total[:, i] / count[i]).float().tolist() for i, name in enumerate(each) if count[i] > 0
        }
    return profiles


def write_profiles(folder: Path, profiles: Profiles) -> None:
    (folder / ROUTING_FILE).write_text(json.dumps(profiles, ensure_ascii=False) + "\n")


def read_profile(folder: Path, kind: str, name: str) -> Tensor:
    """The weights `[layers, E]` of one domain or language. Raises ValueError naming the existing ones."""
    path = folder / ROUTING_FILE
    try:
        profiles = json.loads(path.read_text())[kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no routing weights by {kind} ({type(error).__name__}: {error}); {ROUTING_FILE} is from "
            "`eclectus pretrain`; merge by a prompt, or by your own weights (mean_routing_weights)."
        ) from error
    if name not in profiles:
        raise ValueError(f"{path} has no {kind} {name!r}; it has {', '.join(sorted(profiles)) or 'none'}.")
    return torch.tensor(profiles[name])


def _counts(batch: Batch, names: dict[str, list[str]], unit: int) -> dict[str, Tensor]:
    """Tokens of each domain and language in each segment, `[B, N, C]`."""
    counts = {}
    for kind, labels in (("domain", batch.domains), ("language", batch.languages)):
        # Padding, label -1, becomes class 0 and is dropped.
        each = F.one_hot(labels + 1, len(names[kind]) + 1)[..., 1:].double()
        each = F.pad(each, (0, 0, 0, -each.shape[1] % unit))
        counts[kind] = each.view(len(each), -1, unit, each.shape[-1]).sum(2)
    return counts


def _spread(instances: Instances) -> np.ndarray:
    """Instances with every domain and language, spaced evenly over each, in ascending order."""
    chosen: set[int] = set()
    rows = np.asarray(instances.spans[:, 0]) // instances.length
    for column in (3, 4):
        labels = np.asarray(instances.spans[:, column])
        for label in np.unique(labels):
            own = np.unique(rows[labels == label])
            chosen |= set(own[np.linspace(0, len(own) - 1, min(len(own), INSTANCES_EACH)).astype(int)].tolist())
    return np.array(sorted(chosen))
