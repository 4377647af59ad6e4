"""Embeddings of all documents by any sentence-transformers model, part by part (`eclectus.tasks.grouping.encoder`).

    a part              of the documents, or PIECE documents of one where a transformer embeds; it is found again after
                        a kill, and in the next run on a grown corpus
    known documents     of other parts: found by id in earlier `embeddings` artifacts of the same model and limits
    result              embeddings [N, D], row i = document i, L2-normalised, and ids [N]: embeddings.npy and ids.npy
                        of a corpus of one part, else embeddings/part-*.npy and ids/part-*.npy

Price: the model's own `encode` time for the new documents. A static model gives a document the same bits in every
corpus. A transformer's last bits depend on the batch (1e-7 in a cosine); a document keeps the bits that it got first.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import matrix_files
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.normalise import VERSION as NORMALISATION
from eclectus.tasks.documents.table import first_rows, parts
from eclectus.tasks.grouping.encoder import (
    STATIC,
    EmbedSettings,
    Lacking,
    check_model_folder,
    digest_folder,
    digest_weights,
    document_ids,
    embed_part,
)
from eclectus.tasks.grouping.static_model import is_static_model
from eclectus.tasks.over_parts import Done, Part, find, key_of, link_or_copy, over_parts
from eclectus.tasks.ray_cluster import require_gpu
from eclectus.tasks.reuse import earlier, is_whole
from eclectus.tasks.run import current_run, metric, notify
from eclectus.tasks.step import step

PIECE = 2_000
STATIC_SECONDS, TRANSFORMER_SECONDS = 2e-4, 2e-2
"""CPU seconds per document, to choose between this process and Ray."""


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
    digest = digest_folder(source) if isinstance(source, Path) else digest_weights(source)
    key = hashlib.sha256(
        f"{digest} {settings.embedding_maximum_characters} {settings.embedding_precision} {NORMALISATION}".encode()
    ).hexdigest()
    _remove_old_logs()
    calls = _Calls(documents, settings, source, digest, key)
    done, lacking = calls.make()
    dimension = max(each.about["dimension"] for each in done)
    calls.write(done, dimension, out)
    # A model that was changed while it computed has another key.
    out.read = model_fingerprint(settings)
    count = calls.documents
    reused = sum(
        part.size if each.found else each.about["reused"] for part, each in zip(calls.parts, done, strict=True)
    )
    metric("documents_embedded", int(count - reused))
    metric("documents_reused", int(reused))
    if lacking:
        metric("documents_without_embedding", len(lacking))
        notify(
            "embeddings",
            f"{len(lacking):,} of {count:,} documents have no usable embedding and are chains of their own; "
            f"'{settings.embedding_model}' was {lacking}.",
        )
    out.rows = count
    out.statistics = {
        "documents": count,
        "reused": reused,
        "dimension": dimension,
        "without_embedding": len(lacking),
        "model": model.name if model else settings.embedding_model,
        "embedding_key": key,
    }


class _Calls:
    """The calls of `embed_part` for a documents artifact. parts: of all calls, in order; at: the documents' part of
    each."""

    def __init__(self, documents: Artifact, settings: EmbedSettings, source: Path | str, digest: str, key: str) -> None:
        self.settings, self.key = settings, key
        self.static = isinstance(source, Path) and is_static_model(source)
        self.parts: list[Part] = []
        self.at: list[int] = []
        digests, begins = documents.digests(), first_rows(documents)
        self.documents = int(begins[-1])
        for number, path in enumerate(parts(documents)):
            rows = int(begins[number + 1] - begins[number])
            step = max(1, rows) if self.static else PIECE
            content = digests[path.relative_to(documents.path).as_posix()]
            for begin in range(0, max(1, rows), step):
                end = min(begin + step, rows)
                arguments: dict[str, Any] = {"source": source, "digest": digest, "settings": settings}
                arguments |= {"documents": path, "begin": begin, "end": end, "known": []}
                name = f"embeddings of {path.name}, {begin} to {end}"
                self.parts.append(Part(key_of("embed 1", key, content, begin, end), arguments, end - begin, name))
                self.at.append(number)

    def make(self) -> tuple[list[Done], Lacking]:
        """All embeddings, and the documents that have none. Raises EclectusError if these are too many."""
        cuda = self.settings.embedding_device == "cuda" and not self.static
        if cuda:
            require_gpu("embedding_device")
        self._look_up()
        done: list[Done] = []
        # A transformer that gives nothing usable is noticed after its first part.
        for some in [self.parts] if self.static or len(self.parts) == 1 else [self.parts[:1], self.parts]:
            done = over_parts(
                embed_part,
                some,
                "embedding",
                seconds=STATIC_SECONDS if self.static else TRANSFORMER_SECONDS,
                workers=self.settings.embedding_workers or self.settings.curation_workers,
                gpus=float(cuda),
            )
            lacking = Lacking()
            for each in done:
                lacking.add(each.about["not_finite"], each.about["zero"], each.about["ids"])
            self._stop_if_lacking(lacking, int(sum(part.size for part in some)))
        return done, lacking

    def _stop_if_lacking(self, lacking: Lacking, done: int) -> None:
        """Of a small corpus one document may lack an embedding; never all may, nor all of a first part of many."""
        number, allowed = len(lacking), self.settings.embedding_missing_share * self.documents
        every = number == done >= min(self.documents, PIECE)
        if number and (every or number > max(1.0, allowed)):
            raise EclectusError(
                f"embedding_model '{self.settings.embedding_model}' gives no usable embedding for {number:,} of "
                f"{done:,} documents so far ({lacking}); without them the grouping would be chains of one: "
                "check the model's weights, choose another embedding_model, or raise 'embedding_missing_share'"
            )

    def _look_up(self) -> None:
        """Gives each part that must be computed the files of earlier artifacts that hold some of its documents."""
        artifacts = list(earlier("embeddings", embedding_key=self.key))
        missing = [number for number, part in enumerate(self.parts) if find(part.key) is None] if artifacts else []
        if not missing:
            return
        wanted = [_prefixes(self._ids(number)) for number in missing]
        seen: set[str] = set()
        for artifact in artifacts:
            digests, whole = artifact.digests(), None
            files = zip(matrix_files(artifact, "ids"), matrix_files(artifact, "embeddings"), strict=False)
            for ids, vectors in files:
                digest = digests[vectors.relative_to(artifact.path).as_posix()]
                if digest in seen:
                    continue
                seen.add(digest)
                there = np.sort(_prefixes(np.load(ids)))
                for number, prefixes in zip(missing, wanted, strict=True):
                    if (positions_of(prefixes, there, ascending=True) >= 0).any():
                        whole = is_whole(artifact) if whole is None else whole
                        if whole:
                            self.parts[number].arguments["known"].append((ids, vectors))

    def _ids(self, number: int) -> np.ndarray:
        arguments = self.parts[number].arguments
        return document_ids(arguments["documents"], arguments["begin"], arguments["end"])

    def write(self, done: list[Done], dimension: int, out: Draft) -> None:
        """Writes the matrices in the parts of the documents."""
        count = self.at[-1] + 1
        for number in range(count):
            pieces = [each for each, at in zip(done, self.at, strict=True) if at == number]
            for name in ("embeddings", "ids"):
                target = out.file(f"{name}.npy" if count == 1 else f"{name}/part-{number:05d}.npy")
                files = [each.file(f"{name}.npy") for each in pieces]
                if len(files) == 1:
                    link_or_copy(files[0], target)
                else:
                    np.save(target, np.concatenate([np.load(file) for file in files]))


def _prefixes(ids: np.ndarray) -> np.ndarray:
    """The first 16 of the 32 digits of each id, as a number: uint64 [n]."""
    digits = np.ascontiguousarray(ids, "S32").view(np.uint64).reshape(-1, 4)
    return digits[:, 0] ^ (digits[:, 1] * np.uint64(0x9E3779B97F4A7C15))


def _source(settings: EmbedSettings, model: Artifact | None) -> Path | str:
    if settings.embedding_model == STATIC:
        if model is None:
            raise EclectusError("embedding_model is 'static', but embed got no model; pass model=train_embedding(...)")
        return Path(model.path)
    settings.check_together()
    return Path(settings.embedding_model) if _is_folder(settings) else settings.embedding_model


def _is_folder(settings: EmbedSettings) -> bool:
    return settings.embedding_model != STATIC and Path(settings.embedding_model).is_dir()


def _remove_old_logs() -> None:
    """Versions before parts kept finished batches in a folder of the home."""
    run = current_run()
    if run is not None:
        shutil.rmtree(run.home.work / "embedding", ignore_errors=True)
