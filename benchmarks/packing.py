"""Packing against the recipe of transformers' run_clm.py on the same texts: python benchmarks/packing.py [CORPUS]

The recipe: `datasets.map` tokenises, concatenates and cuts into blocks, in one process and batches of 1,000, with the
same tokenizer and length. It neither orders, shuffles nor remembers which document a token is of. CORPUS: what
`--sources` takes (data/corpus).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from datasets import Dataset, disable_caching, disable_progress_bars
from steps_alone import maker

from eclectus.storage.artifact import ArtifactStore
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.documents.table import read_table
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer

LENGTH = 512


def recipe(texts: list[str], words, place: Path) -> int:
    """Tokens in the blocks that the recipe writes."""

    def tokenize(batch):
        return {"input_ids": [[*ids, words.eos_token_id] for ids in words(batch["text"])["input_ids"]]}

    def block(batch):
        flat = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [flat[i : i + LENGTH] for i in range(0, len(flat) - LENGTH + 1, LENGTH)]}

    blocks = (
        Dataset.from_dict({"text": texts}).map(tokenize, batched=True, remove_columns="text").map(block, batched=True)
    )
    blocks.save_to_disk(str(place))
    return len(blocks) * LENGTH


def main(corpus: str) -> None:
    disable_caching()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        make = maker(ArtifactStore(folder))
        documents = make(ingest, settings=IngestSettings(sources=[corpus]))
        documents = make(languages, documents=documents, settings=LanguageSettings(expanded_languages=[]))
        documents = make(split, documents=documents, settings=SplitSettings())
        tokens = make(tokenizer, documents=documents, settings=TokenizerSettings())
        words = load_tokenizer(tokens.path)
        table = read_table(documents, ["text", "split", "group"]).to_pandas()
        texts = table.text[(table.split == "train") & (table.group == "original")].tolist()
        for _ in range(2):
            begun = time.perf_counter()
            packed = make(pack, documents=documents, tokenizer=tokens, settings=PackSettings(pack_group="original"))
            ours = packed.statistics["tokens"] / (time.perf_counter() - begun)
            begun = time.perf_counter()
            theirs = recipe(texts, words, Path(folder) / "recipe") / (time.perf_counter() - begun)
            print(f"pack {ours / 1e6:.2f}M tokens/s, recipe {theirs / 1e6:.2f}M tokens/s: {ours / theirs:.1f} x")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["data/corpus"])
