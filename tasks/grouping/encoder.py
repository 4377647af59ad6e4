"""Encoders: an embedding model, and the embedding of a range of documents by it, called over parts.

A process loads a model once and keeps it for its next parts. A transformer gets batches of documents of similar length,
so that little of them is padding; on a GPU it computes in bf16. The tokens of a static model are averaged with NumPy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_tree
from eclectus.tasks.disk_matrix import mapped, usable_rows
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.normalise import composed
from eclectus.tasks.grouping.static_embedding import EmbeddingText
from eclectus.tasks.grouping.static_model import StaticModel, is_static_model
from eclectus.tasks.settings import BASIC, CurationWorkerSettings, RuntimeSetting

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STATIC = "static"
SHOWN_IDS = 3


class EmbedSettings(EmbeddingText, CurationWorkerSettings):
    """Which model embeds, and how the embeddings are stored."""

    embedding_model: str = Field(
        STATIC,
        description="'static' (trained on the corpus itself) or a sentence-transformers model: a hub name or a folder.",
        json_schema_extra=BASIC,
    )
    embedding_precision: Literal["float32", "float16"] = Field(
        "float32", description="Number format of the stored embeddings."
    )
    embedding_batch: int = RuntimeSetting(32, "Documents per forward pass of a transformer model.", ge=1)
    embedding_workers: int = RuntimeSetting(
        0, "Workers that embed; 0 takes `curation_workers`, by default by the amount of work.", ge=0
    )
    embedding_device: Literal["cpu", "cuda"] = RuntimeSetting(
        "cpu", "Where transformer models run; cuda takes one GPU per worker and computes in bf16."
    )
    embedding_missing_share: float = RuntimeSetting(
        0.1,
        "Largest share of the documents for which the model may give no usable embedding (zeros, NaN, infinities); "
        "the run stops above it, and below it each such document is a chain of its own.",
        ge=0,
        le=1,
    )

    def check_together(self) -> None:
        super().check_together()
        folder = Path(self.embedding_model)
        if self.embedding_model == STATIC:
            return
        if not folder.is_dir():
            if self.embedding_model.startswith((".", "/", "~")):
                raise EclectusError(
                    f"embedding_model '{self.embedding_model}' is no folder; give one, a hub name or 'static'"
                )
        elif not any((folder / name).is_file() for name in ("modules.json", "config.json")):
            raise EclectusError(
                f"embedding_model '{folder}' has no modules.json or config.json, so it is no "
                "sentence-transformers model"
            )
        else:
            check_model_folder(folder)


@dataclass
class Lacking:
    """Documents that got no usable embedding: NaN or infinities, or zeros; how many, and the first ids of each."""

    not_finite: int = 0
    zero: int = 0
    ids: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))

    def __len__(self) -> int:
        return self.not_finite + self.zero

    def add(self, not_finite: int, zero: int, ids: Sequence[list[str]]) -> None:
        self.not_finite += not_finite
        self.zero += zero
        for mine, theirs in zip(self.ids, ids, strict=True):
            mine += theirs[: SHOWN_IDS - len(mine)]

    def __str__(self) -> str:
        ids = [*self.ids[0], *self.ids[1]]
        first = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(self) > SHOWN_IDS else "")
        return f"not finite for {self.not_finite:,} documents, zero for {self.zero:,}: {first}"


class Encoder:
    """A loaded model: texts in, normalised vectors out."""

    def __init__(self, source: str, settings: EmbedSettings) -> None:
        """Raises EclectusError for what is no sentence-transformers model."""
        self.settings = settings
        self.model: StaticModel | SentenceTransformer
        self._encode: Callable[[list[str]], Any]
        if is_static_model(Path(source)):
            static = StaticModel.load(Path(source))
            self.model, self._encode = static, static.encode
            return
        model = _load(source, settings)
        self.model = model
        self._encode = functools.partial(model.encode, batch_size=settings.embedding_batch, show_progress_bar=False)

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [N, D] in the stored precision; zeros if the model gives zeros, infinities or NaN.

        Of composed texts, so that texts that read the same get the same vector (tasks/documents/normalise.py).
        """
        return self._unit(self._raw(texts))

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        vectors[~np.isfinite(vectors).all(axis=1)] = 0
        norms = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0).astype(
            self.settings.embedding_precision
        )

    def _raw(self, texts: list[str]) -> np.ndarray:
        """What the model gives, float64 [N, D]."""
        cut = [composed(text)[: self.settings.embedding_maximum_characters] for text in texts]
        return np.asarray(self._encode(cut), np.float64).reshape(len(texts), -1)

    def embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `encode`, and for which of the texts the model gave finite numbers, bool [N]."""
        vectors = self._raw(texts)
        finite = np.isfinite(vectors).all(axis=1)
        return self._unit(vectors), finite


def _load(source: str, settings: EmbedSettings) -> SentenceTransformer:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = open_transformer(source, settings.embedding_device)
    return in_half_precision(model) if settings.embedding_device == "cuda" else model


def open_transformer(source: str, device: str) -> SentenceTransformer:
    """Raises EclectusError, in one line, for what is no sentence-transformers model."""
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(source, device=device)
    # Whatever the model's modules and the hub's client raise.
    except Exception as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise EclectusError(
            f"embedding_model '{source}' cannot be loaded as a sentence-transformers model: {cause}"
        ) from error
    return model.eval()


def in_half_precision(model: SentenceTransformer) -> SentenceTransformer:
    """The model with weights in bf16, for GPUs: half the memory, and their matrix units are several times faster."""
    return model.bfloat16()


def digest_weights(source: str) -> str:
    """SHA-256 over the names and bytes of the weights, for models that are given by name only."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(open_transformer(source, "cpu").state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def embed_part(
    out: Path,
    source: str | Path,
    digest: str,
    settings: EmbedSettings,
    documents: Path,
    begin: int,
    end: int,
    known: list[tuple[Path, Path]],
) -> dict[str, Any]:
    """Writes embeddings.npy [end - begin, D] and ids.npy of these rows of a part of the documents.

    digest: of the model. known: ids and embeddings of earlier artifacts; documents in them keep their bits.
    """
    ids = document_ids(documents, begin, end)
    vectors, reused, lacking = _known(ids, known, settings), np.zeros(len(ids), bool), Lacking()
    if vectors is not None:
        reused = usable_rows(vectors)
    for rows, texts in _batches(documents, begin, end, ~reused):
        found, finite = _encoder(str(source), digest, settings).embed(texts)
        if vectors is None:
            vectors = np.zeros((len(ids), found.shape[1]), settings.embedding_precision)
        vectors[rows] = found
        zero = finite & ~found.any(axis=1)
        lacking.add(int((~finite).sum()), int(zero.sum()), (_texts(ids[rows[~finite]]), _texts(ids[rows[zero]])))
    vectors = np.zeros((len(ids), 0), settings.embedding_precision) if vectors is None else vectors
    np.save(out / "embeddings.npy", vectors)
    np.save(out / "ids.npy", ids)
    return {
        "reused": int(reused.sum()),
        "dimension": vectors.shape[1],
        "not_finite": lacking.not_finite,
        "zero": lacking.zero,
        "ids": list(lacking.ids),
    }


@functools.lru_cache(1)
def _encoder(source: str, digest: str, settings: EmbedSettings) -> Encoder:
    """Of this process; the one before it is let go."""
    return Encoder(source, settings)


def _texts(ids: np.ndarray) -> list[str]:
    return [each.decode() for each in ids[:SHOWN_IDS].tolist()]


def document_ids(documents: Path, begin: int, end: int) -> np.ndarray:
    """The ids of these rows of a part of the documents, bytes [n]."""
    column = pq.read_table(documents, columns=["document"])["document"].slice(begin, end - begin)
    return np.array(column.to_pylist(), "S32")


def _batches(documents: Path, begin: int, end: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Rows, counted from `begin`, and texts of the documents that are wanted, bool [end - begin], a row group each."""
    first = 0
    with pq.ParquetFile(documents) as file:
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            rows = np.arange(max(first, begin), min(last, end))
            rows = rows[wanted[rows - begin]]
            if len(rows):
                column = file.read_row_group(group, columns=["text"])["text"]
                yield rows - begin, [text or "" for text in column.take(rows - first).to_pylist()]
            first = last


def _known(ids: np.ndarray, known: list[tuple[Path, Path]], settings: EmbedSettings) -> np.ndarray | None:
    """Embeddings [n, D] of these documents out of earlier ones, zeros where there is none; None if there are none."""
    vectors = None
    for path, matrix in known:
        theirs = mapped(matrix)
        position = positions_of(ids, np.load(path))
        hit = np.flatnonzero(position >= 0)
        if vectors is None and len(hit):
            vectors = np.zeros((len(ids), theirs.shape[1]), settings.embedding_precision)
        if vectors is not None:
            hit = hit[~vectors[hit].any(axis=1)]
            vectors[hit] = theirs[position[hit]]
    return vectors


def check_model_folder(folder: Path) -> None:
    """Raises EclectusError for a sentence-transformers model that names files outside its own folder, or links there.

    Its modules.json gives the folders of the modules, sentence_bert_config.json may name another tokenizer.
    """
    what = f"embedding_model '{folder}'"
    check_tree(folder, what)
    for path in (folder / "modules.json", *sorted(folder.glob("**/sentence_bert_config.json"))):
        try:
            about = json.loads(path.read_text("utf-8")) if path.is_file() else []
        except ValueError as error:
            raise EclectusError(f"{what}: {path.name} is not JSON ({error}); fetch it again") from error
        for name in texts_in(about):
            if name.startswith("/") or ".." in name.split("/"):
                raise EclectusError(f"{what}: {path.name} names '{name}'; expected a name below the folder")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_in(each)


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder, manifests excepted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return hashlib.sha256(
        json.dumps([[path.relative_to(folder).as_posix(), hash_file(path)] for path in files]).encode()
    ).hexdigest()
