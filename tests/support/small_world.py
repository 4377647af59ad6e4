"""A small world for tests of evaluation and report: documents of two languages, a tokenizer, and three tiny models."""

import hashlib
import importlib.util
import json
import pydoc_data.topics
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from eclectus.storage.artifact import Artifact, ArtifactStore
from eclectus.tasks.corpus.catalogs import read_catalog
from eclectus.tasks.corpus.packages import Package
from eclectus.tasks.documents.table import DocumentsWriter
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from tests.support.session import make_once

LENGTH = 64
SEGMENT = 16
NAMES = "world.json"


@dataclass
class World:
    store: ArtifactStore
    documents: Artifact
    tokenizer: Artifact
    models: dict[str, Artifact]


def make_world(root: Path) -> World:
    """A world of its own under `root`: a copy of the one that this test session makes first, in a few seconds.

    Models are not trained; their weights are large enough to tell them apart.
    """
    shutil.copytree(make_once("world", _write_world), root, dirs_exist_ok=True)
    store, names = ArtifactStore(root), json.loads((root / NAMES).read_text())
    documents, tokens = store.find(names["documents"]), store.find(names["tokenizer"])
    return World(store, documents, tokens, {model: store.find(name) for model, name in names["models"].items()})


def _write_world(root: Path) -> None:
    store = ArtifactStore(root)
    documents = write_documents(store, texts())
    with store.draft("tokenizer") as draft:
        tokenizer.function(documents, TokenizerSettings(tokenizer_vocabulary=500), draft)
        tokens = store.commit(draft)
    models = {model: made.name for model, made in write_models(store, tokens).items()}
    names = {"documents": documents.name, "tokenizer": tokens.name, "models": models}
    (root / NAMES).write_text(json.dumps(names))


def texts() -> list[dict[str, str]]:
    """English code and documentation, Greek interface text; every fourth document is held out."""
    rows = []
    for name in ("bisect", "shlex", "textwrap", "heapq", "string", "copy"):
        source = Path(importlib.util.find_spec(name).origin).read_text()
        rows += [("en", "code", "original", source[i : i + 900]) for i in range(0, min(len(source), 5400), 900)]
    rows += [("en", "docs", "original", text[:900]) for text in list(pydoc_data.topics.topics.values())[:36]]
    messages = [
        text
        for _, text in read_catalog(Package("gramps", "GPL").file("el/LC_MESSAGES/gramps.mo"))
        if len(text.split()) > 5
    ]
    rows += [("el", "interface", "expanded", "\n".join(messages[i : i + 6])) for i in range(0, 192, 6)]
    names = ("language", "domain", "group", "text")
    return [
        dict(zip(names, row, strict=True)) | {"split": "heldout" if number % 4 == 0 else "train"}
        for number, row in enumerate(rows)
    ]


def write_documents(store: ArtifactStore, rows: list[dict[str, str]]) -> Artifact:
    table = [
        row
        | {
            "document": hashlib.sha256(row["text"].encode()).hexdigest()[:32],
            "bytes": len(row["text"].encode()),
            "source": "test",
        }
        for row in rows
    ]
    with store.draft("documents") as draft:
        with DocumentsWriter(draft) as writer:
            writer.write(pa.Table.from_pylist(table))
        draft.statistics = {"documents": len(rows), "rejected": 0, "duplicates": 0}
        return store.commit(draft)


def write_models(store: ArtifactStore, tokens: Artifact) -> dict[str, Artifact]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from eclectus.models import LoryForCausalLM

    words = load_tokenizer(tokens.path)
    shape = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**shape))
    lory = LoryForCausalLM.from_dense(dense, num_experts=4, segment_length=SEGMENT, router_initializer_range=1.0)
    with torch.no_grad():
        for layer in lory.model.layers:
            layer.mlp.experts.add_(torch.randn_like(layer.mlp.experts) * 0.1)
    mixtral = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))
    return {name: write_model(store, model, words) for name, model in
            {"dense": dense, "lory": lory, "stage 2": mixtral}.items()}  # fmt: skip


def write_model(store: ArtifactStore, model, words) -> Artifact:
    with store.draft("checkpoint") as draft:
        model.save_pretrained(draft.path)
        words.save_pretrained(draft.path)
        draft.statistics = {"model": type(model).__name__}
        return store.commit(draft)
