"""A sentence embedding trained on the corpus itself, in half a minute, offline, for every language of the corpus.

    tokenizer       byte-level BPE over lower-cased words (every script; no unknown token)
    start           latent semantic analysis: the right singular vectors of the TF-IDF matrix, times idf
    training        two random spans of one document attract each other, those of other documents repel: InfoNCE with
                    in-batch negatives, as in Contriever, which docs/methods.md 1.6 embeds with
    result          a sentence-transformers `StaticEmbedding` directory: the mean of the token vectors

A step changes only the few thousand tokens of its spans, so gradients are written out by hand and Adam is lazy
(moments of these rows only): NumPy and SciPy suffice, and seconds of imports (torch, sentence-transformers) are
saved, in training and in embedding. Price for 10 MB on 2 cores: 3 s of tokenizer training, 2 s of singular vectors, 5
s of contrastive steps; then some 2,000 documents/s to embed. Only the train split is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.normalise import composed
from eclectus.tasks.documents.table import read_batches, read_table
from eclectus.tasks.grouping.static_model import StaticModel, averaging_matrix, flat_tokens
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import metric, progress
from eclectus.tasks.settings import SEED, Settings
from eclectus.tasks.step import step

WORDS = r"[\p{L}\p{M}]+|\p{N}+|[^\s\p{L}\p{M}\p{N}]+"
LONGEST_WORD = 48
SHORTEST = 8
OVERSAMPLED, POWER_ITERATIONS = 10, 2
BETAS = np.float32(0.9), np.float32(0.999)
IN_CACHE = 128
DETAILS = "training.json"
SEEN = "trained_on.npy"
IN_TRAIN = [("split", "not in", ["heldout", "apart"])]
"""Documents without a split count as training documents."""


class EmbeddingText(Settings):
    """Which part of a document is embedded."""

    embedding_maximum_characters: int = Field(
        8000,
        ge=1,
        description="Characters of a document that are embedded, from its beginning; the rest is ignored.",
    )


class StaticEmbeddingSettings(EmbeddingText):
    """How the embedding model is trained on the corpus."""

    embedding_dimension: int = Field(
        256, ge=8, le=4096, description="Dimension of the embeddings of the corpus-trained model."
    )
    embedding_vocabulary: int = Field(
        24_000, ge=300, description="Tokens in the vocabulary of the corpus-trained embedding model."
    )
    embedding_steps: int = Field(
        200,
        ge=0,
        description="Contrastive training steps of the embedding model; 0 keeps the latent semantic analysis.",
    )
    embedding_pairs: int = Field(256, ge=2, description="Documents per contrastive step, each giving two random spans.")
    embedding_span: int = Field(
        64, ge=4, description="Longest span in tokens; a document's spans are at most half of it."
    )
    embedding_learning_rate: float = Field(
        4e-3, gt=0, description="Learning rate of the contrastive training, falling to 0."
    )
    embedding_temperature: float = Field(0.1, gt=0, description="Temperature of the contrastive loss.")
    embedding_sample: int = Field(
        20_000, ge=1, description="Maximum number of documents to train the embedding model on, drawn at random."
    )
    embedding_growth: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="An earlier embedding model is reused while at most this share of the documents is new to it.",
    )
    seed: int = SEED


@step(makes="checkpoint", version=3)
def train_embedding(documents: Artifact, settings: StaticEmbeddingSettings, out: Draft) -> None:
    """Trains a static embedding on the train split; the artifact's directory loads with `SentenceTransformer(path)`.

    An earlier model with the same settings is reused while at most `embedding_growth` of the documents are new to it,
    so that a growing corpus is embedded incrementally.
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
    model.save(out)
    np.save(out.file(SEEN), seen)
    out.file(DETAILS).write_text(json.dumps(settings.key_values(), indent=1, sort_keys=True))
    out.rows = details["vocabulary"]
    out.statistics = {"model": "static", "documents": len(texts), "dimension": settings.embedding_dimension, **details}


def train_ids(documents: Artifact) -> np.ndarray:
    """Ids of the documents of the train split (of all documents if there is none yet), ascending, bytes [N]."""
    kept = read_table(documents, ["document"], IN_TRAIN)["document"]
    return np.sort(np.array(kept.to_pylist(), dtype="S32"))


def sample_texts(documents: Artifact, settings: StaticEmbeddingSettings) -> list[str]:
    """At most `embedding_sample` truncated texts of the train split, in the order of the documents."""
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
        texts += [composed(text or "")[: settings.embedding_maximum_characters] for text in part["text"].to_pylist()]
        row += len(batch)
    return texts


def fit(texts: list[str], settings: StaticEmbeddingSettings) -> tuple[StaticModel, dict[str, Any]]:
    """The trained model, and its statistics: vocabulary, tokens, first and last loss."""
    from threadpoolctl import threadpool_limits

    tokenizer = train_tokenizer(texts, settings.embedding_vocabulary)
    tokens, lengths = flat_tokens(tokenizer, texts)
    # The products are small: a second BLAS thread mostly spins (6 times the CPU time on 2 busy cores), and rounds
    # differently.
    with threadpool_limits(1, user_api="blas"):
        weights = start_weights(tokens, lengths, tokenizer.get_vocab_size(), settings)
        weights, losses = contrast(weights, tokens, lengths, settings)
    details = {"vocabulary": tokenizer.get_vocab_size(), "tokens": len(tokens)}
    if losses:
        details |= {"first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4)}
    return StaticModel(tokenizer, weights), details


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE over lower-cased words, numbers and runs of symbols. Returns a `tokenizers.Tokenizer`."""
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
    """Token vectors float32 [V, D] before training, times idf: latent semantic analysis, or random for few documents.

    tokens: int32, all documents end to end. lengths: int [N], tokens of each.
    """
    import scipy.sparse

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
        vectors = right_singular_vectors(counts, settings.embedding_dimension, settings.seed)
    weights = np.ascontiguousarray(vectors * idf[:, None], dtype=np.float32)
    return weights * np.float32(0.5 / np.sqrt((weights**2).sum(axis=1).mean()))


def right_singular_vectors(matrix: Any, count: int, seed: int) -> np.ndarray:
    """The first right singular vectors [V, count] of a sparse matrix [N, V], by Halko's randomised subspace iteration.

    Approximate. Price: six passes over the entries for each of count + 10 columns.
    """
    wide = min(count + OVERSAMPLED, matrix.shape[0])
    across = matrix.T.tocsr()
    sketch = matrix @ np.random.default_rng(seed).standard_normal((matrix.shape[1], wide), np.float32)
    for _ in range(POWER_ITERATIONS):
        sketch = matrix @ (across @ np.linalg.qr(sketch)[0])
    projected = across @ np.linalg.qr(sketch)[0]
    values, turn = np.linalg.eigh(projected.T @ projected)
    best = np.argsort(-values)[:count]
    return projected @ (turn[:, best] / np.sqrt(np.maximum(values[best], 1e-12)))


def contrast(
    weights: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, settings: StaticEmbeddingSettings
) -> tuple[np.ndarray, list[float]]:
    """Contrastive training of the token vectors [V, D]; returns them and the loss of every step."""
    usable = np.flatnonzero(lengths >= SHORTEST)
    pairs = min(settings.embedding_pairs, len(usable))
    if settings.embedding_steps == 0 or pairs < 2:
        return weights, []
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    random = np.random.default_rng(settings.seed)
    table, adam, losses = weights.copy(), _LazyAdam(weights.shape), []
    report_progress = progress(settings.embedding_steps, "training the embedding", "steps")
    for number in range(settings.embedding_steps):
        rows = random.choice(usable, pairs, replace=False)
        spans, sizes = _two_spans(random, starts[rows], lengths[rows], settings.embedding_span)
        used, positions = np.unique(tokens[spans], return_inverse=True)
        average = averaging_matrix(positions.astype(np.int32), sizes, len(used))
        loss, gradient = _info_nce(average @ table[used], settings.embedding_temperature)
        rate = settings.embedding_learning_rate * (1 - number / settings.embedding_steps)
        adam.step(table, used, average.T @ gradient, rate)
        if not math.isfinite(loss) or not np.isfinite(table[used]).all():
            raise EclectusError(
                f"the training of the embedding model diverged at step {number} (loss {loss:g}); lower "
                f"'embedding_learning_rate' ({settings.embedding_learning_rate:g}) or raise 'embedding_temperature' "
                f"({settings.embedding_temperature:g})"
            )
        losses.append(loss)
        metric("embedding_loss", loss, at_step=number)
        report_progress(number + 1)
    return table, losses


def _info_nce(means: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """The loss of B pairs, and its gradient in their means [2 B, D]: row i and row B + i attract each other.

    Symmetric cross-entropy of the cosines over the temperature, every other pair being a negative.
    """
    norms = np.sqrt((means * means).sum(axis=1, keepdims=True)) + np.float32(1e-12)
    unit = means / norms
    one, other = np.split(unit, 2)
    logits = one @ other.T / np.float32(temperature)
    diagonal = np.arange(len(one))
    loss, gradient = 0.0, np.zeros_like(logits)
    for axis in (1, 0):
        shifted = logits - logits.max(axis=axis, keepdims=True)
        shares = np.exp(shifted)
        total = shares.sum(axis=axis, keepdims=True)
        loss += float((np.log(total).ravel() - shifted[diagonal, diagonal]).mean()) / 2
        gradient += shares / total
    gradient[diagonal, diagonal] -= 2
    gradient /= np.float32(2 * len(one) * temperature)
    into_unit = np.concatenate([gradient @ other, gradient.T @ one])
    return loss, (into_unit - unit * (into_unit * unit).sum(axis=1, keepdims=True)) / norms


class _LazyAdam:
    """Adam for a table [V, D] of which a step changes few rows: the others keep their values and moments."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._first, self._second = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._steps = 0

    def step(self, table: np.ndarray, rows: np.ndarray, gradient: np.ndarray, rate: float) -> None:
        """Updates these rows [n], without repeats, by their gradients [n, D]."""
        self._steps += 1
        rate *= math.sqrt(1 - float(BETAS[1]) ** self._steps) / (1 - float(BETAS[0]) ** self._steps)
        for begin in range(0, len(rows), IN_CACHE):
            part, here = gradient[begin : begin + IN_CACHE], rows[begin : begin + IN_CACHE]
            first = BETAS[0] * self._first[here] + (1 - BETAS[0]) * part
            second = BETAS[1] * self._second[here] + (1 - BETAS[1]) * part * part
            self._first[here], self._second[here] = first, second
            table[here] -= np.float32(rate) * first / (np.sqrt(second) + np.float32(1e-8))


def _two_spans(
    random: np.random.Generator, starts: np.ndarray, lengths: np.ndarray, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two random spans of each of B documents: their token positions end to end, and their sizes int64 [2 B]."""
    sizes = np.tile(np.minimum(longest, lengths // 2), 2)
    begins = np.tile(starts, 2) + (random.random(len(sizes)) * (np.tile(lengths, 2) - sizes + 1)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    positions = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], sizes)
    return positions, sizes


def _earlier_model(seen: np.ndarray, settings: StaticEmbeddingSettings) -> Artifact | None:
    """The model in this home with these settings to which the fewest documents are new, at most the allowed share."""
    if settings.embedding_growth == 0:
        return None
    best: tuple[float, Artifact] | None = None
    for artifact in earlier("checkpoint", model="static"):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(artifact.file(DETAILS).read_text()) != settings.key_values():
                continue
            new = 1 - np.isin(seen, np.load(artifact.file(SEEN)), assume_unique=True).mean()
            if new <= settings.embedding_growth and (best is None or new < best[0]) and is_whole(artifact):
                best = new, artifact
    return best[1] if best else None


def _train_batches(documents: Artifact, columns: list[str]) -> Iterator[Any]:
    return read_batches(documents, columns, IN_TRAIN)
