"""Near-duplicates and nearest neighbours beside other tools, on the same documents and vectors, one thread each.

    python -m venv PEERS && PEERS/bin/pip install rensa semhash hnswlib usearch "datatrove[processing]" spacy faiss-cpu
    python benchmarks/curation_peers.py SOURCES HOME PEERS/bin/python

SOURCES: files of benchmarks/curation_corpus.py, whose ids name the document that a near-duplicate repeats. HOME: a new
home, for our own steps. Every row is one process: CPU seconds, documents per second and peak memory. Recall: share of
the planted near-duplicates with an overlap of at least 0.7 (Jaccard of 5-character shingles) that are dropped, or whose
original is. Precision: share of the dropped documents that were planted. Neighbours: recall@20 by cosine against exact
search for 1,000 documents, at settings whose recall is nearest to .95, .98 and .99.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

THRESHOLD = 0.7
K = 20
QUERIES = 1000
ONE_THREAD = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
}


def records(sources: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(sources)]


def lines(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        with open(path) as handle:
            yield from handle


def shingles(text: str) -> set[str]:
    text = " ".join(text.lower().split())
    return {text[begin : begin + 5] for begin in range(max(1, len(text) - 4))}


def scores(every: list[dict[str, Any]], dropped: set[str]) -> dict[str, float]:
    """Recall and precision of dropped documents (their ids)."""
    texts = {each["id"].split("~")[0].split("=")[0]: each["text"] for each in every}
    names = {each["id"].split("~")[0].split("=")[0]: each["id"] for each in every}
    wanted, found, planted = 0, 0, set()
    for each in every:
        mark = "~" if "~" in each["id"] else "=" if "=" in each["id"] else ""
        if not mark:
            continue
        original = each["id"].split(mark)[1]
        planted |= {each["id"], names.get(original, "")}
        if mark == "~" and original in texts:
            a, b = shingles(each["text"]), shingles(texts[original])
            if len(a & b) >= THRESHOLD * len(a | b):
                wanted += 1
                found += bool({each["id"], names[original]} & dropped)
    return {"recall": found / max(1, wanted), "precision": len(dropped & planted) / max(1, len(dropped))}


def rensa_characters(every: list[dict[str, Any]]) -> set[str]:
    from rensa import RMinHashDeduplicator

    keeper = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=128, use_lsh=True)
    kept = keeper.add_pairs((str(number), list(shingles(each["text"]))) for number, each in enumerate(every))
    return {each["id"] for each, keep in zip(every, kept, strict=True) if not keep}


def semhash_cosine(every: list[dict[str, Any]], vectors: np.ndarray, vectors_file: str) -> set[str]:
    """Beside the file of the vectors are the ids of the documents that have one: all but exact copies."""
    from semhash import SemHash

    names = set(json.loads(Path(vectors_file).with_suffix(".json").read_text()))

    class Given:
        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            raise RuntimeError("the embeddings are given")

    rows = [{"text": each["text"], "id": each["id"]} for each in every if each["id"] in names]
    hashed = SemHash.from_embeddings(vectors, rows, Given(), columns=["text"])
    return {each.record["id"] for each in hashed.self_deduplicate(threshold=0.9).filtered}


def datatrove_minhash(sources: Path, buckets: int, each: int) -> set[str]:
    """The ids that datatrove's four steps drop. buckets, each: of its MinHash; its defaults are 14 and 8."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig(num_buckets=buckets, hashes_per_bucket=each)
    with tempfile.TemporaryDirectory() as folder:

        def reader() -> Any:
            return JsonlReader(str(sources), glob_pattern="*.jsonl")

        removed = JsonlWriter(f"{folder}/removed", compression=None)
        for steps, tasks in (
            ([reader(), MinhashDedupSignature(f"{folder}/signatures", config)], 1),
            ([MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)], buckets),
            ([MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config)], 1),
            ([reader(), MinhashDedupFilter(f"{folder}/remove", exclusion_writer=removed)], 1),
        ):
            # In this process, so that its CPU seconds are counted.
            LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=f"{folder}/logs/{time.time()}").run()
        return {json.loads(line)["id"] for line in lines(Path(folder, "removed"))}


def recall(vectors: np.ndarray, found: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> float:
    """Share of listed documents as near as the 20th true neighbour. found: rows [1000, 20]. exact: cosines, sorted."""
    cosines = np.einsum("qd,qkd->qk", vectors[queries], vectors[np.maximum(found, 0)])
    return float(((cosines >= exact[:, -1:] - 1e-6) & (found >= 0)).mean())


def indexes(vectors: np.ndarray) -> dict[str, Callable[[int], Any]]:
    """Of each peer a function from its effort to a search of all documents: rows [N, 21], itself among them."""

    def faiss_hnsw(effort: int) -> np.ndarray:
        import faiss

        index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = max(40, effort)
        index.add(vectors)
        index.hnsw.efSearch = effort
        return index.search(vectors, K + 1)[1]

    def hnswlib_hnsw(effort: int) -> np.ndarray:
        import hnswlib

        index = hnswlib.Index("ip", vectors.shape[1])
        index.init_index(len(vectors), ef_construction=max(40, effort), M=16)
        index.set_num_threads(1)
        index.add_items(vectors)
        index.set_ef(effort)
        return index.knn_query(vectors, K + 1)[0].astype(np.int64)

    def usearch_hnsw(effort: int) -> np.ndarray:
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", expansion_add=max(40, effort))
        index.add(np.arange(len(vectors)), vectors, threads=1)
        index.expansion_search = effort
        return index.search(vectors, K + 1, threads=1).keys.astype(np.int64)

    return {"faiss HNSW 32": faiss_hnsw, "hnswlib 16": hnswlib_hnsw, "usearch f16": usearch_hnsw}


def without_self(found: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The first K of rows [n, K + 1] that are not the query's own."""
    order = np.argsort(found == queries[:, None], axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)[:, :K]


def peer(name: str, sources: Path, vectors_file: str) -> dict[str, Any]:
    """Runs one peer in this process and says what it cost and found."""
    kind, _, effort = name.partition(" @")
    tool = kind.replace(",", " ").split()[0]
    every = records(sources) if tool in ("rensa", "semhash", "datatrove") else []
    vectors = np.load(vectors_file).astype(np.float32) if not every or kind.startswith("semhash") else np.empty((0, 0))
    began = sum(os.times()[:4])
    about: dict[str, Any] = {"name": name}
    if every:
        dropped = {
            "rensa": lambda: rensa_characters(every),
            "semhash": lambda: semhash_cosine(every, vectors, vectors_file),
            "datatrove": lambda: datatrove_minhash(sources, *((14, 8) if "defaults" in kind else (20, 5))),
        }[tool]()
        about["cpu"] = sum(os.times()[:4]) - began
        about |= scores(every, dropped) | {"dropped": len(dropped)}
    else:
        found = indexes(vectors)[kind](int(effort))
        about["cpu"] = sum(os.times()[:4]) - began
        queries = np.sort(np.random.default_rng(0).choice(len(vectors), QUERIES, replace=False))
        cosines = vectors[queries] @ vectors.T
        cosines[np.arange(QUERIES), queries] = -2
        exact = -np.sort(np.partition(-cosines, K, axis=1)[:, :K], axis=1)
        about["recall@20"] = recall(vectors, without_self(found[queries], queries), queries, exact)
    about["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return about


PEERS = (
    "rensa, characters", "semhash, cosine .9", "datatrove MinHash, defaults", "datatrove MinHash, 20 x 5",
    *(f"{name} @{effort}" for name in ("faiss HNSW 32", "hnswlib 16", "usearch f16") for effort in (40, 80, 160)),
)  # fmt: skip


def ours(sources: Path, home: Path) -> tuple[list[dict[str, Any]], Path]:
    """Rows of our steps, one process and one worker, and a file of the embeddings."""
    from eclectus.storage.home import Home
    from eclectus.storage.journal import Journal
    from eclectus.storage.step_keys import KnownKeys
    from eclectus.tasks.documents.ingest import IngestSettings, ingest
    from eclectus.tasks.documents.languages import LanguageSettings, languages
    from eclectus.tasks.documents.split import SplitSettings, split
    from eclectus.tasks.documents.table import read_table
    from eclectus.tasks.grouping.embed import EmbedSettings, embed
    from eclectus.tasks.grouping.group import GroupSettings, group
    from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
    from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
    from eclectus.tasks.run import Run, activate

    place, rows = Home.open(home), []
    with Journal(place.journal, "peers") as journal, contextlib.ExitStack() as active:
        journal.event("run_started", flow="benchmark", parameters={}, packages={})
        known = KnownKeys(place.keys, place.store)
        active.enter_context(activate(Run("peers", place, journal, known, [], "benchmark")))

        def timed(name: str, step: Callable[[], Any]) -> Any:
            began = sum(os.times()[:4])
            made = step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            rows.append({"name": f"ours: {name}", "cpu": sum(os.times()[:4]) - began, "peak_gb": peak})
            return made

        one = {"curation_workers": 1}
        expanded = ["el", "es", "hu", "tr", "zh"]
        documents = timed("ingest", lambda: ingest(settings=IngestSettings(sources=[str(sources)], **one)))
        told = LanguageSettings(expanded_languages=expanded, **one)
        documents = timed("languages", lambda: languages(documents=documents, settings=told))
        documents = timed("split", lambda: split(documents=documents, settings=SplitSettings(**one)))
        model = timed(
            "train_embedding", lambda: train_embedding(documents=documents, settings=StaticEmbeddingSettings())
        )
        vectors = timed("embed", lambda: embed(documents=documents, model=model, settings=EmbedSettings(**one)))
        for target in (0.95, 0.98, 0.99):
            settings = NeighborSettings(neighbors_recall_target=target, neighbors_partition="none", **one)
            nearest = timed(
                f"neighbours at {target}",
                lambda chosen=settings: neighbors(documents=documents, embeddings=vectors, settings=chosen),
            )
            rows[-1]["recall@20"] = nearest.statistics["partitions"][0]["recall"]
        given = {"documents": documents, "neighbors": nearest, "embeddings": vectors}
        grouping = timed("group", lambda: group(settings=GroupSettings(**one), **given))
        import pyarrow.parquet as pq

        table = read_table(documents, ["name", "document"])
        names, ids = table["name"].to_pylist(), table["document"].to_pylist()
        near = {ids[row] for row in pq.read_table(grouping.file("duplicates.parquet"))["row"].to_pylist()}
        near |= set(pq.read_table(documents.file("copies.parquet"))["document"].to_pylist())
        kept = {name for name, each in zip(names, ids, strict=True) if each not in near}
        every = records(sources)
        dropped = {each["id"] for each in every if each["id"] not in kept}
        rows[-1] |= scores(every, dropped) | {"dropped": len(dropped)}
        stacked = Path(place.root) / "vectors.npy"
        from eclectus.tasks.disk_matrix import open_embeddings

        np.save(stacked, open_embeddings(vectors)[:].astype(np.float32))
        stacked.with_suffix(".json").write_text(json.dumps(names))
    return rows, stacked


def main() -> None:
    if sys.argv[1] == "--peer":
        print(json.dumps(peer(sys.argv[2], Path(sys.argv[3]), sys.argv[4])))
        return
    sources, home, python = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    os.environ |= ONE_THREAD
    count = sum(1 for _ in lines(sources))
    rows, vectors = ours(sources, home)
    for name in PEERS:
        words = [python, __file__, "--peer", name, str(sources), str(vectors)]
        done = subprocess.run(words, env=os.environ | ONE_THREAD, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"name": name})
        if done.returncode:
            print(done.stderr[-1000:], file=sys.stderr)
        (home / "curation_peers.json").write_text(json.dumps(rows, indent=1))
    print(f"{'':32}{'CPU s':>8}{'docs/s':>9}{'GB':>6}{'recall':>8}{'precision':>10}{'recall@20':>10}")
    for row in rows:
        cpu = row.get("cpu", float("nan"))
        numbers = [row.get(name) for name in ("recall", "precision", "recall@20")]
        shown = "".join(f"{'' if each is None else f'{each:.3f}':>9}" for each in numbers)
        print(f"{row['name']:32}{cpu:8.1f}{count / max(cpu, 1e-9):9.0f}{row.get('peak_gb', 0):6.2f}{shown}", flush=True)


if __name__ == "__main__":
    main()
