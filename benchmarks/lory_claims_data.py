"""Texts for `lory_claims.py`: made by the production steps, packed to be small, unpacked where training runs.

A file `v{vocabulary}.npz` holds every training document's tokens once and, for each grouping, the spans of its
instances, so that three orders of the same documents cost little more than one; and held-out documents as evaluation
reads them. Unpacking needs NumPy alone: `unpack` gives a directory that `eclectus.models.training.instances.Instances`
opens.

Works are held out whole. Every second held-out work of a domain is for choosing settings (`validation`), the others are
what is reported (`test`). How much of each held-out document stands in the training text, by passages of 50 bytes, is
kept with it (`held_seen`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GROUPINGS = ("similarity", "random", "domain")
PARTS = ("test", "validation")
HELD_OUT_TOKENS = 40_000
HELD_OUT_TOKENS_A_DOCUMENT = 4_000
HELD_OUT_PIECES = 2
HELD_OUT_SHARE = 0.1


def passages(documents: Any, place: Path, characters: int) -> str:
    """A file of the training documents of `documents`, each cut into passages of at most `characters`, a document each.

    Where documents are longer than instances, a segment's predecessor is of the same document however they are grouped;
    passages put several into an instance, as web pages do at the paper's length.
    """

    from eclectus.tasks.documents.table import read_batches

    path, names = place / "passages.jsonl", ["document", "language", "domain", "text"]
    with open(path, "w") as out:
        for batch in read_batches(documents, names, [("split", "==", "train")], 512):
            for document, language, domain, text in zip(*(batch[name].to_pylist() for name in names), strict=True):
                for i, passage in enumerate(_cut(text, characters)):
                    row = {"id": f"{document}:{i}", "language": language, "domain": domain, "text": passage}
                    out.write(json.dumps(row) + "\n")
    return str(path)


def _cut(text: str, characters: int) -> Iterator[str]:
    """Parts of at most `characters` that end at a line's end, or else a space, in their second half if there is one."""
    begin = 0
    while begin < len(text):
        end = begin + characters
        if end < len(text):
            stretch = (begin + characters // 2, end)
            last = text.rfind("\n", *stretch)
            last = last if last >= 0 else text.rfind(" ", *stretch)
            end = last + 1 if last >= 0 else end
        if passage := text[begin:end].strip():
            yield passage
        begin = end


def prepare(
    sources: list[str], place: Path, forms: set[tuple[int, int]], limit: int = 0, cut: int = 0, seed: int = 0
) -> None:
    """Curates `sources` (English, with domains) by the production steps and writes one file for each of `forms`.

    forms: vocabulary and instance length. limit: at most that many documents of each source, 0 for all. cut: train on
    passages of at most so many characters, 0 for whole documents; held-out documents stay whole. seed: of what is held
    out and of the orders.
    """
    from eclectus.storage.artifact import ArtifactStore
    from eclectus.tasks.documents.ingest import IngestSettings, ingest
    from eclectus.tasks.documents.languages import LanguageSettings, languages
    from eclectus.tasks.grouping.embed import EmbedSettings, embed
    from eclectus.tasks.grouping.group import GroupSettings, group
    from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
    from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
    from eclectus.tasks.packing.pack import PackSettings, pack
    from eclectus.tasks.packing.tokenizer import TokenizerSettings, tokenizer

    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        store = ArtifactStore(scratch)

        def made(step: Any, settings: Any, **inputs: Any) -> Any:
            with store.draft(step.makes) as draft:
                step.function(**inputs, settings=settings, out=draft)
                artifact = store.commit(draft)
            print(f"{step.name}: {json.dumps(artifact.statistics)[:300]}", flush=True)
            return artifact

        def curated(sources: list[str], limit: int, held: float) -> Any:
            documents = made(ingest, IngestSettings(sources=sources, documents_limit=limit))
            settings = LanguageSettings(original_languages=["en"], expanded_languages=[], language_detector="field")
            documents = made(languages, settings, documents=documents)
            with store.draft("documents") as draft:
                hold_out_works(documents, held, seed, draft)
                return store.commit(draft)

        documents = whole = curated(sources, limit, HELD_OUT_SHARE)
        if cut:
            documents = curated([passages(whole, Path(scratch), cut)], 0, 0.0)
        model = made(train_embedding, StaticEmbeddingSettings(), documents=documents)
        vectors = made(embed, EmbedSettings(), documents=documents, model=model)
        nearest = made(neighbors, NeighborSettings(), documents=documents, embeddings=vectors)
        inputs = {"documents": documents, "embeddings": vectors, "neighbors": nearest}
        groupings = {name: made(group, GroupSettings(grouping=name, seed=seed), **inputs) for name in GROUPINGS}
        for vocabulary, length in sorted(forms):
            words = made(tokenizer, TokenizerSettings(tokenizer_vocabulary=vocabulary), documents=documents)
            settings = PackSettings(instance_tokens=length, pack_group="original", pack_remainder="pad", seed=seed)
            packed = {
                name: made(pack, settings, documents=documents, tokenizer=words, grouping=each)
                for name, each in groupings.items()
            }
            arrays = _training_arrays(packed) | _held_out_arrays(whole, words)
            path = place / f"v{vocabulary}.npz"
            np.savez_compressed(path, **arrays)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(arrays['flat']) / 1e6:.2f}M tokens", flush=True)


def hold_out_works(documents: Any, share: float, seed: int, out: Any) -> None:
    """Holds out a share of the works of each domain, at least one where there are two, with all their pieces."""
    import pyarrow as pa

    from eclectus.tasks.documents.table import read_batches, relabel

    works, domains = [], []
    for batch in read_batches(documents, ["work", "domain"]):
        works += batch["work"].to_pylist()
        domains += batch["domain"].to_pylist()
    of_domain: dict[str, set[str]] = {}
    for work, domain in zip(works, domains, strict=True):
        of_domain.setdefault(domain, set()).add(work)
    held: set[str] = set()
    for own in of_domain.values():
        ordered = sorted(own, key=lambda work: _mixed(f"{seed} {work}"))
        held.update(ordered[: max(1, round(share * len(own))) if share and len(own) > 1 else 0])
    relabel(documents, {"split": pa.array(["heldout" if work in held else "train" for work in works])}, out)


def _training_arrays(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    """flat: tokens of all documents; starts: where each begins; spans_{grouping} [S, 6] int32; about: names (JSON)."""
    import pyarrow.parquet as pq

    from eclectus.models.training.instances import Instances

    opened = {name: Instances(artifact.path) for name, artifact in packed.items()}
    spans = {}
    for name, artifact in packed.items():
        offsets = pq.read_table(artifact.file("documents.parquet"), columns=["document_offset"])["document_offset"]
        spans[name] = np.concatenate([np.asarray(opened[name].spans), offsets.to_numpy()[:, None]], axis=1)
    rows = np.unique(np.concatenate([each[:, 2] for each in spans.values()]))
    sizes = np.zeros(len(rows), np.int64)
    for each in spans.values():
        each[:, 2] = np.searchsorted(rows, each[:, 2])
        np.maximum.at(sizes, each[:, 2], each[:, 5] + each[:, 1])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    first = opened[GROUPINGS[0]]
    flat = np.zeros(starts[-1], first.tokens.dtype)
    for name, each in spans.items():
        theirs = np.asarray(opened[name].tokens).reshape(-1)[_places(each[:, 0], each[:, 1])]
        here = _places(starts[each[:, 2]] + each[:, 5], each[:, 1])
        if name != GROUPINGS[0] and not np.array_equal(flat[here], theirs):
            raise SystemExit(
                f"grouping {name} packs other tokens than {GROUPINGS[0]}; they must hold the same documents"
            )
        flat[here] = theirs
    about = {
        "length": first.length,
        "vocabulary": first.vocabulary,
        "end_of_document": first.end_of_document,
        "languages": first.languages,
        "domains": {name: each.domains for name, each in opened.items()},
    }
    return {
        "flat": flat,
        "starts": starts,
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        **{f"spans_{name}": each.astype(np.int32) for name, each in spans.items()},
    }


def _places(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """All positions of the ranges with these starts and sizes."""
    ends = np.cumsum(sizes)
    return np.repeat(begins - ends + sizes, sizes) + np.arange(ends[-1])


def _held_out_arrays(documents: Any, tokenizer: Any) -> dict[str, np.ndarray]:
    """Held-out streams by domain, for `eclectus.models.evaluation.scoring.Windows`; long documents and works are cut.

    held_work: each document's work, numbered as they come. held_seen: share of its passages in the training text.
    """
    from eclectus.models.evaluation.scoring import NO_DOCUMENT
    from eclectus.tasks.documents.table import read_batches
    from eclectus.tasks.evaluation.held_out import read_held_out
    from eclectus.tasks.evaluation.passages import seen_share
    from eclectus.tasks.packing.tokenizer import load_tokenizer

    words = load_tokenizer(tokenizer.path)
    held = read_held_out(documents, words, 10_000)
    work_of, text_of = {}, {}
    for batch in read_batches(documents, ["document", "work", "text"], [("split", "==", "heldout")], 512):
        for document, work, text in zip(*(batch[name].to_pylist() for name in batch.schema.names), strict=True):
            work_of[document], text_of[document] = work, text
    tokens, owners, ratio, domain_of, lengths, pieces, scored = [], [], [], [], {}, Counter(), []
    numbers: dict[str, int] = {}
    # Pieces of a work stand together, so that the limits cut few works.
    order = sorted(range(len(held.documents)), key=lambda i: (held.domains[i], _mixed(work_of[held.documents[i]])))
    for i in order:
        document, domain, ids = held.documents[i], held.domains[i], held.tokens[i]
        work = work_of[document]
        if lengths.get(domain, 0) >= HELD_OUT_TOKENS or pieces[work] == HELD_OUT_PIECES:
            continue
        pieces[work] += 1
        numbers.setdefault(work, len(numbers))
        scored.append(document)
        kept = ids[:HELD_OUT_TOKENS_A_DOCUMENT]
        tokens += [*kept, words.eos_token_id]
        owners += [len(ratio)] * len(kept) + [NO_DOCUMENT]
        lengths[domain] = lengths.get(domain, 0) + len(kept) + 1
        ratio.append(held.bytes[i] / len(ids))
        domain_of.append(list(lengths).index(domain))
    whole = (
        text
        for batch in read_batches(documents, ["text"], [("split", "==", "train")], 512)
        for text in batch["text"].to_pylist()
    )
    seen = seen_share([text_of[document] for document in scored], whole)
    print(f"held out: {len(scored)} documents of {len(numbers)} works, {seen.mean():.3f} of their passages seen")
    return {
        "held_work": np.array([numbers[work_of[document]] for document in scored], np.int32),
        "held_seen": seen,
        "held_tokens": np.array(tokens, np.uint16),
        "held_owners": np.array(owners, np.int32),
        "held_lengths": np.array(list(lengths.values())),
        "held_ratio": np.array(ratio),
        "held_domain": np.array(domain_of, np.int16),
        "held_domains": np.array(list(lengths)),
    }


def _mixed(work: str) -> bytes:
    """A number for each work in an order that has nothing to do with its name."""
    return hashlib.sha256(work.encode()).digest()


def unpack(place: Path, vocabulary: int, grouping: str, out: Path, length: int) -> None:
    """Writes the instances of one grouping, `length` tokens each, to `out`, for models.training.instances.Instances."""
    if (out / "instances.json").is_file():
        return
    path = place / f"v{vocabulary}.npz"
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
        flat, starts, spans = file["flat"], file["starts"], file[f"spans_{grouping}"].astype(np.int64)
    if length != about["length"]:
        spans, about["length"] = _cut_again(spans, about["length"], length), length
    count = -(-int(spans[:, :2].sum(1).max()) // length)
    tokens = np.full(count * length, about["end_of_document"], flat.dtype)
    tokens[_places(spans[:, 0], spans[:, 1])] = flat[_places(starts[spans[:, 2]] + spans[:, 5], spans[:, 1])]
    out.mkdir(parents=True, exist_ok=True)
    tokens.tofile(out / "tokens.bin")
    np.save(out / "spans.npy", spans[:, :5])
    matrix = {
        "file": "tokens.bin",
        "dtype": str(tokens.dtype),
        "offset": 0,
        "rows": count,
        "columns": about["length"],
    }
    about |= {"domains": about["domains"][grouping], "matrices": {"input_ids": matrix}}
    (out / "instances.json").write_text(json.dumps(about))


def _cut_again(spans: np.ndarray, before: int, length: int) -> np.ndarray:
    """Spans for another instance length: instances that share a document are joined, cut again and shuffled."""
    firsts = np.flatnonzero(spans[:, 0] % before == 0)
    ends = np.append(firsts[1:], len(spans))
    begin_of = {(row[2], row[5]): i for i, row in enumerate(spans[firsts])}
    follower = [begin_of.get((row[2], row[5] + row[1])) for row in spans[ends - 1]]
    followed = set(follower) - {None}
    order = []
    for at in (i for i in range(len(firsts)) if i not in followed):
        while at is not None:
            order.append(at)
            at = follower[at]
    joined = np.concatenate([spans[firsts[i] : ends[i]] for i in order])
    begins = np.concatenate([[0], np.cumsum(joined[:, 1])])
    count = int(begins[-1]) // length
    cuts = np.unique(np.concatenate([begins[begins < count * length], np.arange(0, count * length, length)]))
    position = np.searchsorted(begins, cuts, side="right") - 1
    place = np.random.default_rng(0).permutation(count)
    again = joined[position]
    again[:, 0] = place[cuts // length] * length + cuts % length
    again[:, 1] = np.diff(np.append(cuts, count * length))
    again[:, 5] += cuts - begins[position]
    return again[np.argsort(again[:, 0])]


def held_out(place: Path, vocabulary: int, length: int, context: int) -> tuple[Any, list[str], np.ndarray, np.ndarray]:
    """(windows in random order, domain names by stream, each document's stream and its part) of the held-out text.

    The part is an index into PARTS; works of a stream belong to the parts in turn.
    """
    from eclectus.models.evaluation.scoring import Windows, plan_windows

    with np.load(place / f"v{vocabulary}.npz") as file:
        held = {name: file[name] for name in file.files if name.startswith("held_")}
    table = plan_windows(held["held_lengths"].tolist(), length, context)
    # Mixed, because Expert Choice compares the tokens of a batch and was trained on mixed ones.
    table = table[np.random.default_rng(0).permutation(len(table))]
    windows = Windows(held["held_tokens"], held["held_owners"], table, context, length, held["held_ratio"])
    domain_of = held["held_domain"].astype(np.int64)
    work = held["held_work"].astype(np.int64)
    places = work - work[np.searchsorted(domain_of, domain_of)]
    return windows, held["held_domains"].tolist(), domain_of, places % len(PARTS)
