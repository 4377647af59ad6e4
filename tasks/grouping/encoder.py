"""Encoders: an embedding model in this process or in a pool of Ray actors, which log every finished batch.

Each actor loads the model once. Documents are sorted by length within windows and cut into chunks; an actor appends
every finished batch to its own log in the home's `work` folder, so that a killed run loses at most one batch per
worker. A static model embeds up to 50,000 documents in this process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Artifact, hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_tree
from eclectus.tasks.documents.normalise import composed
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.grouping.embedding_log import Log
from eclectus.tasks.grouping.static_embedding import EmbeddingText
from eclectus.tasks.grouping.static_model import StaticModel, is_static_model
from eclectus.tasks.run import progress
from eclectus.tasks.settings import BASIC, RuntimeSetting

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STATIC = "static"
STATIC_CHUNK = 2_048
STATIC_IN_PROCESS = 50_000
STATIC_DOCUMENTS_PER_ACTOR = 200_000
BATCHES_PER_CHUNK = 4
WINDOW = 8_192
SHOWN_IDS = 3


class EmbedSettings(EmbeddingText):
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
        0, "Ray actors that embed, at most one per CPU; 0 decides by the amount of work.", ge=0
    )
    embedding_device: Literal["cpu", "cuda"] = RuntimeSetting(
        "cpu", "Where transformer models run; cuda takes one GPU per actor."
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
    """Documents that got no usable embedding: ids of those for which the model gave NaN or infinities, and zeros."""

    not_finite: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.not_finite) + len(self.zero)

    def add(self, other: Lacking) -> None:
        self.not_finite += other.not_finite
        self.zero += other.zero

    def __str__(self) -> str:
        ids = [*self.not_finite, *self.zero]
        first = ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")
        return f"not finite for {len(self.not_finite):,} documents, zero for {len(self.zero):,}: {first}"


class Encoder:
    """A loaded model: texts in, normalised vectors out. Runs in a Ray actor or in this process."""

    def __init__(self, source: str, settings: EmbedSettings, threads: int = 0) -> None:
        """threads: sets how many CPU threads this process computes with; 0 leaves the number unchanged."""
        if threads:
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        self.settings = settings
        self._log: Log | None = None
        self.model: StaticModel | SentenceTransformer
        self._encode: Callable[[list[str]], Any]
        if is_static_model(Path(source)):
            static = StaticModel.load(Path(source))
            self.model, self._encode = static, static.encode
            return
        import torch
        from sentence_transformers import SentenceTransformer

        if threads:
            torch.set_num_threads(threads)
        model = SentenceTransformer(source, device=settings.embedding_device)
        model.eval()
        self.model = model
        self._encode = functools.partial(model.encode, batch_size=settings.embedding_batch, show_progress_bar=False)

    def digest(self) -> str:
        """SHA-256 over the names and bytes of the weights, for models that are given by name only."""
        import torch

        if isinstance(self.model, StaticModel):
            raise TypeError("a static model is a folder: use digest_folder")
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

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

    def embed(self, documents: Artifact, rows: np.ndarray, ids: np.ndarray, work: str, batch: int) -> Lacking:
        """Embeds rows [n] of the documents and appends them to a log in `work` batch by batch.

        ids: bytes [n], of these rows. Returns the documents without a usable embedding, which are not in the log.
        """
        self._log = self._log or Log(Path(work))
        reader, lacking = TextReader(documents), Lacking()
        for begin in range(0, len(rows), batch):
            part = slice(begin, begin + batch)
            vectors = self._raw(reader.read(rows[part]))
            finite = np.isfinite(vectors).all(axis=1)
            vectors = self._unit(vectors)
            usable = vectors.any(axis=1)
            self._log.append(ids[part][usable], vectors[usable])
            lacking.add(Lacking(_texts(ids[part][~finite]), _texts(ids[part][finite & ~usable])))
        return lacking


def _texts(ids: np.ndarray) -> list[str]:
    return [each.decode() for each in ids.tolist()]


class EncoderPool:
    """Ray actors that embed: started when first needed, killed at the end of the `with` block."""

    def __init__(self, documents: Artifact, settings: EmbedSettings, source: Path | str) -> None:
        self.documents, self.settings, self.source = documents, settings, source
        self.static = isinstance(source, Path) and is_static_model(source)
        self.actors: list[Any] = []
        self.lacking = Lacking()
        self._digest = digest_folder(source) if isinstance(source, Path) else None

    @property
    def model_digest(self) -> str:
        """Digest of the model's folder, or of its weights if it is given by name."""
        if self._digest is None:
            import ray

            self._start(1)
            self._digest = ray.get(self.actors[0].digest.remote())
        return self._digest

    def embed(self, rows: np.ndarray, ids: np.ndarray, work: Path) -> None:
        """Embeds these rows [n] of the documents into logs in `work`. ids: of all documents, bytes [N].

        Raises EclectusError as soon as too many documents have no usable embedding (`embedding_missing_share`).
        """
        if len(rows) == 0:
            return
        chunks = self._cut(rows)
        report_progress, done = progress(len(rows), "embedding", "documents"), 0

        def ended(chunk: np.ndarray, lacking: Lacking) -> None:
            nonlocal done
            done += len(chunk)
            self.lacking.add(lacking)
            self._stop_if_lacking(done, len(ids))
            report_progress(done)

        if self.static and len(rows) <= STATIC_IN_PROCESS and not self.settings.embedding_workers:
            # Starting Ray and an actor takes 8 seconds, more than the work itself.
            encoder = Encoder(str(self.source), self.settings)
            for chunk in chunks:
                ended(chunk, encoder.embed(self.documents, chunk, ids[chunk], str(work), STATIC_CHUNK))
            return
        import ray

        self._start(self._size(len(rows), len(chunks)))
        free = list(self.actors)
        running: dict[Any, tuple[Any, np.ndarray]] = {}
        batch = STATIC_CHUNK if self.static else self.settings.embedding_batch
        while chunks or running:
            while chunks and free:
                actor, chunk = free.pop(), chunks.pop()
                running[actor.embed.remote(self.documents, chunk, ids[chunk], str(work), batch)] = actor, chunk
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, chunk = running.pop(ready[0])
            free.append(actor)
            ended(chunk, ray.get(ready[0]))

    def _stop_if_lacking(self, done: int, count: int) -> None:
        """Of a small corpus one document may lack an embedding; never all may. count: of all documents."""
        number = len(self.lacking)
        if number == count or number > max(1.0, self.settings.embedding_missing_share * count):
            raise EclectusError(
                f"embedding_model '{self.settings.embedding_model}' gives no usable embedding for {number:,} of "
                f"{done:,} documents so far ({self.lacking}); without them the grouping would be chains of one: "
                "check the model's weights, choose another embedding_model, or raise 'embedding_missing_share'"
            )

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        if self.static:
            return [rows[begin : begin + STATIC_CHUNK] for begin in range(0, len(rows), STATIC_CHUNK)]
        # Documents of similar length share a batch, so that little of it is padding; windows keep reads local.
        sizes = read_table(self.documents, ["bytes"])["bytes"].to_numpy()[rows]
        size, chunks = BATCHES_PER_CHUNK * self.settings.embedding_batch, []
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
        wanted = 1 + rows // STATIC_DOCUMENTS_PER_ACTOR if self.static else chunks
        return min(self.settings.embedding_workers or wanted, most)

    def _start(self, count: int) -> None:
        from eclectus.tasks.ray_cluster import ensure_ray

        ensure_ray()
        import ray

        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        threads = max(1, min(cpus, os.cpu_count() or 1) // max(count, 1))
        gpus = 1 if self.settings.embedding_device == "cuda" else 0
        actor_class = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=1, max_task_retries=1)(Encoder)
        self.actors += [
            actor_class.remote(str(self.source), self.settings, threads) for _ in range(count - len(self.actors))
        ]
        try:
            ray.get([actor.__ray_ready__.remote() for actor in self.actors])
        except ray.exceptions.RayActorError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise EclectusError(
                f"embedding_model '{self.settings.embedding_model}' cannot be loaded as a sentence-transformers model: "
                f"{cause}"
            ) from error

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            import ray

            with contextlib.suppress(Exception):
                ray.kill(actor)


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
