"""The text of `lpr_claims.py`: from a folder of documents to instances and held-out streams, the same for every method.

    base        original languages with a small share of the expanded ones, as web text has
    expanded    the new languages, equal tokens of each as far as possible: stage 1 and every baseline train on them
    review      documents cut to half an instance: originals below 1% of stage 1's tokens, expanded ones twice that
    valid       held out: learning rates and weights of losses are chosen on it
    held        held out: reported, and never looked at before

Works are split, by the hash of their name: pieces of one work (the field `work`, else the `id` without its `#3`) are
all held out or all trained on. At most PIECES of a work are scored; the rest of a held-out work is not used.
Documents that begin alike count as copies and are dropped; what else of a held-out document stands in the training
text is measured by passages (lpr_passages.py). Nothing of tasks/, no pyarrow, no pydantic, so that this runs with only
PyTorch and transformers. Cost: tokenising, about 1 MB/s.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

END = "<|endoftext|>"
HELD_DOCUMENT = 8_000
PIECES = 2
# Of a domain's works, at most this share goes to `held`, and to `valid`.
HELD_WORKS = 0.2
SAME_BEGINNING = 200
TOKENIZER_BYTES = 6_000_000


@dataclass(frozen=True)
class Mixture:
    """What is read, and how much of it; tokens are counts of training tokens."""

    corpus: str
    original: tuple[str, ...]
    expanded: tuple[str, ...]
    length: int
    held_bytes: int
    """Of each language, in `valid` and in `held` each."""
    base_tokens: int
    foreign_share: float
    """Of the base's text, all expanded languages together."""
    expanded_tokens: int
    review_original_share: float
    """Original-language tokens of the review over the tokens of stage 1."""
    review_ratio: float
    """Tokens of each expanded language in the review over those of each original one."""
    vocabulary: int
    """Of the tokenizer that is trained here; 0 where the base model brings its own."""


def pack(mixture: Mixture, out: Path, base_tokenizer: Any = None) -> dict[str, Any]:
    """Writes instances and held-out streams under `out` once; returns counts of tokens by part and language.

    base_tokenizer: the base model's, a `tokenizers.Tokenizer`, or None to train one.
    """
    done = out / "packed.json"
    if done.exists():
        return json.loads(done.read_text())
    documents = list(read_documents(mixture))
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "held": []}
    for each in documents:
        parts[each["split"]].append(each)
    tokenizer = base_tokenizer or train_tokenizer(parts["train"], mixture)
    # A text that spells a special token is text.
    tokenizer.encode_special_tokens = True
    tokenizer.save(str(out / "tokenizer.json"))
    draw = _Draw(parts["train"], tokenizer, mixture)
    end = tokenizer.token_to_id(END)
    about: dict[str, Any] = {
        "vocabulary": tokenizer.get_vocab_size(),
        "end": end,
        "languages": [*mixture.original, *mixture.expanded],
        "mixture": asdict(mixture),
    }
    for name in ("base", "expanded", "review"):
        chosen = getattr(draw, name)()
        if chosen:
            about[name] = _write_instances(out / name, chosen, mixture.length, end, about)
    for name in ("valid", "held"):
        for each in parts[name]:
            each["ids"] = tokenizer.encode(each["text"], add_special_tokens=False).ids
        _write_held(parts[name], end, about["languages"], out / f"{name}.npz")
    done.write_text(json.dumps(about, indent=1))
    return about


def read_documents(mixture: Mixture) -> Iterator[dict[str, Any]]:
    """Documents of the mixture's languages with language, domain and split, in an order that their text decides.

    Files are JSON lines, .gz or not, with fields text, language and, where there is one, domain. Raises SystemExit
    naming a language that the folder does not hold enough of.
    """
    groups: dict[str, dict[str, list[tuple[bytes, bytes, str, str]]]] = {
        language: {} for language in (*mixture.original, *mixture.expanded)
    }
    paths = sorted(path for path in Path(mixture.corpus).glob("*.jsonl*") if path.suffix in (".jsonl", ".gz"))
    for path in paths:
        # A file named en.legal.jsonl.gz holds English; another name says nothing, and the field decides.
        named = path.name.split(".")[0]
        if len(named) == 2 and named not in groups:
            continue
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                domains = groups.get(row.get("language") or named)
                if domains is not None:
                    key = hashlib.sha256(row["text"].encode()).digest()
                    work = row.get("work") or re.sub(r"#\d+$", "", str(row.get("id") or key.hex()))
                    rows = domains.setdefault(row.get("domain") or "all", [])
                    rows.append((hashlib.sha256(work.encode()).digest(), key, work, row["text"]))
    if not paths:
        raise SystemExit(
            f"{mixture.corpus} holds no .jsonl or .jsonl.gz file: name a folder of documents with --corpus"
        )
    for language, domains in groups.items():
        train = 0
        for domain, rows in sorted(domains.items()):
            for row in _split(sorted(rows), mixture.held_bytes / len(domains)):
                train += row["split"] == "train"
                yield {"language": language, "domain": domain, **row}
        if train < 10:
            raise SystemExit(
                f"{mixture.corpus} has {train} training documents of language {language!r}: give more of it"
            )


def _split(rows: list[tuple[bytes, bytes, str, str]], held_bytes: float) -> Iterator[dict[str, Any]]:
    """Split, work and text of one domain, work by work: the first works go to `held`, the next to `valid`.

    rows: (hash of the work, hash of the text, work, text), sorted. Texts are cut so that no document fills a part.
    """
    most = max(1, int(HELD_WORKS * len({row[2] for row in rows})))
    sizes, works, seen = {"held": 0.0, "valid": 0.0}, {"held": 0, "valid": 0}, set()
    for work, pieces in itertools.groupby(rows, key=lambda row: row[2]):
        split = next((name for name in sizes if sizes[name] < held_bytes and works[name] < most), "train")
        if split != "train":
            works[split] += 1
        taken = 0
        for *_, text in pieces:
            if text[:SAME_BEGINNING] in seen or (split != "train" and taken == PIECES):
                continue
            seen.add(text[:SAME_BEGINNING])
            taken += 1
            if split != "train":
                text = text[: min(HELD_DOCUMENT, int(4 * held_bytes) + 1)]
                sizes[split] += len(text.encode())
            yield {"split": split, "work": work, "text": text}


def train_tokenizer(documents: list[dict[str, Any]], mixture: Mixture) -> Any:
    """A byte-level BPE of equal bytes of every language; the paper's bases have multilingual tokenizers too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    languages = (*mixture.original, *mixture.expanded)
    left = dict.fromkeys(languages, TOKENIZER_BYTES / len(languages))
    sample = []
    for document in random.Random(0).sample(documents, len(documents)):
        if left[document["language"]] > 0:
            left[document["language"]] -= len(document["text"].encode())
            sample.append(document["text"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=mixture.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample, trainer)
    return bpe


def _shares(total: float, mixture: Mixture) -> dict[str, float]:
    """Share of each language in the base's text."""
    foreign = total * mixture.foreign_share / len(mixture.expanded)
    original = total * (1 - mixture.foreign_share) / len(mixture.original)
    return {**dict.fromkeys(mixture.expanded, foreign), **dict.fromkeys(mixture.original, original)}


class _Draw:
    """Documents for each part, tokenised when first drawn, in one shuffled order per language."""

    def __init__(self, documents: list[dict[str, Any]], tokenizer: Any, mixture: Mixture) -> None:
        self._mixture, self._tokenizer, self._shuffle = mixture, tokenizer, random.Random(1)
        self._shuffle.shuffle(documents)
        self._of: dict[str, list[dict[str, Any]]] = {name: [] for name in (*mixture.original, *mixture.expanded)}
        for each in documents:
            self._of[each["language"]].append(each)

    def _take(
        self, language: str, tokens: float, longest: int | None = None, last: bool = False
    ) -> list[dict[str, Any]]:
        """Documents of a language up to that many tokens, or all; longest: where to cut each; last: from the end on."""
        chosen = []
        for each in reversed(self._of[language]) if last else self._of[language]:
            if tokens <= 0:
                break
            if "ids" not in each:
                each["ids"] = self._tokenizer.encode(each["text"], add_special_tokens=False).ids
            ids = each["ids"][: min(longest or len(each["ids"]), int(tokens) + 1)]
            tokens -= len(ids) + 1
            chosen.append({**each, "ids": ids})
        return chosen

    def base(self) -> list[dict[str, Any]]:
        """Expanded languages from the end of their order: stage 1 reads from the start, so its text is new."""
        shares, added = _shares(self._mixture.base_tokens, self._mixture), self._mixture.expanded
        return self._mixed([self._take(name, tokens, last=name in added) for name, tokens in shares.items()])

    def expanded(self) -> list[dict[str, Any]]:
        """Equal tokens of each; what a small language lacks, the larger ones give."""
        left, chosen = float(self._mixture.expanded_tokens), []
        sizes = {language: sum(len(each["text"]) for each in self._of[language]) for language in self._mixture.expanded}
        for number, language in enumerate(sorted(sizes, key=lambda name: sizes[name])):
            taken = self._take(language, left / (len(sizes) - number))
            left -= sum(len(each["ids"]) + 1 for each in taken)
            chosen.append(taken)
        return self._mixed(chosen)

    def review(self) -> list[dict[str, Any]]:
        """Twice as much of each expanded language (docs/methods.md 2.4), by tokens; documents are cut short."""
        mixture, longest = self._mixture, self._mixture.length // 2
        each = mixture.expanded_tokens * mixture.review_original_share / len(mixture.original)
        parts = [self._take(name, each, longest) for name in mixture.original]
        parts += [self._take(name, mixture.review_ratio * each, longest) for name in mixture.expanded]
        return self._mixed(parts)

    def _mixed(self, parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        chosen = [each for part in parts for each in part]
        self._shuffle.shuffle(chosen)
        return chosen


def _write_instances(
    out: Path, documents: list[dict[str, Any]], length: int, end: int, about: dict[str, Any]
) -> dict[str, int]:
    """One set of instances; returns how many there are, and tokens by language."""
    out.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if about["vocabulary"] <= 2**16 else np.uint32
    domains = sorted({each["domain"] for each in documents})
    flat = np.concatenate([np.array([*each["ids"], end], kind) for each in documents])
    count = len(flat) // length
    # Instances are shuffled: a long document would fill whole batches otherwise.
    places = np.random.default_rng(2).permutation(count)
    rows = np.empty((count, length), kind)
    rows[places] = flat[: count * length].reshape(count, length)
    rows.tofile(out / "tokens.bin")
    spans, start = [], 0
    tokens = dict.fromkeys(about["languages"], 0)
    for number, each in enumerate(documents):
        stop = start + len(each["ids"]) + 1
        tokens[each["language"]] += stop - start
        labels = (number, about["languages"].index(each["language"]), domains.index(each["domain"]))
        while start < min(stop, count * length):
            border = min(stop, (start // length + 1) * length)
            moved = int(places[start // length]) * length + start % length
            spans.append((moved, border - start, *labels))
            start = border
        start = stop
    np.save(out / "spans.npy", np.array(sorted(spans), np.int64))
    stored = {"file": "tokens.bin", "dtype": np.dtype(kind).name, "offset": 0, "rows": count, "columns": length}
    meta = {"length": length, "vocabulary": about["vocabulary"], "end_of_document": end, "domains": domains}
    meta |= {"languages": about["languages"], "matrices": {"input_ids": stored}}
    (out / "instances.json").write_text(json.dumps(meta))
    return {"instances": count, **tokens}


def _write_held(documents: list[dict[str, Any]], end: int, streams: Sequence[str], path: Path) -> None:
    """Streams by language: tokens, the document of each token (-1 at its end), bytes per token, work and text of each
    document."""
    documents.sort(key=lambda each: streams.index(each["language"]))
    tokens, owners, lengths = [], [], dict.fromkeys(streams, 0)
    for number, each in enumerate(documents):
        tokens += [*each["ids"], end]
        owners += [number] * len(each["ids"]) + [-1]
        lengths[each["language"]] += len(each["ids"]) + 1
    sizes = [len(each["text"].encode()) / max(1, len(each["ids"])) for each in documents]
    np.savez(
        path,
        tokens=np.array(tokens, np.int64),
        owners=np.array(owners, np.int64),
        lengths=np.array(list(lengths.values()), np.int64),
        bytes_a_token=np.array(sizes),
        streams=np.array(streams),
        language=np.array([streams.index(each["language"]) for each in documents]),
        work=np.array([each["work"] for each in documents]),
        text=np.array([each["text"] for each in documents]),
    )
