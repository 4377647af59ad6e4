"""Embeddings of all documents by any sentence-transformers model, on a pool of Ray actors.

    known documents     found by id in earlier `embeddings` artifacts of the same model and limits, and copied
    the others          embedded (`eclectus.tasks.grouping.encoder`), batch by batch into logs that outlive a killed run
    result              embeddings.npy [N, D], row i = document i, L2-normalised; ids.npy [N]

Price: the model's own `encode` time for the new documents, plus starting the actors (about 8 s: imports). A static
model gives a document the same bits in every corpus. A transformer's last bits depend on the batch (1e-7 in a
cosine); a document keeps the bits that it got first.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import create_matrix, usable_rows
from eclectus.tasks.documents.normalise import VERSION as NORMALISATION
from eclectus.tasks.documents.table import read_ids
from eclectus.tasks.grouping.embedding_log import StoredVectors, locate, read_logs, remove_stale_logs
from eclectus.tasks.grouping.encoder import STATIC, EmbedSettings, EncoderPool, check_model_folder, digest_folder
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import current_run, metric, notify
from eclectus.tasks.step import step

ROWS_AT_ONCE = 65_536
FOLDER = "embedding"


def model_fingerprint(settings: EmbedSettings) -> dict[str, str]:
    """The digest of a model that is a folder, or the commit that its name on the hub points to now, so that a changed
    model is a changed input. Without a connection, the commit downloaded last."""
    if settings.embedding_model == STATIC:
        return {}
    if _is_folder(settings):
        check_model_folder(Path(settings.embedding_model))
        return {"embedding_model": digest_folder(Path(settings.embedding_model))}
    commit = _commit(settings.embedding_model)
    return {"embedding_model": f"commit-{commit}"} if commit else {}


def _commit(name: str) -> str | None:
    """None for a name that is unknown here and on the hub: loading it gives the error."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    whole = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return str(HfApi().model_info(whole).sha)
    except Exception:
        # The hub's client raises any exception of its network library.
        with contextlib.suppress(ValueError):
            for file in ("modules.json", "config.json"):
                found = try_to_load_from_cache(whole, file)
                if isinstance(found, str):
                    return Path(found).parent.name
        return None


@step(makes="embeddings", version=4, fingerprint=model_fingerprint)
def embed(documents: Artifact, settings: EmbedSettings, out: Draft, model: Artifact | None = None) -> None:
    """Embeds every document, train and held-out; only documents that are new to the model are computed.

    model: the artifact of `train_embedding`, needed when `embedding_model` is 'static'.
    Raises EclectusError when the model is missing or cannot be loaded, or gives no usable embedding (zeros, NaN,
    infinities) for too many documents. The others of these are rows of zeros, and reported.
    """
    source = _source(settings, model)
    ids = read_ids(documents)
    with EncoderPool(documents, settings, source) as pool:
        key = hashlib.sha256(
            f"{pool.model_digest} {settings.embedding_maximum_characters} {settings.embedding_precision} "
            f"{NORMALISATION}".encode()
        ).hexdigest()
        with _work_folder(key) as work:
            known = _earlier_embeddings(key, ids)
            remove_stale_logs(work, known)
            known += map(_usable, read_logs(work))
            where = locate(ids, known)
            missing = np.flatnonzero(where[:, 0] < 0)
            pool.embed(missing, ids, work)
            if len(missing):
                known = [*known, *map(_usable, read_logs(work))]
                where = locate(ids, known)
            dimension = known[0].vectors.shape[1] if known else 0
            empty = _write_vectors(known, where, dimension, settings, out)
    # A model that was changed while it computed has another key.
    out.read = model_fingerprint(settings)
    np.save(out.file("ids.npy"), ids)
    reused = len(ids) - len(missing)
    metric("documents_embedded", len(missing))
    metric("documents_reused", reused)
    if empty:
        metric("documents_without_embedding", empty)
        notify(
            "embeddings",
            f"{empty:,} of {len(ids):,} documents have no usable embedding and are chains of their own; "
            f"'{settings.embedding_model}' was {pool.lacking}.",
        )
    out.rows = len(ids)
    out.statistics = {
        "documents": len(ids),
        "reused": reused,
        "dimension": dimension,
        "without_embedding": empty,
        "model": model.name if model else settings.embedding_model,
        "embedding_key": key,
    }


def _source(settings: EmbedSettings, model: Artifact | None) -> Path | str:
    if settings.embedding_model == STATIC:
        if model is None:
            raise EclectusError("embedding_model is 'static', but embed got no model; pass model=train_embedding(...)")
        return Path(model.path)
    settings.check_together()
    return Path(settings.embedding_model) if _is_folder(settings) else settings.embedding_model


def _is_folder(settings: EmbedSettings) -> bool:
    return settings.embedding_model != STATIC and Path(settings.embedding_model).is_dir()


@contextlib.contextmanager
def _work_folder(key: str) -> Iterator[Path]:
    """Folder for the logs of this model: kept in the home for the next run, or temporary outside a run."""
    run = current_run()
    if run is None:
        with tempfile.TemporaryDirectory(prefix="eclectus-") as folder:
            yield Path(folder)
        return
    work = run.home.work / FOLDER / key[:32]
    work.mkdir(parents=True, exist_ok=True)
    yield work


def _earlier_embeddings(key: str, ids: np.ndarray) -> list[StoredVectors]:
    """The intact `embeddings` artifacts of this home that have this key and hold some of these documents."""
    found, missing = [], ids
    for artifact in earlier("embeddings", embedding_key=key):
        with contextlib.suppress(EclectusError, OSError, ValueError):
            known = StoredVectors(
                np.load(artifact.file("ids.npy"), mmap_mode="r"),
                np.load(artifact.file("embeddings.npy"), mmap_mode="r"),
            )
            known = _usable(known) if artifact.statistics.get("without_embedding") else known
            there = np.isin(missing, known.ids)
            if there.any() and is_whole(artifact):
                found.append(known)
                missing = missing[~there]
    return found


def _usable(known: StoredVectors) -> StoredVectors:
    """Without the ids of documents that got no usable embedding: they are embedded again."""
    return StoredVectors(np.where(usable_rows(known.vectors), known.ids, b""), known.vectors)


def _write_vectors(
    known: list[StoredVectors], where: np.ndarray, dimension: int, settings: EmbedSettings, out: Draft
) -> int:
    """Writes embeddings.npy from `known`, as `locate` found it; returns how many documents have none (zeros)."""
    target = create_matrix(out.file("embeddings.npy"), settings.embedding_precision, (len(where), dimension))
    for begin in range(0, len(where), ROWS_AT_ONCE):
        part = where[begin : begin + ROWS_AT_ONCE]
        for number in np.unique(part[part[:, 0] >= 0, 0]):
            here = np.flatnonzero(part[:, 0] == number)
            target[begin + here] = known[number].vectors[part[here, 1]]
    target.flush()
    return int((where[:, 0] < 0).sum())
