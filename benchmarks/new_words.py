"""New words for a real base: what they save, whom they change, what they take. No training.

    python benchmarks/new_words.py BASE CORPUS HOME [SETTING=VALUE ...]

BASE: a folder or a .gguf file. CORPUS: a folder of JSON lines with text and language. HOME: a new home, or an earlier
one, whose steps are reused. Settings are those of `eclectus extend`: expanded_languages=[el],
extension_vocabulary=4000, extension_vocabulary_merges=corpus, ...

The corpus is divided by the hash of each text: tokens are learned, and original text is guarded, on one half; the other
half has been seen by nothing. It shows

    changed      documents of the original languages in the other half that get other tokens than before
    saved        bytes per token, and KV cache per kilobyte of text, before and after, by language
    speed        kilobytes of the other half's expanded text scored (in rows of 512 tokens) and generated per second,
                 before and after, in turns in one process: the median of the rounds and of their ratios
    taken        the new tokens' share of the probability of the next token on unseen original text, at step 0
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eclectus.flows.curate import read_documents
from eclectus.flows.parameters import CurateParameters, ExtendParameters
from eclectus.flows.run import open_run
from eclectus.models.extension.new_rows import new_token_mass
from eclectus.storage.artifact import Artifact
from eclectus.storage.home import Home
from eclectus.tasks.documents.readers import Position, read_records
from eclectus.tasks.documents.sources import find_sources
from eclectus.tasks.packing.new_vocabulary import ExtendTokenizerSettings, extend_tokenizer
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import TokenizerSettings, load_tokenizer, tokenizer
from eclectus.tasks.settings import parse_settings
from eclectus.tasks.training.extend_vocabulary import ExtendVocabularySettings, extend_vocabulary
from eclectus.tasks.training.fetch_model import FetchSettings, fetch

DEFAULTS = {
    "original_languages": ["en", "es"],
    "expanded_languages": ["el", "tr", "hu"],
    "extension_vocabulary": 4000,
    "language_detector": "field",
}
ROW, ROUNDS, WRITTEN, MASS_ROWS = 512, 5, 48, 40


def halves(corpus: str, home: Path) -> tuple[Path, dict[str, list[str]]]:
    """(a file with one half of the corpus, texts of the other half by language)."""
    other: dict[str, list[str]] = {}
    seen = home / "new_words.jsonl"
    with seen.open("w", encoding="utf-8") as out:
        for source in find_sources([corpus], []).sources:
            for _, record in read_records(source, "text", ["text", "language"], 10**9, Position()):
                text, language = record["text"], record["language"] or "en"
                if hashlib.sha256(text.encode()).digest()[0] % 2:
                    other.setdefault(language, []).append(text)
                else:
                    out.write(json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n")
    return seen, other


def made(parameters: ExtendParameters, home: Home) -> tuple[Artifact, Artifact, Artifact, Artifact]:
    """(base, its tokenizer, the longer tokenizer, the base with new rows)."""
    with open_run("extend", parameters, home):
        base = fetch(settings=FetchSettings.of(parameters))
        curated = CurateParameters.of(parameters, tokenizer=base.path)
        old = tokenizer(documents=None, settings=TokenizerSettings.of(curated))
        _, documents = read_documents(curated)
        new = extend_tokenizer(documents=documents, base=old, settings=ExtendTokenizerSettings.of(curated))
        grown = extend_vocabulary(checkpoint=base, tokenizer=new, settings=ExtendVocabularySettings.of(parameters))
    return base, old, new, grown


def print_changed(tokenizers: list[Any], other: dict[str, list[str]], first: int, languages: list[str]) -> None:
    """tokenizers: before and after. first: id of the first new token."""
    before, after = map(TextTokens, tokenizers)
    for language in languages:
        changed, size, texts, new = 0, 0, other.get(language, []), Counter[int]()
        for text in texts:
            size += len(text.encode())
            (was,), (now,) = before([text]), after([text])
            changed += was != now
            new.update(each for each in now if each >= first)
        print(f"unseen {language}: {changed} of {len(texts)} documents get other tokens ({size / 1e6:.1f} MB)")
        print("   ", " ".join(f"{tokenizers[1].decode([each])!r}" for each, _ in new.most_common(20)))


def rows(tokens: TextTokens, texts: list[str], count: int) -> tuple[torch.Tensor, int]:
    """(the first `count` rows of ROW tokens, the bytes of the texts that fill them)."""
    ids: list[int] = []
    size = 0
    for text in texts:
        if len(ids) >= count * ROW:
            break
        ids += tokens([text])[0]
        size += len(text.encode())
    kept = len(ids) // ROW * ROW if len(ids) < count * ROW else count * ROW
    return torch.tensor(ids[:kept]).view(-1, ROW), round(size * kept / max(1, len(ids)))


@torch.inference_mode()
def scored(model: Any, tokens: torch.Tensor) -> None:
    for row in tokens:
        model(input_ids=row[None], use_cache=False)


@torch.inference_mode()
def written(model: Any, tokens: torch.Tensor) -> None:
    model.generate(tokens[:1, :64], max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, pad_token_id=0)


def seconds(what: Callable[[Any, torch.Tensor], None], model: Any, tokens: torch.Tensor) -> float:
    begun = time.perf_counter()
    what(model, tokens)
    return time.perf_counter() - begun


def print_speeds(models: list[Any], encoders: list[TextTokens], texts: list[str], language: str) -> None:
    """models, encoders: before and after."""
    both = [rows(encode, texts, 4) for encode in encoders]
    per_token = [size / tokens.numel() for tokens, size in both]
    for name, what in (("scored", scored), ("generated", written)):
        kilobytes = [size / 1e3 if what is scored else WRITTEN * each / 1e3
                     for (_, size), each in zip(both, per_token, strict=True)]  # fmt: skip
        found: list[list[float]] = []
        for _ in range(ROUNDS):
            taken = [seconds(what, model, tokens) for model, (tokens, _) in zip(models, both, strict=True)]
            found.append([size / each for size, each in zip(kilobytes, taken, strict=True)])
        before, after = (statistics.median(each[side] for each in found) for side in (0, 1))
        ratio = statistics.median(each[1] / each[0] for each in found)
        print(f"{language} {name}: {before:.3f} to {after:.3f} kB/s, {ratio:.2f} times as fast")


def settings(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    for name, text in (each.split("=", 1) for each in arguments):
        yield name, parse_settings(f"{name}: {text}", "arguments")[name]


def main() -> None:
    home = Home.open(sys.argv[3])
    seen, other = halves(sys.argv[2], home.root)
    values = DEFAULTS | dict(settings(sys.argv[4:]))
    parameters = ExtendParameters(**values, base_model=sys.argv[1], sources=[str(seen)])
    base, old, new, grown = made(parameters, home)
    kept = {name: new.statistics[name] for name in ("new_tokens", "merges_left_out")}
    print(json.dumps(kept))
    for language, each in grown.statistics["languages"].items():
        (before, after), cache = each["bytes_per_token"], [size / 1e6 for size in each["cache_bytes_per_kilobyte"]]
        print(f"{language}: bytes per token {before:.2f} to {after:.2f}, cache {cache[0]:.1f} to {cache[1]:.1f} MB/kB")
    tokenizers = [load_tokenizer(each.path) for each in (old, new)]
    encoders = [TextTokens(each) for each in tokenizers]
    print_changed(tokenizers, other, new.statistics["first_new_id"], list(parameters.original_languages))
    models = [AutoModelForCausalLM.from_pretrained(each.path, dtype=torch.float32) for each in (base, grown)]
    first = models[0].config.vocab_size
    for language in parameters.original_languages:
        tokens, _ = rows(encoders[0], other[language], MASS_ROWS)
        mass = new_token_mass(models[1], tokens, first)
        print(
            f"taken on {language}: {mass['mass']:.2e} of the probability, {mass['bits_per_token']:.1e} bits per token"
        )
    for language in parameters.expanded_languages:
        print_speeds(models, encoders, other[language], language)


if __name__ == "__main__":
    main()
