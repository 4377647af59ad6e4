"""Budget: how many training tokens each language may contribute, by a limit or by a weight; the rest is excluded.

    language_budgets   el=5M                       at most 5 million tokens of Greek
    language_weights   en=1 el=2 hu=1              shares of the training tokens; the language that is shortest
                                                   for its weight sets the scale, so nothing is repeated

Tokens are estimated as bytes over the language's bytes per token, measured with the tokenizer on a sample. A language's
documents are taken in the order of a draw from their ids and the seed, so that a larger budget only adds documents to a
smaller one. Documents over the budget keep their row, with the split `apart`; held-out documents stay.
Price: tokenising the sample and three passes over the labels, 18 bytes of memory per document.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.language_codes import read_language
from eclectus.tasks.documents.split import draws
from eclectus.tasks.documents.table import TRAINING, read_batches, read_table, relabel
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
    draw, language, tokens = [], [], []
    for batch in read_batches(documents, ["document", "language", "bytes"], TRAINING):
        numbers = np.array([names.index(each) for each in batch["language"].to_pylist()], np.int16)
        draw.append(draws(batch["document"].to_pylist(), "budget", settings.seed))
        language.append(numbers)
        tokens.append(batch["bytes"].to_numpy() / np.array([ratio[each] for each in names])[numbers])
    if not tokens:
        raise EclectusError("no document is in the train split to give a budget to; add documents or hold out less")
    draw_N, language_N, tokens_N = np.concatenate(draw), np.concatenate(language), np.concatenate(tokens)
    available = {name: float(tokens_N[language_N == number].sum()) for number, name in enumerate(names)}
    limits = limits_of(available, settings)
    keep = np.ones(len(draw_N), bool)
    for name, limit in limits.items():
        rows = np.flatnonzero(language_N == names.index(name))
        keep[rows[_over(draw_N[rows], tokens_N[rows], limit)]] = False
    table = read_table(documents, ["split", "group"])
    over = np.array(pc.and_(pc.equal(table["split"], "train"), pc.not_equal(table["group"], "other")))
    over[over] = ~keep
    relabel(documents, {"split": pc.if_else(pa.array(over), "apart", table["split"])}, out)
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
    texts: dict[str, list[str]] = defaultdict(list)
    for batch in read_batches(documents, ["text", "language"], TRAINING):
        for text, language in zip(batch["text"].to_pylist(), batch["language"].to_pylist(), strict=True):
            if len(texts[language]) < SAMPLE_DOCUMENTS:
                texts[language].append(text[:SAMPLE_CHARACTERS])
    ratio = {}
    for language, sample in texts.items():
        tokens = sum(len(ids) + around for ids in token_ids(tokenizer, sample))
        ratio[language] = sum(len(text.encode()) for text in sample) / tokens
    return ratio


def _over(draw: np.ndarray, tokens: np.ndarray, limit: float) -> np.ndarray:
    """Positions of the documents of one language [n] over its limit; at least one document stays within it."""
    order = np.argsort(draw, kind="stable")
    fits = int((np.cumsum(tokens[order]) <= limit * (1 + 1e-9)).sum())
    return order[max(1, fits) :]
