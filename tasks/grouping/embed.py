"""Embeddings of all documents by any sentence-transformers model, on a pool of Ray actors.

    known documents     found in earlier `embeddings` artifacts of the same model and limits, by document id: copied
    the others          sorted by length within windows, cut into chunks; each actor loads the model once and appends every
                        finished batch to a log of its own in the home's `work` folder, so that a killed run loses one batch
                        per worker (a static model embeds 50,000 documents or fewer right here)
    result              embeddings.npy [N, D], row i = document i, L2-normalised; ids.npy [N]

Price: the model's own `encode` time for the documents that are new to it, plus starting the actors (about 8 s: imports).
A static model gives a document the same bits whatever is embedded beside it. A transformer's last bits depend on the
batch (1e-7 in a cosine); a document keeps the bits of the first time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft, hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_ids, read_table
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.grouping.disk_matrix import create_matrix
from eclectus.tasks.grouping.embedding_log import Known, Log, locate, read_logs, sweep
from eclectus.tasks.grouping.static_embedding import EmbeddingText, StaticModel, is_static_model
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import current_run, metric, progress
from eclectus.tasks.settings import BASIC, RuntimeSetting
from eclectus.tasks.step import step

STATIC = "static"
ROWS = 65_536
STATIC_CHUNK = 2_048
STATIC_IN_PROCESS = 50_000
STATIC_DOCUMENTS_AN_ACTOR = 200_000
BATCHES_A_CHUNK = 4
WINDOW = 8_192
FOLDER = "embedding"


class EmbedSettings(EmbeddingText):
    """Which model embeds, and how the embeddings are stored."""

    embedding_model: str = Field(
        STATIC,
        description="'static' (trained on the corpus itself) or a sentence-transformers model: a hub name or a folder.",
        json_schema_extra=BASIC,
    )
    embedding_precision: Literal["float32", "float16"] = Field(
        "float32", description="Number format in which embeddings are stored."
    )
    embedding_batch: int = RuntimeSetting(32, "Documents in a forward pass of a transformer model.", ge=1)
    embedding_workers: int = RuntimeSetting(
        0, "Ray actors that embed, at most one a CPU; 0 decides by the amount of work.", ge=0
    )
    embedding_device: Literal["cpu", "cuda"] = RuntimeSetting(
        "cpu", "Where transformer models run; cuda takes one GPU an actor."
    )


def model_fingerprint(settings: EmbedSettings) -> dict[str, str]:
    """The digest of a model that is a folder, so that a changed folder is a changed input."""
    return {"embedding_model": digest_folder(Path(settings.embedding_model))} if _is_folder(settings) else {}


@step(makes="embeddings", version=2, fingerprint=model_fingerprint)
def embed(documents: Artifact, settings: EmbedSettings, out: Draft, model: Artifact | None = None) -> None:
    """Embeds every document, train and held-out; only those are computed that this model has not embedded before.

    model: the artifact of `train_embedding`, needed when `embedding_model` is 'static'.
    Raises EclectusError when the model is missing or cannot be loaded.
    """
    source = _source(settings, model)
    ids = read_ids(documents)
    with _Pool(documents, settings, source) as pool:
        key = hashlib.sha256(
            f"{pool.model_digest} {settings.embedding_maximum_characters} {settings.embedding_precision}".encode()
        ).hexdigest()
        with _work_folder(key) as work:
            known = _earlier(key, ids)
            sweep(work, known)
            known += read_logs(work)
            where = locate(ids, known)
            missing = np.flatnonzero(where[:, 0] < 0)
            pool.embed(missing, ids, work)
            if len(missing):
                known = [*known, *read_logs(work)]
                where = locate(ids, known)
            dimension = known[0].vectors.shape[1] if known else 0
            empty = _gather(known, where, dimension, settings, out)
    np.save(out.file("ids.npy"), ids)
    reused = len(ids) - len(missing)
    metric("documents_embedded", len(missing))
    metric("documents_reused", reused)
    out.rows = len(ids)
    out.statistics = {
        "documents": len(ids),
        "reused": reused,
        "dimension": dimension,
        "without_embedding": empty,
        "model": model.name if model else settings.embedding_model,
        "embedding_key": key,
    }


class Encoder:
    """A loaded model: texts in, normalised vectors out. It lives in a Ray actor, or anywhere."""

    def __init__(self, source: str, settings: EmbedSettings, threads: int = 0) -> None:
        """threads: CPU threads that this process shall compute with from now on; 0 leaves it as it is."""
        if threads:
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        self.settings = settings
        self._log: Log | None = None
        if is_static_model(Path(source)):
            self.model = StaticModel.load(Path(source))
            self._encode = self.model.encode
            return
        import torch
        from sentence_transformers import SentenceTransformer

        if threads:
            torch.set_num_threads(threads)
        self.model = SentenceTransformer(source, device=settings.embedding_device)
        self.model.eval()
        self._encode = functools.partial(
            self.model.encode, batch_size=settings.embedding_batch, show_progress_bar=False
        )

    def digest(self) -> str:
        """SHA-256 over the names and bytes of the weights, for models that are known by a name only."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(_torch_bytes()).numpy().tobytes())
        return digest.hexdigest()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [N, D] in the stored precision; zeros where the model gives nothing or no finite number."""
        cut = [text[: self.settings.embedding_maximum_characters] for text in texts]
        vectors = np.asarray(self._encode(cut), np.float64).reshape(len(texts), -1)
        vectors[~np.isfinite(vectors).all(axis=1)] = 0
        norms = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0).astype(
            self.settings.embedding_precision
        )

    def embed(self, documents: Artifact, rows: np.ndarray, ids: np.ndarray, work: str, batch: int) -> int:
        """Embeds these rows of the documents, whose ids these are, and logs them under `work` batch by batch; returns how many."""
        self._log = self._log or Log(Path(work))
        reader = TextReader(documents)
        for begin in range(0, len(rows), batch):
            part = slice(begin, begin + batch)
            self._log.append(ids[part], self.encode(reader.read(rows[part])))
        return len(rows)


class _Pool:
    """The actors. They start when first needed, and are gone at the end of the block."""

    def __init__(self, documents: Artifact, settings: EmbedSettings, source: Path | str) -> None:
        self.documents, self.settings, self.source = documents, settings, source
        self.static = isinstance(source, Path) and is_static_model(source)
        self.actors: list[Any] = []
        self._digest = digest_folder(source) if isinstance(source, Path) else None

    @property
    def model_digest(self) -> str:
        if self._digest is None:
            import ray

            self._start(1)
            self._digest = ray.get(self.actors[0].digest.remote())
        return self._digest

    def embed(self, rows: np.ndarray, ids: np.ndarray, work: Path) -> None:
        """Embeds these rows of the documents [N] with these ids [N], every chunk into a file of its own under `work`."""
        if len(rows) == 0:
            return
        chunks = self._cut(rows)
        report_progress, done = progress(len(rows), "embedding", "documents"), 0
        if self.static and len(rows) <= STATIC_IN_PROCESS and not self.settings.embedding_workers:
            # Ray and an actor would start for 8 seconds to work for less.
            encoder = Encoder(str(self.source), self.settings)
            for chunk in chunks:
                done += encoder.embed(self.documents, chunk, ids[chunk], str(work), STATIC_CHUNK)
                report_progress(done)
            return
        import ray

        self._start(self._size(len(rows), len(chunks)))
        free, running = list(self.actors), {}
        batch = STATIC_CHUNK if self.static else self.settings.embedding_batch
        while chunks or running:
            while chunks and free:
                actor, chunk = free.pop(), chunks.pop()
                running[actor.embed.remote(self.documents, chunk, ids[chunk], str(work), batch)] = actor
            ready, _ = ray.wait(list(running), num_returns=1)
            free.append(running.pop(ready[0]))
            done += ray.get(ready[0])
            report_progress(done)

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        if self.static:
            return [rows[begin : begin + STATIC_CHUNK] for begin in range(0, len(rows), STATIC_CHUNK)]
        # Documents of like length share a batch, so that little of it is padding; windows keep the reading local.
        sizes = read_table(self.documents, ["bytes"])["bytes"].to_numpy()[rows]
        size, chunks = BATCHES_A_CHUNK * self.settings.embedding_batch, []
        for begin in range(0, len(rows), WINDOW):
            window = rows[begin : begin + WINDOW][np.argsort(sizes[begin : begin + WINDOW], kind="stable")]
            chunks += [window[first : first + size] for first in range(0, len(window), size)]
        return chunks

    def _size(self, rows: int, chunks: int) -> int:
        import ray

        from eclectus.tasks.ray_cluster import ensure_ray

        ensure_ray()
        most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        if self.settings.embedding_device == "cuda":
            most = min(most, int(ray.cluster_resources().get("GPU", 0)))
            if most == 0:
                raise EclectusError(
                    "embedding_device is 'cuda', but Ray has no GPU; set it to 'cpu' or add a node with one"
                )
        wanted = 1 + rows // STATIC_DOCUMENTS_AN_ACTOR if self.static else chunks
        return min(self.settings.embedding_workers or wanted, most)

    def _start(self, count: int) -> None:
        from eclectus.tasks.ray_cluster import ensure_ray

        ensure_ray()
        import ray

        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        threads = max(1, min(cpus, os.cpu_count() or 1) // max(count, 1))
        gpus = 1 if self.settings.embedding_device == "cuda" else 0
        factory = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=1, max_task_retries=1)(Encoder)
        self.actors += [
            factory.remote(str(self.source), self.settings, threads) for _ in range(count - len(self.actors))
        ]
        try:
            ray.get([actor.__ray_ready__.remote() for actor in self.actors])
        except ray.exceptions.RayActorError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise EclectusError(
                f"embedding_model '{self.settings.embedding_model}' cannot be loaded as a sentence-transformers model: {cause}"
            ) from error

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            import ray

            with contextlib.suppress(Exception):
                ray.kill(actor)


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder, manifests apart."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return hashlib.sha256(
        json.dumps([[path.relative_to(folder).as_posix(), hash_file(path)] for path in files]).encode()
    ).hexdigest()


def _source(settings: EmbedSettings, model: Artifact | None) -> Path | str:
    if settings.embedding_model == STATIC:
        if model is None:
            raise EclectusError("embedding_model is 'static', but embed got no model; pass model=train_embedding(...)")
        return Path(model.path)
    if not _is_folder(settings):
        if settings.embedding_model.startswith((".", "/", "~")):
            raise EclectusError(
                f"embedding_model '{settings.embedding_model}' is no folder; give one, a hub name or 'static'"
            )
        return settings.embedding_model
    folder = Path(settings.embedding_model)
    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise EclectusError(
            f"embedding_model '{folder}' has no modules.json or config.json, so it is no sentence-transformers model"
        )
    return folder


def _is_folder(settings: EmbedSettings) -> bool:
    return settings.embedding_model != STATIC and Path(settings.embedding_model).is_dir()


def _torch_bytes() -> Any:
    import torch

    return torch.uint8


@contextlib.contextmanager
def _work_folder(key: str) -> Iterator[Path]:
    """Where the chunks of this model go: kept in the home for the next run, or for this call only without a run."""
    run = current_run()
    if run is None:
        with tempfile.TemporaryDirectory(prefix="eclectus-") as folder:
            yield Path(folder)
        return
    work = run.home.work / FOLDER / key[:32]
    work.mkdir(parents=True, exist_ok=True)
    yield work


def _earlier(key: str, ids: np.ndarray) -> list[Known]:
    """The whole `embeddings` artifacts of this home that were made under this key and hold some of these documents."""
    found, missing = [], ids
    for artifact in earlier("embeddings", embedding_key=key):
        with contextlib.suppress(EclectusError, OSError, ValueError):
            ids_then, vectors = (np.load(artifact.file(name), mmap_mode="r") for name in ("ids.npy", "embeddings.npy"))
            known = Known(ids_then, vectors)
            there = np.isin(missing, known.ids)
            if there.any() and is_whole(artifact):
                found.append(known)
                missing = missing[~there]
    return found


def _gather(known: list[Known], where: np.ndarray, dimension: int, settings: EmbedSettings, out: Draft) -> int:
    """Writes embeddings.npy and returns how many documents have none (zeros)."""
    target = create_matrix(out.file("embeddings.npy"), settings.embedding_precision, (len(where), dimension))
    empty = 0
    for begin in range(0, len(where), ROWS):
        part = where[begin : begin + ROWS]
        for number in np.unique(part[:, 0]):
            here = np.flatnonzero(part[:, 0] == number)
            target[begin + here] = known[number].vectors[part[here, 1]]
        empty += int((~target[begin : begin + ROWS].any(axis=1)).sum())
    target.flush()
    return empty
