"""The plan of a packing: which documents, in which order, at which place in the stream, and what it comes to.

It is a folder of arrays over the M documents in their order, read by the parts of the instances (instance_part.py):

    rows.npy     int64 [M], in the documents artifact       starts.npy   int64 [M], in the token files end to end
    begins.npy   int64 [M + 1], in the stream, and its end  labels.npy   int32 [M, 3], codes of `names.json`
    source.npy   int64 [instances], which instance of the stream stands at each position of the shuffled one

With `pack_fit` they are over pieces of documents and the gaps between them (whole_documents.py): `starts` is -1 at a
gap, and `offsets.npy`, uint32, has the start of each piece in its document.
Price: a sort's worth of seconds per ten million documents, 50 bytes of memory per document while it is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_part
from eclectus.tasks.grouping.instance_layout import instance_count, shuffled
from eclectus.tasks.packing.document_tokens import belongs, coded
from eclectus.tasks.packing.whole_documents import Pieces, fit_whole

CODED = ("language", "domain", "source")
MOST_LABELS = 1000
PART_BYTES, PART_SPANS = 64 * 10**6, 2_000_000
"""What a part of the instances holds at most: bytes of tokens, and about how many spans."""


def plan_instances(
    out: Path,
    paths: list[Path],
    labels: list[Path | None],
    tokens: list[tuple[int, Path]],
    order: list[Path],
    group: str,
    length: int,
    token_bytes: int,
    keep_remainder: bool,
    fit: int,
    seed: int,
) -> dict[str, Any]:
    """Writes the plan. Raises EclectusError if the documents do not fill one instance.

    paths: the parts of documents; labels: theirs, which must be here. tokens: (number of the part, folder). order: the
    grouping's files; none for a random order. fit: setting `pack_fit`.
    """
    wanted_N, labels_M3, names = _wanted(paths, group)
    starts_M, sizes_M, control = _tokens(paths, tokens, wanted_N)
    order_M = _order(wanted_N, order, seed)
    rows, starts, sizes = np.flatnonzero(wanted_N)[order_M], starts_M[order_M], sizes_M[order_M]
    labels_M3, documents, total = labels_M3[order_M], len(order_M), int(sizes.sum(dtype=np.int64))
    del wanted_N, starts_M, sizes_M, order_M
    for column in range(len(CODED)):
        labels_M3[:, column], names[column] = _by_appearance(labels_M3[:, column], names[column])
    pieces = fit_whole(sizes, length, fit) if fit else None
    if pieces:
        np.save(out / "offsets.npy", pieces.offset)
        starts = np.where(pieces.document < 0, -1, starts[pieces.document] + pieces.offset)
        rows, labels_M3, sizes = rows[pieces.document], labels_M3[pieces.document], pieces.size
    begins = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=begins[1:])
    count = instance_count(int(begins[-1]), length, keep_remainder)
    if count == 0:
        raise EclectusError(
            f"{documents} documents of group '{group}' give {total} tokens, too few for one "
            f"instance of {length}; add text, lower instance_tokens, or set pack_remainder to pad"
        )
    arrays = {"rows": rows, "starts": starts, "begins": begins, "labels": labels_M3, "source": shuffled(count, seed)}
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    (out / "names.json").write_text(json.dumps(dict(zip(CODED, names, strict=True))))
    packed = np.diff(np.minimum(begins, count * length))
    packed[starts < 0] = 0
    tokens_packed = int(packed.sum())
    return {
        "instances": count,
        "instances_per_part": max(1, min(PART_BYTES // (length * token_bytes), PART_SPANS // (len(rows) // count + 1))),
        "languages": list(dict.fromkeys(name or "" for name in names[0])),
        "domains": list(dict.fromkeys(name or "" for name in names[1])),
        "statistics": {
            "instances": count,
            "tokens": count * length,
            **_documents(begins, packed, length, documents, pieces),
            "tokens_dropped": total - tokens_packed,
            "tokens_padded": count * length - tokens_packed,
            "tokens_by_language": _sums(names[0], labels_M3[:, 0], packed),
            "tokens_by_domain": _sums(names[1], labels_M3[:, 1], packed),
        },
        "control": control,
    }


def _documents(
    begins: np.ndarray, packed: np.ndarray, length: int, documents: int, pieces: Pieces | None
) -> dict[str, int]:
    """Documents that are packed, that are not, and that would fit in an instance and are cut.

    begins: of the documents, or of `pieces` of documents. packed: tokens of each that are packed.
    """
    there, cut = packed > 0, 0
    if pieces is None:
        fits = np.diff(begins) <= length
        cut = int(np.count_nonzero(there & fits & (begins[:-1] // length != (begins[1:] - 1) // length)))
        count = int(np.count_nonzero(there))
    else:
        count = int(np.count_nonzero(np.bincount(pieces.document[there])))
    return {"documents": count, "documents_dropped": documents - count, "documents_cut": cut}


def merged(names: list[str | None]) -> np.ndarray:
    """The code of each name where no label and an empty one are the same, int64 [len(names)]."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name or "", len(numbers)) for name in names], np.int64)


def _wanted(paths: list[Path], group: str) -> tuple[np.ndarray, np.ndarray, list[list[str | None]]]:
    """(which documents to pack, bool [N]; codes of their labels, int32 [M, 3]; the names of each)."""
    numbers: list[dict[str | None, int]] = [{} for _ in CODED]
    wanted, codes = [np.empty(0, bool)], [np.empty((0, len(CODED)), np.int32)]
    columns = ["group", "split", *CODED]
    for path in paths:
        for batch in read_part(path, columns, rows=2**20, dictionary=columns):
            groups, names = coded(batch["group"])
            splits, split_names = coded(batch["split"])
            here = np.array([belongs(name, group) for name in names])[groups]
            here &= np.array([name == "train" for name in split_names])[splits]
            wanted.append(here)
            each = np.empty((int(here.sum()), len(CODED)), np.int32)
            for column, name in enumerate(CODED):
                label, label_names = coded(batch[name])
                known = numbers[column]
                used = np.unique(label[here])
                table = np.zeros(len(label_names), np.int32)
                table[used] = [known.setdefault(label_names[code], len(known)) for code in used.tolist()]
                each[:, column] = table[label[here]]
            codes.append(each)
    return np.concatenate(wanted), np.concatenate(codes), [list(each) for each in numbers]


def _tokens(
    paths: list[Path], tokens: list[tuple[int, Path]], wanted_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(start of each wanted document in the token files, int64 [M]; its size, uint32 [M]; control tokens)."""
    first = np.concatenate([[0], np.cumsum([pq.read_metadata(path).num_rows for path in paths])])
    rank_N = np.cumsum(wanted_N, dtype=np.int64) - 1
    count = int(rank_N[-1]) + 1 if len(rank_N) else 0
    starts_M, sizes_M = np.zeros(count, np.int64), np.zeros(count, np.uint32)
    base, control = 0, np.zeros(2, np.int64)
    for number, folder in tokens:
        rows = np.load(folder / "rows.npy") + first[number]
        sizes = np.load(folder / "sizes.npy")
        ends = np.cumsum(sizes, dtype=np.int64)
        here = wanted_N[rows]
        rank = rank_N[rows[here]]
        starts_M[rank] = (base + ends - sizes)[here]
        sizes_M[rank] = sizes[here]
        base += int(ends[-1]) if len(ends) else 0
        spelled = np.load(folder / "control.npy")
        control += spelled[here[spelled[:, 0]], 1:].sum(axis=0)
    return starts_M, sizes_M, control.tolist()


def _order(wanted_N: np.ndarray, order: list[Path], seed: int) -> np.ndarray:
    """The order in which to concatenate, as positions among the wanted documents, int64."""
    if not order:
        return np.random.default_rng([seed, 1]).permutation(int(wanted_N.sum()))
    chained = [pq.read_table(path, columns=["row"])["row"].to_numpy() for path in order]
    chained = [each[wanted_N[each]] for each in chained]
    return (np.cumsum(wanted_N, dtype=np.int64) - 1)[np.concatenate(chained)]


def _by_appearance(codes: np.ndarray, names: list[str | None]) -> tuple[np.ndarray, list[str | None]]:
    """The same labels with codes in the order in which they appear; names that do not appear are left out."""
    first = np.full(len(names), len(codes), np.int64)
    # The last value that is assigned stays: the first appearance.
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    order = np.argsort(first, kind="stable")[: int((first < len(codes)).sum())]
    number = np.zeros(len(names), np.int32)
    number[order] = np.arange(len(order))
    return number[codes], [names[code] for code in order.tolist()]


def _sums(names: list[str | None], codes: np.ndarray, sizes: np.ndarray) -> dict[str, int]:
    """Tokens by label; of very many labels the largest, and the others together."""
    number = merged(names)
    shown_names = list(dict.fromkeys(name or "" for name in names))
    tokens = np.bincount(number[codes], sizes, len(shown_names)).astype(np.int64)
    shown = np.sort(np.argsort(-tokens, kind="stable")[:MOST_LABELS])
    sums = {shown_names[code]: int(tokens[code]) for code in shown.tolist()}
    rest = int(tokens.sum() - tokens[shown].sum())
    return sums | {"(others)": rest} if rest else sums
