"""English models with a byte-level tokenizer of their own, whose vocabulary is extended to Greek."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eclectus.storage.artifact import Artifact, ArtifactStore
from eclectus.tasks.packing.new_vocabulary import ExtendTokenizerSettings, extend_tokenizer
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from eclectus.tasks.training.extend_vocabulary import ExtendVocabularySettings, extend_vocabulary
from tests.support.dense_bases import BASES
from tests.support.small_world import texts, write_documents, write_model

ROWS = 8
"""Rows of the model beyond its tokenizer, as some models are padded."""


@dataclass
class NewWords:
    store: ArtifactStore
    documents: Artifact
    base: Artifact
    tokenizer: Artifact
    """Of the base."""
    extended: Artifact
    """Its tokenizer with new tokens."""
    wider: Artifact
    """The base with rows for them."""


def make(store: ArtifactStore, kind: str, step: Any, **arguments: Any) -> Artifact:
    with store.draft(kind) as draft:
        step.function(**arguments, out=draft)
        return store.commit(draft)


def make_english(root: Path, family: str) -> tuple[ArtifactStore, Artifact, Artifact, Artifact]:
    """(store, documents in English and Greek, a model of a family of `BASES`, its tokenizer, trained on English)."""
    store, rows = ArtifactStore(root), texts()
    documents = write_documents(store, rows)
    english = write_documents(store, [row for row in rows if row["language"] == "en"])
    words = make(store, "tokenizer", tokenizer, documents=english, settings=TokenizerSettings(tokenizer_vocabulary=400))
    tokens = load_tokenizer(words.path)
    config = type(BASES[family])(**(BASES[family].to_dict() | {"vocab_size": len(tokens) + ROWS}))
    config.eos_token_id = config.bos_token_id = tokens.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.2)
    return store, documents, write_model(store, model, tokens), words


def extend_words(
    store: ArtifactStore, documents: Artifact, base: Artifact, words: Artifact, count: int = 60, **changed: Any
) -> Artifact:
    settings = ExtendTokenizerSettings(tokenizer=base.path, extension_vocabulary=count, **changed)
    return make(store, "tokenizer", extend_tokenizer, documents=documents, base=words, settings=settings)


def widen(store: ArtifactStore, checkpoint: Artifact, extended: Artifact) -> Artifact:
    settings = ExtendVocabularySettings()
    return make(store, "checkpoint", extend_vocabulary, checkpoint=checkpoint, tokenizer=extended, settings=settings)


def make_new_words(root: Path, family: str = "llama tied") -> NewWords:
    store, documents, base, words = make_english(root, family)
    extended = extend_words(store, documents, base, words)
    return NewWords(store, documents, base, words, extended, widen(store, base, extended))
