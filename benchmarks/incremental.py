"""Cost of 1% new documents, by step up to grouping, compared with curating the whole corpus from scratch.

    python benchmarks/incremental.py CORPUS [CHARACTERS]

CORPUS: a folder of JSON lines with text and language. Documents are cut into pieces of CHARACTERS (default 1500), so
that there are many; 99% of the pieces are curated in a new home, then all of them in the same home. Prints CPU seconds
of this process and its children, which do not depend on what else the machine does, and their ratio.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eclectus.storage.artifact import Artifact
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.readers import Position, Record, read_records
from eclectus.tasks.documents.sources import find_sources
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.grouping.embed import EmbedSettings, embed
from eclectus.tasks.grouping.group import GroupSettings, group
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
from eclectus.tasks.run import Run, activate

FILES = 20
STEPS = ("ingest", "languages", "split", "train_embedding", "embed", "neighbors", "group")


class Clock:
    """A display that records the CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = 0.0

    def step_began(self, label: str) -> None:
        self._began = sum(os.times()[:4])

    def step_progressed(self, *_: object) -> None:
        pass

    def notified(self, *_: object) -> None:
        pass

    def step_ended(self, label: str, *_: object) -> None:
        self.seconds[label] = sum(os.times()[:4]) - self._began


def pieces(corpus: str, characters: int) -> Iterator[Record]:
    for source in find_sources([corpus], []).sources:
        for _, record in read_records(source, "text", ["text", "language", "domain"], 10**9, Position()):
            text = record["text"]
            for begin in range(0, len(text), characters):
                if len(text) - begin >= 200:
                    yield {**record, "text": text[begin : begin + characters]}


def write(folder: Path, name: str, records: list[Record]) -> None:
    with open(folder / f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def curate(home: Home, name: str, sources: Path) -> dict[str, float]:
    clock, expanded = Clock(), ["el", "es", "hu", "tr", "zh"]
    with Journal(home.journal, name) as journal:
        journal.event("run_started", flow="benchmark", parameters={}, packages={})
        known = KnownKeys(home.keys, home.store)
        with activate(Run(name, home, journal, known, [clock], "benchmark")):
            documents = ingest(settings=IngestSettings(sources=[str(sources)]))
            documents = languages(
                documents=documents, settings=LanguageSettings(expanded_languages=expanded, language_workers=1)
            )
            documents = split(documents=documents, settings=SplitSettings())
            model = train_embedding(documents=documents, settings=StaticEmbeddingSettings())
            vectors = embed(documents=documents, model=model, settings=EmbedSettings())
            nearest = neighbors(documents=documents, embeddings=vectors, settings=NeighborSettings())
            grouping = group(documents=documents, neighbors=nearest, embeddings=vectors, settings=GroupSettings())
    tell(vectors, nearest, grouping)
    return clock.seconds


def tell(vectors: Artifact, nearest: Artifact, grouping: Artifact) -> None:
    numbers = vectors.statistics
    how = {each["method"] for each in nearest.statistics["partitions"]}
    print(
        f"{numbers['documents']} documents, {numbers['reused']} embeddings reused, neighbours {sorted(how)}, "
        f"updated from {nearest.statistics['updated_from']}, {grouping.statistics['duplicates']} near-duplicates"
    )


def main() -> None:
    corpus = sys.argv[1] if len(sys.argv) > 1 else "data/corpus"
    characters = int(sys.argv[2]) if len(sys.argv) > 2 else 1500
    records = list(pieces(corpus, characters))
    random.Random(0).shuffle(records)
    new = len(records) // 100
    with tempfile.TemporaryDirectory() as folder:
        sources, home = Path(folder) / "sources", Home.open(Path(folder) / "home")
        sources.mkdir()
        for number in range(FILES):
            write(sources, f"pieces-{number:02d}", records[new:][number::FILES])
        full = curate(home, "full", sources)
        write(sources, "pieces-99", records[:new])
        grown = curate(home, "grown", sources)
    print(f"{'step':16}{'full, CPU s':>12}{'+1%, CPU s':>12}{'ratio':>8}")
    for step in (*STEPS, "all"):
        a, b = (sum(each.values()) if step == "all" else each[step] for each in (full, grown))
        print(f"{step:16}{a:12.2f}{b:12.2f}{b / a:8.3f}")


if __name__ == "__main__":
    main()
