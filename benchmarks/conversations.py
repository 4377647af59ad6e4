"""Packs of conversations: similarity within a pack, fill and cuts, by kind of packing.

    pip install --no-deps --target chats chitchat-dataset==0.9.0
    python benchmarks/conversations.py chats/chitchat_dataset/dataset.json MODEL 2048 8192

7,168 conversations between two people (BYU, MIT): who speaks first is the user, the other the assistant. MODEL: folder
of a tokenizer with a chat template. All packings have the same conversations and tokens:

    similar          ours: along the chain, the first of the next `pack_fit` conversations that fits; 1: none waits
    random           the same packing in random order
    longest first    first fit by falling length, as NeMo packs and, by another search, LLaMA-Factory
    random, cut      laid end to end and cut at every length

Similarity is the mean cosine of neighbours in a pack, and of all pairs of a pack, by two measures: the embedding that
made the chain, and TF-IDF of the words (scikit-learn), which knows nothing of it. Conversations whose ends are in two
packs count as cut, and for similarity by their first piece.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from steps_alone import maker

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.disk_matrix import open_embeddings
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.grouping.embed import EmbedSettings, embed
from eclectus.tasks.grouping.group import GroupSettings, group
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
from eclectus.tasks.packing.conversation_tokens import STATES, Template, tokens_within
from eclectus.tasks.packing.tokenizer import load_tokenizer
from eclectus.tasks.packing.whole_documents import fit_whole


def messages_of(turns: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    senders: list[str] = []
    for said in (said for turn in turns for said in turn):
        if said["sender"] not in senders:
            senders.append(said["sender"])
        role = ("user", "assistant")[senders.index(said["sender"]) % 2]
        if found and found[-1]["role"] == role:
            found[-1]["content"] += "\n" + said["text"]
        else:
            found.append({"role": role, "content": said["text"]})
    return found


def whole(order: np.ndarray, sizes: np.ndarray, length: int, window: int) -> list[list[int]]:
    pieces = fit_whole(sizes[order].astype(np.uint32), length, window)
    packs: list[list[int]] = [[]]
    room = length
    for document, size in zip(pieces.document.tolist(), pieces.size.tolist(), strict=True):
        if document >= 0:
            packs[-1].append(int(order[document]))
        room -= size
        if not room:
            packs.append([])
            room = length
    return [pack for pack in packs if pack]


def longest_first(chain: np.ndarray, sizes: np.ndarray, length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms = np.empty(0, np.int64)
    for each in chain[np.argsort(-sizes[chain], kind="stable")].tolist():
        fits = np.flatnonzero(rooms >= sizes[each])
        if not len(fits):
            packs.append([])
            rooms = np.append(rooms, length)
            fits = np.array([len(packs) - 1])
        packs[fits[0]].append(each)
        rooms[fits[0]] -= sizes[each]
    return packs


def cut(order: np.ndarray, sizes: np.ndarray, length: int) -> tuple[list[list[int]], int]:
    ends = np.cumsum(sizes[order])
    first, last = (ends - sizes[order]) // length, (ends - 1) // length
    packs: list[list[int]] = [[] for _ in range(int(last[-1]) + 1)]
    for each, pack in zip(order.tolist(), first.tolist(), strict=True):
        packs[pack].append(each)
    return packs, int((first != last).sum())


def similarity(packs: list[list[int]], cosine: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """(of neighbours, of all pairs) within packs. cosine: of rows [n] with each other, [n, n]."""
    beside, pairs = [], []
    for pack in packs:
        if len(pack) > 1:
            values = cosine(np.array(pack))
            beside.append(np.diagonal(values, 1))
            pairs.append(values[np.triu_indices(len(pack), 1)])
    return float(np.concatenate(beside).mean()), float(np.concatenate(pairs).mean())


def main(file: str, model: str, *lengths: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make = maker(ArtifactStore(folder))
        source = Path(folder) / "chats.jsonl"
        rows = [
            {"id": name, "messages": messages_of(about["messages"])}
            for name, about in json.loads(Path(file).read_text()).items()
        ]
        source.write_text("\n".join(map(json.dumps, rows)))
        documents = make(ingest, settings=IngestSettings(sources=[str(source)], conversations=True))
        print("rejected:", documents.statistics["rejected_by_reason"], documents.statistics["duplicates"], "duplicates")
        documents = make(languages, documents=documents, settings=LanguageSettings(expanded_languages=[]))
        documents = make(split, documents=documents, settings=SplitSettings())
        trained = make(train_embedding, documents=documents, settings=StaticEmbeddingSettings())
        vectors = make(embed, documents=documents, model=trained, settings=EmbedSettings())
        nearest = make(neighbors, documents=documents, embeddings=vectors, settings=NeighborSettings())
        grouped = make(group, documents=documents, neighbors=nearest, embeddings=vectors, settings=GroupSettings())
        chain = pq.read_table(grouped.file("order.parquet"), columns=["row"])["row"].to_numpy()
        table = read_table(documents, ["text", "group", "split"]).to_pydict()
        wanted = zip(table["group"], table["split"], strict=True)
        chain = chain[np.array([pair == ("original", "train") for pair in wanted])[chain]]
        texts = table["text"]
        template = Template(load_tokenizer(model), model)
        sizes, states = np.zeros(len(texts), np.int64), Counter[str]()
        for row in chain.tolist():
            done = tokens_within(template, texts[row], 10**9, "leave_out")
            sizes[row] = len(done.ids)
            states[STATES[done.state]] += 1
        print(f"{len(rows):,} records, {len(chain):,} in the chain: {dict(states)}")
        embedded = np.asarray(open_embeddings(vectors)[np.arange(len(texts))], np.float32)
        for length in lengths:
            here = chain[(sizes[chain] > 0) & (sizes[chain] <= length)]
            report(here, sizes, length, embedded, texts)


def report(chain: np.ndarray, sizes: np.ndarray, length: int, vectors: np.ndarray, texts: list[str]) -> None:
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    words = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    random = np.random.default_rng(0).permutation(chain)
    cut_packs, cuts = cut(random, sizes, length)
    packings = {
        **{f"similar, pack_fit {fit}": (whole(chain, sizes, length, fit), 0) for fit in (1, 2, 4, 8, 16, 64)},
        "random, pack_fit 8": (whole(random, sizes, length, 8), 0),
        "longest first": (longest_first(chain, sizes, length), 0),
        "random, cut": (cut_packs, cuts),
    }
    total = int(sizes[chain].sum())
    print(f"{len(chain):,} conversations, {total:,} tokens, packs of {length}")
    for name, (packs, cuts) in packings.items():
        own = similarity(packs, lambda rows: vectors[rows] @ vectors[rows].T)
        other = similarity(packs, lambda rows: (words[rows] @ words[rows].T).toarray())
        fill = total / len(packs) / length
        print(
            f"{name:20} {len(packs):6} packs, fill {fill:.3f}, {cuts} cut; embedding {own[0]:.3f} neighbours "
            f"{own[1]:.3f} pairs; TF-IDF {other[0]:.4f} {other[1]:.4f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
