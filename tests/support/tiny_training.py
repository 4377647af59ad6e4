"""A tiny world to train in: instances on disk in `eclectus.tasks.packing.pack`'s format, a tiny dense model, plans."""

import json

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eclectus.models.checkpoints.tensor_files import CheckpointReader, weight_files
from eclectus.models.training.instances import Batch
from eclectus.models.training.loop import Plan

# Tiny matrices: threads only wait for each other.
torch.set_num_threads(1)
VOCABULARY = 64
LENGTH = 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def batch_of(tokens, domains=None):
    nowhere = torch.zeros_like(tokens)
    return Batch(tokens, tokens.clone(), nowhere, nowhere if domains is None else domains, nowhere)


def stored_weights(folder, stem="model"):
    """The tensors of a checkpoint, in one file or several."""
    with CheckpointReader(folder, weight_files(folder, stem)) as reader:
        return {name: reader.tensor(name) for name in reader.specs}


def write_instances(place, count=40, seed=0):
    """`count` instances, each of two documents of two domains; the last one is half padding."""
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (count, LENGTH)).astype(np.uint16)
    tokens.tofile(place / "tokens.bin")
    matrix = {"file": "tokens.bin", "dtype": "uint16", "offset": 0, "rows": count, "columns": LENGTH}
    half = LENGTH // 2
    rows = [(i * LENGTH + j * half, half, 2 * i + j, 0, j) for i in range(count) for j in (0, 1)][: 2 * count - 1]
    np.save(place / "spans.npy", np.array(rows, np.int64))
    about = {
        "length": LENGTH,
        "vocabulary": VOCABULARY,
        "end_of_document": 0,
        "languages": ["en"],
        "domains": ["a", "b"],
    }
    about["matrices"] = {"input_ids": matrix}
    (place / "instances.json").write_text(json.dumps(about))
    return place


def write_uneven_instances(place):
    """24 instances in batches of 4, whose original language ("en") is spread unevenly.

    A batch has no token of it or one, or one instance holds all of them; some instances are half padding, one is only
    padding.
    """
    place = write_instances(place, count=24, seed=3)
    en, el, tr = range(3)
    # By instance: (tokens, language, domain) of its documents; what is missing is padding.
    of_batch = [
        [[(24, el, 0)], [(20, tr, 1), (1, en, 0), (3, el, 0)], [(24, en, 1)], [(12, tr, 0)]],
        [[(24, el, 0)], [(24, tr, 1)], [(10, el, 0), (14, tr, 1)], [(24, el, 1)]],
        [[(24, tr, 0)], [(24, el, 1)], [(9, tr, 0), (15, el, 1)], [(5, en, 0), (19, el, 1)]],
        [[(24, en, 0)], [(11, en, 1), (13, en, 0)], [], [(24, en, 1)]],
        [[(7, el, 1)], [(23, el, 0), (1, en, 0)], [(24, el, 1)], [(24, tr, 1)]],
        [[(24, en, 0)], [(2, en, 1), (22, tr, 0)], [(24, el, 1)], [(24, el, 0)]],
    ]
    spans = []
    for row, documents in enumerate(document for batch in of_batch for document in batch):
        start = row * LENGTH
        for tokens, language, domain in documents:
            spans.append((start, tokens, len(spans), language, domain))
            start += tokens
    np.save(place / "spans.npy", np.array(spans, np.int64))
    about = json.loads((place / "instances.json").read_text())
    (place / "instances.json").write_text(json.dumps(about | {"languages": ["en", "el", "tr"]}))
    return place


def tiny_dense(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def tiny_mixture(seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


def plan(**changed):
    settings = dict(start=0, stop=12, total=12, batch=4, micro_batch=2, learning_rate=1e-2, warmup=2)
    return Plan(**{**settings, "checkpoint_every": 5, "log_every": 3, **changed})
