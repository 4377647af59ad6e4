"""A sentence embedding trained on the corpus itself, in half a minute, offline, for every language that is in it.

    tokenizer       byte-level BPE over lower-cased words (every script; nothing is unknown)
    start           latent semantic analysis: the right singular vectors of the TF-IDF matrix, times idf
    training        two random spans of one document attract each other, those of other documents repel: InfoNCE with
                    in-batch negatives, which is what Contriever does (papers.md 1.6 embeds with Contriever)
    result          a sentence-transformers `StaticEmbedding` directory: the mean of the token vectors

Price: about 3 s of tokenizer training, 2 s of singular vectors and 10 s of contrastive steps for 12 MB on 2 cores; then
some 5,000 documents/s to embed. Only the train split is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from storage.artifact import Artifact, Draft
from storage.errors import EclectusError
from tasks.documents import read_batches, read_table
from tasks.run import current_run, metric, progress
from tasks.settings import Place, Settings
from tasks.step import step

WORDS = r"[\p{L}\p{M}]+|\p{N}+|[^\s\p{L}\p{M}\p{N}]+"
LONGEST_WORD = 48
SHORTEST = 8
DETAILS = "training.json"
SEEN = "trained_on.npy"
IN_TRAIN = (pc.field("split") == "train") | pc.field("split").is_null()


class EmbeddingText(Settings):
    """What of a document is embedded."""

    embedding_maximum_characters: int = Field(
        8000,
        ge=1,
        description="Characters of a document that are embedded, from its beginning; the rest is not looked at.",
    )


class StaticEmbeddingSettings(EmbeddingText):
    """How the corpus's own embedding model is trained."""

    embedding_dimension: int = Field(
        256, ge=8, le=4096, description="Numbers in an embedding of the corpus-trained model."
    )
    embedding_vocabulary: int = Field(
        24_000, ge=300, description="Tokens in the vocabulary of the corpus-trained embedding model."
    )
    embedding_steps: int = Field(
        200,
        ge=0,
        description="Contrastive training steps of the embedding model; 0 leaves latent semantic analysis as it is.",
    )
    embedding_pairs: int = Field(
        256, ge=2, description="Documents in a contrastive step, each giving two random spans."
    )
    embedding_span: int = Field(
        64, ge=4, description="Longest span in tokens; a document's spans are at most half of it."
    )
    embedding_learning_rate: float = Field(
        4e-3, gt=0, description="Learning rate of the contrastive training, falling to 0."
    )
    embedding_temperature: float = Field(0.1, gt=0, description="Temperature of the contrastive loss.")
    embedding_sample: int = Field(
        20_000, ge=1, description="Most documents that the embedding model is trained on, drawn at random."
    )
    embedding_growth: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="An earlier embedding model of this corpus is kept while at most this share of the documents is new to it.",
    )
    embedding_threads: int = Place(0, "CPU threads to train the embedding model with; 0 takes all.", ge=0)
    seed: int = Field(0, description="Seed of everything random")


@step(makes="checkpoint", version=1)
def train_embedding(documents: Artifact, settings: StaticEmbeddingSettings, out: Draft) -> None:
    """Trains a static embedding on the train split; the artifact's directory loads with `SentenceTransformer(path)`.

    A model trained here before with the same settings is kept while no more than `embedding_growth` of the documents are
    new to it, so that a growing corpus is embedded incrementally.
    """
    seen = train_ids(documents)
    if len(seen) == 0:
        raise EclectusError(
            "no document in the train split to train an embedding on; add documents or lower the held-out share"
        )
    earlier = _earlier_model(seen, settings)
    if earlier is not None:
        for file in earlier.manifest()["files"]:
            shutil.copyfile(earlier.file(file["name"]), out.file(file["name"]))
        out.rows, out.statistics = earlier.manifest()["rows"], earlier.statistics
        metric("embedding_model_kept", 1)
        return
    texts = sample_texts(documents, settings)
    model, details = fit(texts, settings)
    model.save(str(out.path), create_model_card=False)
    np.save(out.file(SEEN), seen)
    out.file(DETAILS).write_text(json.dumps(settings.key_values(), indent=1, sort_keys=True))
    out.rows = details["vocabulary"]
    out.statistics = {"model": "static", "documents": len(texts), "dimension": settings.embedding_dimension, **details}


def train_ids(documents: Artifact) -> np.ndarray:
    """Ids of the documents of the train split (all of them before there is one), ascending, as bytes [N]."""
    kept = read_table(documents, ["document"], IN_TRAIN)["document"]
    return np.sort(np.array(kept.to_pylist(), dtype="S32"))


def sample_texts(documents: Artifact, settings: StaticEmbeddingSettings) -> list[str]:
    """At most `embedding_sample` texts of the train split, each cut, in the order of the documents."""
    total = 0
    for batch in _train_batches(documents, ["split"]):
        total += len(batch)
    chosen = np.ones(total, bool)
    if total > settings.embedding_sample:
        chosen[:] = False
        chosen[np.random.default_rng(settings.seed).choice(total, settings.embedding_sample, replace=False)] = True
    texts, row = [], 0
    for batch in _train_batches(documents, ["text", "split"]):
        part = batch.filter(chosen[row : row + len(batch)])
        texts += [(text or "")[: settings.embedding_maximum_characters] for text in part["text"].to_pylist()]
        row += len(batch)
    return texts


def fit(texts: list[str], settings: StaticEmbeddingSettings) -> tuple[Any, dict[str, Any]]:
    """The trained SentenceTransformer, and what is worth telling of it: vocabulary, tokens, first and last loss."""
    import torch

    threads = settings.embedding_threads or os.cpu_count() or 1
    before, parallel = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    try:
        tokenizer = train_tokenizer(texts, settings.embedding_vocabulary)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(encoding.ids) for encoding in encodings])
        tokens = np.concatenate([np.empty(0, np.int32), *(np.array(encoding.ids, np.int32) for encoding in encodings)])
        del encodings
        weights = start_weights(tokens, lengths, tokenizer.get_vocab_size(), settings)
        weights, losses = contrast(weights, tokens, lengths, settings)
    finally:
        torch.set_num_threads(before)
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
    details = {"vocabulary": tokenizer.get_vocab_size(), "tokens": len(tokens)}
    if losses:
        details |= {"first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4)}
    return _as_sentence_transformer(tokenizer, weights), details


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE over lower-cased words, numbers and runs of signs. Returns a `tokenizers.Tokenizer`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=LONGEST_WORD,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def start_weights(
    tokens: np.ndarray, lengths: np.ndarray, vocabulary: int, settings: StaticEmbeddingSettings
) -> np.ndarray:
    """Token vectors float32 [V, D] before training: latent semantic analysis, or random ones for fewer documents than D.

    tokens: int32, all documents end to end. lengths: int [N], tokens of each. Both kinds are weighted by idf.
    """
    import scipy.sparse
    from sklearn.utils.extmath import randomized_svd

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    counts = scipy.sparse.csr_matrix(
        (np.ones(len(tokens), np.float32), tokens, offsets), shape=(len(lengths), vocabulary)
    )
    counts.sum_duplicates()
    in_documents = np.bincount(counts.indices, minlength=vocabulary)
    idf = (np.log((1 + len(lengths)) / (1 + in_documents)) + 0.1).astype(np.float32)
    if len(lengths) <= 2 * settings.embedding_dimension:
        random = np.random.default_rng(settings.seed)
        vectors = random.standard_normal((vocabulary, settings.embedding_dimension), np.float32)
    else:
        counts.data *= idf[counts.indices]
        norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
        counts.data /= np.repeat(np.maximum(norms, 1e-9), np.diff(counts.indptr))
        vectors = randomized_svd(counts, settings.embedding_dimension, n_iter=2, random_state=settings.seed)[2].T
    weights = np.ascontiguousarray(vectors * idf[:, None], dtype=np.float32)
    return weights * np.float32(0.5 / np.sqrt((weights**2).sum(axis=1).mean()))


def contrast(
    weights: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, settings: StaticEmbeddingSettings
) -> tuple[np.ndarray, list[float]]:
    """Contrastive training of the token vectors [V, D]; returns them and the loss of every step."""
    import torch
    from torch.nn import functional as F

    usable = np.flatnonzero(lengths >= SHORTEST)
    pairs = min(settings.embedding_pairs, len(usable))
    if settings.embedding_steps == 0 or pairs < 2:
        return weights, []
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    random = np.random.default_rng(settings.seed)
    table = torch.from_numpy(weights).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([table], lr=settings.embedding_learning_rate)
    target, losses = torch.arange(pairs), []
    tell = progress(settings.embedding_steps, "training the embedding", "steps")
    for number in range(settings.embedding_steps):
        optimizer.param_groups[0]["lr"] = settings.embedding_learning_rate * (1 - number / settings.embedding_steps)
        rows = random.choice(usable, pairs, replace=False)
        spans, offsets = _two_spans(random, starts[rows], lengths[rows], settings.embedding_span)
        means = F.embedding_bag(torch.from_numpy(tokens[spans]), table, torch.from_numpy(offsets), mode="mean")
        one, other = F.normalize(means, dim=1).split(pairs)
        logits = one @ other.T / settings.embedding_temperature
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        metric("embedding_loss", losses[-1], at_step=number)
        tell(number + 1)
    return table.detach().numpy(), losses


def _two_spans(
    random: np.random.Generator, starts: np.ndarray, lengths: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two random spans of each of B documents: their token positions end to end, and int32 offsets [2 B] of the spans."""
    sizes = np.tile(np.minimum(longest, lengths // 2), 2)
    begins = np.tile(starts, 2) + (random.random(len(sizes)) * (np.tile(lengths, 2) - sizes + 1)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], sizes)
    return positions, offsets[:-1].astype(np.int32)


def _as_sentence_transformer(tokenizer: Any, weights: np.ndarray) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, weights), Normalize()], device="cpu")


def _earlier_model(seen: np.ndarray, settings: StaticEmbeddingSettings) -> Artifact | None:
    """The model in this home with these settings to which fewest documents are new, at most the allowed share."""
    run = current_run()
    if run is None or settings.embedding_growth == 0:
        return None
    best: tuple[float, Artifact] | None = None
    for details in sorted((run.home.store.root / "checkpoint").glob(f"*/{DETAILS}")):
        with contextlib.suppress(EclectusError, OSError, ValueError):
            if json.loads(details.read_text()) != settings.key_values():
                continue
            new = 1 - np.isin(seen, np.load(details.with_name(SEEN)), assume_unique=True).mean()
            if new <= settings.embedding_growth and (best is None or new < best[0]):
                artifact = run.home.store.find(str(details.parent))
                best = best if run.home.store.faults(artifact) else (new, artifact)
    return best[1] if best else None


def _train_batches(documents: Artifact, columns: list[str]) -> Iterator[Any]:
    return read_batches(documents, columns, IN_TRAIN)


def is_static_model(place: Path) -> bool:
    """Whether a sentence-transformers directory holds a static model, which is cheap to run."""
    modules = place / "modules.json"
    return modules.is_file() and "StaticEmbedding" in modules.read_text()
