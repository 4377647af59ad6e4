"""Budget: how many training tokens each language may contribute, by a limit or by a weight; the rest is excluded.

    language_budgets   el=5M                       at most 5 million tokens of Greek
    language_weights   en=1 el=2 hu=1              shares of the training tokens; the language that is shortest
                                                   for its weight sets the scale, so nothing is repeated

Tokens are estimated as bytes over the language's bytes per token, measured with the tokenizer on a sample. A language's
documents are taken in the order of a draw from their ids and the seed, so that a larger budget only adds documents to a
smaller one. Documents over the budget keep their row, with the split `apart`; held-out documents stay.
Price: tokenising the sample and two passes over the labels, 26 bytes of memory per document.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.language_codes import read_language
from eclectus.tasks.documents.split import draws
from eclectus.tasks.documents.table import TRAINING, codes_of, first_rows, parts, read_part_table, relabel
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.packing.text_tokens import token_ids
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer
from eclectus.tasks.run import metric
from eclectus.tasks.settings import SEED
from eclectus.tasks.step import step

SAMPLE_DOCUMENTS = 300
SAMPLE_CHARACTERS = 5_000


class BudgetSettings(BeginSettings):
    """How much of each language is trained on."""

    language_budgets: list[str] = Field(
        [],
        description="Maximum training tokens of a language, as LANGUAGE=TOKENS, such as el=5M; others have no limit.",
    )
    language_weights: list[str] = Field(
        [],
        description="Shares of the training tokens, as LANGUAGE=WEIGHT, such as en=1 and el=2; others have no limit.",
    )
    seed: int = SEED

    @field_validator("language_budgets", "language_weights")
    @classmethod
    def _readable(cls, entries: list[str]) -> list[str]:
        amounts(entries)
        return entries


def amounts(entries: list[str]) -> dict[str, float]:
    """["el=5M", "en=1"] -> {"el": 5e6, "en": 1.0}. Raises ValueError on anything else, zero and repeats included."""
    result: dict[str, float] = {}
    for entry in entries:
        match = re.fullmatch(r"\s*([^=]*[^=\s])\s*=\s*(\d+(?:\.\d+)?)\s*([kMGB]?)\s*", entry)
        if not match or not float(match[2]):
            raise ValueError(f"'{entry}' cannot be read; expected LANGUAGE=NUMBER, such as el=5M")
        language = read_language(match[1])
        if language in result:
            raise ValueError(f"language '{language}' is given twice")
        result[language] = float(match[2]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[match[3]]
    return result


@step(makes="documents", version=3)
def budget(documents: Artifact, tokenizer: Artifact, settings: BudgetSettings, out: Draft) -> None:
    """Excludes training documents over their language's budget. Raises EclectusError if a named language has none."""
    ratio = bytes_per_token(documents, load_tokenizer(tokenizer.path), settings)
    names = sorted(ratio)
    draw, language, tokens, rows = [], [], [], []
    for path, first in zip(parts(documents), first_rows(documents).tolist(), strict=False):
        table = read_part_table(path, ["row", "document", "language", "bytes"], where=TRAINING)
        codes, there = codes_of(table["language"])
        places = np.array([names.index(each) if each in ratio else -1 for each in there], np.int16)[codes]
        draw.append(draws(table["document"].to_pylist(), "budget", settings.seed))
        language.append(places)
        tokens.append(table["bytes"].to_numpy() / np.array([ratio[each] for each in names])[places])
        rows.append(first + table["row"].to_numpy())
    draw_N, language_N, tokens_N = np.concatenate(draw), np.concatenate(language), np.concatenate(tokens)
    if not len(draw_N):
        raise EclectusError("no document is in the train split to give a budget to; add documents or hold out less")
    available = {name: float(tokens_N[language_N == number].sum()) for number, name in enumerate(names)}
    limits = limits_of(available, settings)
    keep = np.ones(len(draw_N), bool)
    for name, limit in limits.items():
        here = np.flatnonzero(language_N == names.index(name))
        keep[here[_over(draw_N[here], tokens_N[here], limit)]] = False
    over = np.zeros(first_rows(documents)[-1], bool)
    over[np.concatenate(rows)[~keep]] = True
    relabel(documents, lambda path, begin, end: _without(path, over[begin:end]), out)
    out.statistics = {
        "languages": {
            name: {
                "tokens": round(float(tokens_N[keep & (language_N == number)].sum())),
                "available": round(available[name]),
                "limit": round(limits[name]) if name in limits else None,
                "documents": int((keep & (language_N == number)).sum()),
                "bytes_per_token": round(ratio[name], 3),
            }
            for number, name in enumerate(names)
        }
    }
    for language, each in out.statistics["languages"].items():
        metric("budget_tokens", each["tokens"], language=language)


def limits_of(available: dict[str, float], settings: BudgetSettings) -> dict[str, float]:
    """Language -> maximum training tokens, of the limited languages. available: language -> tokens in the corpus."""
    limits, weights = amounts(settings.language_budgets), amounts(settings.language_weights)
    for name, amount in (("language_budgets", limits), ("language_weights", weights)):
        for language in amount:
            if not available.get(language):
                found = ", ".join(f"{each} {tokens:.3g}" for each, tokens in available.items()) or "nothing"
                raise EclectusError(
                    f"'{name}' names language '{language}', which has no training tokens; found: {found}"
                )
    if weights:
        scale = min(min(available[each], limits.get(each, np.inf)) / weight for each, weight in weights.items())
        limits |= {language: weight * scale for language, weight in weights.items()}
    return limits


def bytes_per_token(documents: Artifact, tokenizer: Any, settings: BeginSettings) -> dict[str, float]:
    """Language -> UTF-8 bytes per token, from the first documents of each, with what begins and ends a document."""
    around = len(settings.begin(tokenizer)) + 1
    rows: dict[str, list[int]] = defaultdict(list)
    for path, first in zip(parts(documents), first_rows(documents).tolist(), strict=False):
        table = read_part_table(path, ["row", "language"], where=TRAINING)
        codes, names = codes_of(table["language"])
        for code in np.unique(codes).tolist():
            wanted = SAMPLE_DOCUMENTS - len(rows[names[code]])
            if wanted > 0:
                here = np.flatnonzero(codes == code)[:wanted]
                rows[names[code]] += (first + table["row"].to_numpy()[here]).tolist()
    reader = TextReader(documents)
    texts = {name: [text[:SAMPLE_CHARACTERS] for text in reader.read(np.array(here))] for name, here in rows.items()}
    ratio = {}
    for language, sample in texts.items():
        tokens = sum(len(ids) + around for ids in token_ids(tokenizer, sample))
        ratio[language] = sum(len(text.encode()) for text in sample) / tokens
    return ratio


def _without(path: Path, over: np.ndarray) -> dict[str, pa.Array]:
    """The labels of a part of which the documents `over` [n] are excluded."""
    return {"split": pc.if_else(pa.array(over), "apart", read_part_table(path, ["split"])["split"])}


def _over(draw: np.ndarray, tokens: np.ndarray, limit: float) -> np.ndarray:
    """Positions of the documents of one language [n] over its limit; at least one document stays within it."""
    order = np.argsort(draw, kind="stable")
    fits = int((np.cumsum(tokens[order]) <= limit * (1 + 1e-9)).sum())
    return order[max(1, fits) :]
