"""Mean routing of a trained Lory model on its training data, by domain and language; `export_dense` merges by it.

    profile of a domain = mean over its tokens of the routing weights from their own segment     [layers, E]

The profiles are stored with the weights, in `routing_weights.json`:
{"domain": {"legal": [[...E], ...layers]}, "language": {...}}. Cost: a forward pass over at most INSTANCES_EACH
instances per domain and language, of which the MOST_NAMES with the most tokens have a profile.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eclectus.models.attention.document_mask import within_documents
from eclectus.models.lory.documents import sums_by_segment
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.precision import Precision, autocast
from eclectus.models.training.process import Process

ROUTING_FILE = "routing_weights.json"
INSTANCES_EACH = 16
MOST_NAMES = 500
COLUMNS = {"language": 3, "domain": 4}
"""Where the spans of instances hold the number of a label (tasks/packing/pack.py)."""
Profiles = dict[str, dict[str, list[list[float]]]]


@torch.no_grad()
def routing_profiles(
    model: LoryForCausalLM,
    instances: Instances,
    micro_batch: int,
    process: Process,
    document_mask: bool = False,
    precision: Precision = "auto",
) -> Profiles:
    """Mean routing weights by domain and by language. All processes must call it, and get the same result.

    document_mask, precision: as in the training: whether documents of an instance do not see each other, and in what
    matrix products are.
    """
    model.eval()
    kept = {kind: _largest(instances, column) for kind, column in COLUMNS.items()}
    every = {"domain": instances.domains, "language": instances.languages}
    names = {kind: [every[kind][number] for number in numbers.tolist()] for kind, numbers in kept.items()}
    chosen = _spread(instances, kept)
    # A sharded model needs equally many forward passes in all processes; repeated rows have weight 0.
    each_reads = -(-len(chosen) // process.world)
    rows = np.resize(chosen, each_reads * process.world)[process.rank :: process.world]
    counted = torch.arange(process.rank, each_reads * process.world, process.world) < len(chosen)
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    sums = {kind: torch.zeros(layers, len(each), experts, dtype=torch.float64) for kind, each in names.items()}
    tokens = {kind: torch.zeros(len(each), dtype=torch.float64) for kind, each in names.items()}
    for first in range(0, len(rows), micro_batch):
        batch = instances.batch(rows[first : first + micro_batch])
        inside = within_documents(model, batch.documents if document_mask else None, process.device)
        with autocast(process.device, precision), inside:
            output = model(
                input_ids=batch.tokens.to(process.device), use_cache=False, output_router_weights=True, logits_to_keep=1
            )
        weights = torch.stack(output.router_weights).double().cpu()
        unit, segments = min(model.config.segment_length, instances.length), weights.shape[2]
        numbers = None if output.segments is None else output.segments.cpu()
        for kind, classes in _classes(batch, kept).items():
            classes = classes * counted[first : first + micro_batch].view(-1, 1, 1)
            counts = sums_by_segment(classes, unit, numbers, segments)
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


def _classes(batch: Batch, kept: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The domain and language of each token, one-hot float64 `[B, L, C]`. kept: their numbers, ascending [C]."""
    classes = {}
    for kind, labels in (("domain", batch.domains), ("language", batch.languages)):
        numbers = torch.from_numpy(kept[kind])
        place = torch.searchsorted(numbers, labels).clamp(max=max(len(numbers) - 1, 0))
        # Padding, label -1, and what is not kept become class 0, which is dropped.
        place = torch.where(numbers[place] == labels, place + 1, 0) if len(numbers) else torch.zeros_like(labels)
        classes[kind] = F.one_hot(place, len(numbers) + 1)[..., 1:].double()
    return classes


def _largest(instances: Instances, column: int) -> np.ndarray:
    """The numbers, ascending, of the labels in this column of the spans: at most MOST_NAMES, those of most tokens."""
    spans = instances.spans
    tokens = np.bincount(np.asarray(spans[:, column]), np.asarray(spans[:, 1]))
    return np.sort(np.argsort(-tokens, kind="stable")[:MOST_NAMES])


def _spread(instances: Instances, kept: dict[str, np.ndarray]) -> np.ndarray:
    """Instances with every domain and language that is kept, spaced evenly over each, in ascending order."""
    chosen: set[int] = set()
    rows = np.asarray(instances.spans[:, 0]) // instances.length
    for kind, column in COLUMNS.items():
        labels = np.asarray(instances.spans[:, column])
        for label in np.intersect1d(labels, kept[kind]):
            own = np.unique(rows[labels == label])
            chosen |= set(own[np.linspace(0, len(own) - 1, min(len(own), INSTANCES_EACH)).astype(int)].tolist())
    return np.array(sorted(chosen))
