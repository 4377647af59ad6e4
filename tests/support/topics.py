"""Documents about a few topics or of a few groups, and embeddings with known neighbours, for tests."""

import hashlib
import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.tasks.documents.table import DocumentsWriter, read_table

TOPICS = {
    "en/sea": "harbour sail tide anchor vessel captain reef storm gull rope mast island shore wave compass crew",
    "en/law": "court clause appeal verdict statute judge witness "
    "contract penalty hearing counsel evidence tribunal oath",
    "en/code": "function variable compile branch pointer thread module loop array buffer socket kernel stack cache",
    "el/sea": "λιμάνι πανί παλίρροια άγκυρα σκάφος καπετάνιος ύφαλος θύελλα γλάρος σχοινί κατάρτι νησί ακτή κύμα",
    "zh/law": "法院 条款 上诉 判决 法规 法官 证人 合同 处罚 听证 律师 证据 法庭 誓言 原告 被告",
}


GROUPS = {"en": "original", "es": "original", "el": "expanded", "tr": "expanded", "fr": "other"}
WORDS = {"en": "river town ", "es": "ciudad río ", "el": "ποτάμι πόλη ", "tr": "nehir şehir ", "fr": "fleuve ville "}


def topical(counts, seed=0, words=60):
    """Rows (text, language, domain), interleaved; counts: key of TOPICS -> number of documents."""
    random = np.random.default_rng(seed)
    rows = []
    for key, count in counts.items():
        vocabulary = TOPICS[key].split()
        language, domain = key.split("/")
        for i in range(count):
            text = " ".join(random.choice(vocabulary, words)) + f" {key} {i} {random.integers(10**6)}"
            rows.append({"text": text, "language": language, "domain": domain})
    return [rows[i] for i in random.permutation(len(rows))]


def numbered(store, counts):
    """A documents artifact with groups; counts: (language, domain) -> number of documents."""
    return write_documents(
        store,
        [
            {
                "text": f"{WORDS[language] * (1 + i % 7)}{domain} {i}",
                "language": language,
                "domain": domain,
                "group": GROUPS[language],
            }
            for (language, domain), count in counts.items()
            for i in range(count)
        ],
    )


def tally(documents, *names):
    """How many documents have each combination of values of these columns."""
    return Counter(tuple(row[name] for name in names) for row in read_table(documents).to_pylist())


def splits(documents):
    """Id -> split."""
    return {row["document"]: row["split"] for row in read_table(documents).to_pylist()}


def write_documents(store, rows, parts=1):
    """A documents artifact of these rows; missing columns are filled in. parts: into how many they are cut at least."""
    if parts > 1:
        with store.draft("documents") as out:
            for number in range(parts):
                begin, end = (len(rows) * each // parts for each in (number, number + 1))
                one = write_documents(store, rows[begin:end])
                shutil.copyfile(
                    one.file("documents/part-00000.parquet"), out.file(f"documents/part-{number:05d}.parquet")
                )
            out.rows = len(rows)
            return store.commit(out)
    with store.draft("documents") as out:
        with DocumentsWriter(out) as writer:
            for start in range(0, len(rows), 64):
                part = [{"split": "train", **row} for row in rows[start : start + 64]]
                columns = {}
                for name in ("text", "language", "domain", "split", "group"):
                    columns[name] = [row.get(name) for row in part]
                for name in ("name", "source", "work"):
                    columns[name] = pa.array([row.get(name) for row in part], pa.string())
                columns["document"] = [hashlib.sha256(row["text"].encode()).hexdigest()[:32] for row in part]
                columns["bytes"] = [len(row["text"].encode()) for row in part]
                writer.write(pa.table(columns))
        return store.commit(out)


def write_embeddings(store, vectors, ids=None, key=None, ends=None):
    """An embeddings artifact of these vectors [N, D], optionally with the documents' ids and the model's key, and in
    parts that end at these rows."""
    with store.draft("embeddings") as out:
        matrices = {"embeddings": np.asarray(vectors, np.float32)}
        if ids is not None:
            matrices["ids"] = np.array(ids, "S32")
            out.statistics = {"embedding_key": key}
        for name, matrix in matrices.items():
            if ends is None:
                np.save(out.file(f"{name}.npy"), matrix)
            for number, (begin, end) in enumerate(pairwise([0, *ends]) if ends else ()):
                np.save(out.file(f"{name}/part-{number:05d}.npy"), matrix[begin:end])
        out.rows = len(vectors)
        return store.commit(out)


def make(store, step, **arguments):
    """The artifact that a step makes of these arguments, outside a run."""
    with store.draft(step.makes) as out:
        step.function(**arguments, out=out)
        return store.commit(out)


def unit_vectors(count, dimension, seed=0, clusters=8):
    """Unit vectors float32 [count, dimension] around some centres."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, dimension))
    vectors = centres[random.integers(0, clusters, count)] + 0.5 * random.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def read_json(path):
    return json.loads(path.read_text())


def in_parts(store, documents, *ends):
    """The same documents, in parts that end at these rows, with what else the artifact holds."""
    with store.draft("documents") as out:
        for kind in ("documents", "labels"):
            paths = sorted(Path(documents.path).glob(f"{kind}/part-*.parquet"))
            table = pa.concat_tables([pq.read_table(path) for path in paths]) if paths else None
            for number, (begin, end) in enumerate(pairwise([0, *ends, len(table)]) if table else ()):
                part = out.file(f"{kind}/part-{number:05d}.parquet")
                pq.write_table(table.slice(begin, end - begin), part, row_group_size=64)
        for path in Path(documents.path).glob("*.parquet"):
            shutil.copy(path, out.file(path.name))
        return store.commit(out)
