"""Makes a corpus of millions of short documents from real text, with skew and planted near-duplicates.

    python benchmarks/curation_corpus.py CORPUS OUT DOCUMENTS [FILES [SHORTEST LONGEST]]

CORPUS: a folder of JSON lines with text, language and domain. A document is 300 to 600 characters (SHORTEST to
LONGEST): sentences drawn from one of a few thousand topics (1,000 neighbouring sentences of a file), whose sizes follow
a power law, so that the largest hold 1% of all documents each. Of the documents, 1% are exact copies of an earlier one
and 5% near-duplicates: an earlier document with one word in thirty replaced. Their ids name it: `7.123` is document 123
of file 7, and `7.123=2.45` and `7.123~2.45` are its copy and near-duplicate of document 45 of file 2.

A document is a function of its file and number alone, so files are written independently, and a corpus of 10 million
begins with the files of one of 1 million.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from eclectus.tasks.documents.readers import Position, read_records
from eclectus.tasks.documents.sources import find_sources

SENTENCES = 1000
COPIES, NEAR = 0.01, 0.05
REPLACED = 30
SKEW = 0.7


class Corpus:
    """The topics: language, domain and sentences of each, and their cumulated weights."""

    def __init__(self, folder: str, shortest: int = 300, longest: int = 600) -> None:
        self.shortest, self.longest = shortest, longest
        self.topics: list[tuple[str, str, list[str]]] = []
        for source in find_sources([folder], []).sources:
            sentences: dict[tuple[str, str], list[str]] = {}
            for _, record in read_records(source, "text", ["text", "language", "domain"], 10**9, Position()):
                label = record.get("language") or "en", record.get("domain") or source.domain or "prose"
                found = re.split(r"(?<=[.!?;。！？；])\s*|\n+", record["text"])
                sentences.setdefault(label, []).extend(each.strip() for each in found if 30 <= len(each) <= 250)
            for (language, domain), every in sentences.items():
                every = list(dict.fromkeys(every))
                for begin in range(0, max(1, len(every) - SENTENCES // 2), SENTENCES):
                    self.topics.append((language, domain, every[begin : begin + SENTENCES]))
        random.Random(0).shuffle(self.topics)
        weights = [1 / (5 + rank) ** SKEW for rank in range(len(self.topics))]
        self.weights = list(itertools.accumulate(weights))

    def original(self, file: int, number: int) -> dict[str, str]:
        draw = random.Random(f"{file}.{number}")
        topic = bisect.bisect(self.weights, draw.random() * self.weights[-1])
        language, domain, sentences = self.topics[min(topic, len(self.topics) - 1)]
        length, text = draw.randint(self.shortest, self.longest), ""
        while len(text) < length:
            text += draw.choice(sentences) + " "
        return {"id": f"{file}.{number}", "text": text[: self.longest].strip(), "language": language, "domain": domain}

    def document(self, file: int, number: int, per_file: int) -> dict[str, str]:
        draw = random.Random(f"kind {file}.{number}")
        kind, record = draw.random(), self.original(file, number)
        if kind >= COPIES + NEAR or (file == 0 and number == 0):
            return record
        other = draw.randrange(file * per_file + number) if file else draw.randrange(number)
        of_file, of_number = divmod(other, per_file)
        copied = self.original(of_file, of_number)
        if kind < COPIES:
            return copied | {"id": f"{record['id']}={copied['id']}"}
        words = copied["text"].split(" ")
        others = record["text"].split(" ")
        for _ in range(max(1, len(words) // REPLACED)):
            words[draw.randrange(len(words))] = draw.choice(others)
        return copied | {"id": f"{record['id']}~{copied['id']}", "text": " ".join(words)}


corpus_of = functools.cache(Corpus)
"""A process reads the corpus once."""


def write(folder: str, out: str, file: int, count: int, per_file: int, lengths: list[int]) -> None:
    corpus = corpus_of(folder, *lengths)
    with open(Path(out) / f"documents-{file:05d}.jsonl", "w") as handle:
        for number in range(count):
            handle.write(json.dumps(corpus.document(file, number, per_file), ensure_ascii=False) + "\n")


def main() -> None:
    folder, out, documents = sys.argv[1], sys.argv[2], int(sys.argv[3])
    files = int(sys.argv[4]) if len(sys.argv) > 4 else max(1, documents // 125_000)
    lengths = [int(each) for each in sys.argv[5:7]]
    Path(out).mkdir(parents=True, exist_ok=True)
    per_file = -(-documents // files)
    written = []
    with ProcessPoolExecutor() as pool:
        for file in range(files):
            count = min(per_file, documents - file * per_file)
            written.append(pool.submit(write, folder, out, file, count, per_file, lengths))
    for each in written:
        each.result()


if __name__ == "__main__":
    main()
