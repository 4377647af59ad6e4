"""What attention within documents costs and gives: dense and Lory, trained and scored with and without the mask.

    python benchmarks/document_mask.py SOURCE.jsonl.gz [...] [--documents 3000] [--steps 150] [--segment 64] [--seed 0]

Documents are shuffled, every tenth is held out, the others are packed into instances of 512 tokens (a byte-level BPE of
2,048 tokens, trained on them). Each model trains from the same weights on the same instances, as one text and within
documents (`pack_document_mask`), and each is scored on the held-out instances in both ways, over the same targets: all
but the first token of each document. Lory's first segments are scored with equal weights, without look-ahead. CPU
seconds of a step are of this process with one thread, the median over steps: comparable under load, clocks are not.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models.attention.document_mask import within_documents
from eclectus.models.lory.documents import count_segments
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import lory, next_token
from eclectus.models.training.instances import IGNORED, Instances
from eclectus.models.training.loop import Plan, train
from eclectus.models.training.process import Process

LENGTH, VOCABULARY, END, BATCH = 512, 2048, 0, 4


def packed(folder: Path, documents: list[list[int]]) -> Instances:
    """Instances of documents, each followed by END, cut every LENGTH tokens."""
    folder.mkdir()
    lengths = np.array([len(ids) + 1 for ids in documents])
    ends = np.cumsum(lengths)
    total = ends[-1] // LENGTH * LENGTH
    flat = np.concatenate([np.array([*ids, END], np.uint16) for ids in documents])[:total]
    flat.tofile(folder / "tokens.bin")
    begins = np.union1d(np.concatenate([[0], ends[ends < total]]), np.arange(0, total, LENGTH))
    sizes = np.diff(np.append(begins, total))
    nothing = np.zeros_like(begins)
    np.save(
        folder / "spans.npy", np.stack([begins, sizes, np.searchsorted(ends, begins, "right"), nothing, nothing], 1)
    )
    where = {"file": "tokens.bin", "dtype": "uint16", "offset": 0, "rows": int(total // LENGTH), "columns": LENGTH}
    about = {
        "length": LENGTH,
        "vocabulary": VOCABULARY,
        "end_of_document": END,
        "languages": ["en"],
        "domains": ["all"],
    }
    (folder / "instances.json").write_text(json.dumps(about | {"matrices": {"input_ids": where}}))
    return Instances(folder)


def read(sources: list[str], count: int, seed: int, folder: Path) -> tuple[Instances, Instances]:
    """(training instances, held-out instances)"""
    lines = [line for source in sources for line in gzip.decompress(Path(source).read_bytes()).splitlines()]
    texts = [json.loads(line)["text"] for line in lines]
    chosen = [texts[number] for number in np.random.default_rng(seed).permutation(len(texts))[:count]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(chosen, VOCABULARY, special_tokens=["<end>"], show_progress=False)
    ids = [each.ids for each in tokenizer.encode_batch(chosen)]
    return (
        packed(folder / "train", [each for i, each in enumerate(ids) if i % 10]),
        packed(folder / "held", ids[::10]),
    )


@torch.no_grad()
def nats(model: Any, held: Instances, mask: bool) -> float:
    """Mean loss over the targets within documents."""
    total, count, device = 0.0, 0, torch.device("cpu")
    more = {"first_segment": "uniform"} if isinstance(model, LoryForCausalLM) else {}
    for first in range(0, len(held), BATCH):
        batch = held.batch(np.arange(first, min(first + BATCH, len(held))))
        targets = batch.without_borders().labels[:, 1:].flatten()
        with within_documents(model.eval(), batch.documents if mask else None, device):
            logits = model(input_ids=batch.tokens, use_cache=False, **more).logits[:, :-1].flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        count += int((targets != IGNORED).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    for name, default in (("documents", 3000), ("steps", 150), ("segment", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, held = read(given.sources, given.documents, given.seed, folder)
        spans = np.asarray(data.spans[:, 1])
        padding = count_segments(data.batch(np.arange(len(data))).documents, given.segment) * given.segment
        print(f"{len(data)} instances, {len(spans) / len(data):.1f} documents in each, {spans.mean():.0f} tokens; ")
        print(f"segments of {given.segment} padded to {padding / (len(data) * LENGTH):.2f} times the tokens\n")
        torch.manual_seed(given.seed)
        shape = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4)
        dense = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape))
        merged = LoryForCausalLM.from_dense(dense, 8, given.segment, router_initializer_range=0.1)
        print("| model | trained | nats, one text | nats, within documents | CPU ms a step |\n|---|---|---|---|---|")
        for name, start, objective in (("dense", dense, next_token()), ("Lory", merged, lory())):
            for mask in (False, True):
                model, seconds = copy.deepcopy(start), [time.process_time()]
                plan = Plan(0, given.steps, given.steps, BATCH, BATCH, 4e-3, 20, seed=given.seed, document_mask=mask)

                def report(kind: str, seconds: list[float] = seconds, **_: Any) -> None:
                    if kind == "progress":
                        seconds.append(time.process_time())

                train(model, data, objective, plan, Process(), folder / f"{name} {mask}", report)
                step = 1000 * statistics.median(np.diff(seconds))
                scores = " | ".join(f"{nats(model, held, each):.4f}" for each in (False, True))
                print(
                    f"| {name} | {'within documents' if mask else 'as one text'} | {scores} | {step:.0f} |", flush=True
                )


if __name__ == "__main__":
    main()
