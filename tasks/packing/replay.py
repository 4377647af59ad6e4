"""Replay: the documents of the review stage, a random sample of every language (docs/methods.md 2.4).

The paper reviews 50,000 documents of each of three original languages and 100,000 of each of three expanded ones: one
original document to two expanded, and the originals are less than 1% of stage 1's tokens. Both hold here for what is
drawn, not for what was wanted:

    share    tokens of the original documents <= review_original_share of the tokens of the text that stage 1 trains
             on (the training documents of the expanded languages, each read once)
    ratio    drawn original : drawn expanded documents, all languages together: 1:2, or that of the two settings;
             where one group has too few documents, fewer of the other are drawn
    spread   a group's documents are spread evenly over its languages; a language with fewer gives all of them

Without a setting the share is the paper's 1%; where that is under LEAST_TOKENS, as many are drawn, up to 10%, and the
log says so: in the main job 1% of stage 1's text is 6 documents. Only documents of the train split are drawn; a
language's sample under one seed is the beginning of one random order. Tokens are estimated from bytes, by a sample of
each language, as in `budget`.
Price: two passes over the documents and the sample's tokens, 30 bytes of memory per document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.split import draws
from eclectus.tasks.documents.table import (
    ROWS_PER_GROUP,
    SCHEMA,
    DocumentsWriter,
    codes_of,
    parts,
    read_part_table,
)
from eclectus.tasks.packing.budget import bytes_per_token
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer
from eclectus.tasks.run import describe, metric, notify, progress
from eclectus.tasks.settings import SEED
from eclectus.tasks.step import step

PAPER_ORIGINAL, PAPER_EXPANDED = 50_000, 100_000
ORIGINALS_PER_EXPANDED = 0.5
PAPER_SHARE, LARGEST_SHARE = 0.01, 0.1
# 128 instances of 512: what the routers are reviewed on should be more than a handful of documents.
LEAST_TOKENS = 65_536
# Without a tokenizer.
BYTES_PER_TOKEN = 4.0
GROUPS = ("original", "expanded")


class ReplaySettings(BeginSettings):
    """How many documents the review stage trains on."""

    review_original_documents: int = Field(
        0,
        ge=0,
        description="Documents of each original language in the review; 0 takes as many as review_original_share "
        "allows, up to 50,000.",
    )
    review_expanded_documents: int = Field(
        0,
        ge=0,
        description="Documents of each expanded language in the review; 0 keeps the paper's ratio of two expanded "
        "documents to an original one, up to 100,000.",
    )
    review_original_share: float = Field(
        0,
        ge=0,
        le=1,
        description="Most original text in the review, as a share of the tokens of stage 1's text; not applied where "
        "one of the two counts is given. 0: the paper's 0.01; where that is under 65,536 tokens, as many, up to 0.1.",
    )
    seed: int = SEED


@dataclass(frozen=True)
class Supply:
    """The documents of one language that may be drawn. tokens: of each, estimated, in the order of the draw [n]."""

    group: str
    tokens: np.ndarray

    def first(self, documents: int) -> float:
        """Tokens of the first documents."""
        return float(self.tokens[:documents].sum())


@step(makes="documents", version=2)
def replay(
    documents: Artifact,
    settings: ReplaySettings,
    out: Draft,
    grouping: Artifact | None = None,
    tokenizer: Artifact | None = None,
) -> None:
    """Draws the review documents. Raises EclectusError if a group has none to draw from.

    grouping: if given, only documents that it kept are drawn, so none that is a near-duplicate of a held-out one.
    tokenizer: to count tokens; without it a token is taken for 4 bytes.
    """
    ratio = bytes_per_token(documents, load_tokenizer(tokenizer.path), settings) if tokenizer else {}
    strata: dict[tuple[str, str], int] = {}
    draw, stratum, tokens = [np.zeros(0)], [np.zeros(0, np.int16)], [np.zeros(0)]
    for path in parts(documents):
        table = read_part_table(path, ["document", "language", "group", "split", "bytes"])
        numbers, bytes_per = _strata(table, strata, ratio)
        drawn = np.zeros(len(table))
        here = np.flatnonzero(numbers >= 0)
        drawn[here] = draws(table["document"].take(pa.array(here)).to_pylist(), "replay", settings.seed)
        draw.append(drawn)
        stratum.append(numbers)
        tokens.append(table["bytes"].fill_null(0).to_numpy() / bytes_per)
    draw_N, tokens_N, stratum_N = (np.concatenate(each) for each in (draw, tokens, stratum))
    if grouping is not None:
        kept = np.zeros(len(stratum_N), bool)
        kept[pq.read_table(grouping.file("order.parquet"), columns=["row"])["row"].to_numpy()] = True
        stratum_N[~kept] = -1
    rows = {}
    for (_, language), number in strata.items():
        here = np.flatnonzero(stratum_N == number)
        rows[language] = here[np.argsort(draw_N[here], kind="stable")]
    supply = {language: Supply(group, tokens_N[rows[language]]) for group, language in strata}
    counts = review_counts(supply, settings)
    chosen = np.zeros(len(draw_N), bool)
    for language, count in counts.items():
        chosen[rows[language][:count]] = True
    _write(documents, chosen, out)
    out.statistics = _statistics(supply, counts, settings)
    for language, about in out.statistics["languages"].items():
        metric("replay_documents", about["documents"], language=language)
        metric("replay_tokens", about["tokens"], language=language)
    metric("replay_share_of_stage1", out.statistics["share_of_stage1"])
    notify("replay", _summary(out.statistics))


def review_counts(supply: dict[str, Supply], settings: ReplaySettings) -> dict[str, int]:
    """Documents to draw by language. Raises EclectusError if a group has no document."""
    available: dict[str, dict[str, int]] = {group: {} for group in GROUPS}
    for language, each in supply.items():
        if len(each.tokens):
            available[each.group][language] = len(each.tokens)
    for group, there in available.items():
        if not there:
            raise EclectusError(
                f"the review has no document of an {group} language to draw from; "
                f"add documents of '{group}_languages' to the train split"
            )
    wanted = {"original": settings.review_original_documents, "expanded": settings.review_expanded_documents}
    ratio = ORIGINALS_PER_EXPANDED
    if all(wanted.values()):
        originals, expandeds = (wanted[group] * len(available[group]) for group in GROUPS)
        ratio = originals / expandeds
    most = {}
    for group, limit in zip(GROUPS, (PAPER_ORIGINAL, PAPER_EXPANDED), strict=True):
        most[group] = {language: min(wanted[group] or limit, n) for language, n in available[group].items()}
    original, expanded = (sum(most[group].values()) for group in GROUPS)
    if not any(wanted.values()):
        original = min(original, _within_share(supply, most["original"], settings))
    original = max(1, min(original, int(expanded * ratio + 1e-9)))
    expanded = max(1, min(expanded, int(original / ratio + 1e-9)))
    return spread(most["original"], original) | spread(most["expanded"], expanded)


def spread(most: dict[str, int], total: int) -> dict[str, int]:
    """Divides a total as evenly as possible over languages, of which none can give more than its most."""
    counts, left = {}, total
    for position, language in enumerate(sorted(most, key=lambda each: (most[each], each))):
        counts[language] = min(most[language], left // (len(most) - position))
        left -= counts[language]
    return counts


def _within_share(supply: dict[str, Supply], most: dict[str, int], settings: ReplaySettings) -> int:
    """The most original documents with at most the wanted share of stage 1's tokens."""
    limit = _most_tokens(_stage1_tokens(supply), settings)
    fits, over = 0, sum(most.values()) + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        tokens = sum(supply[language].first(count) for language, count in spread(most, middle).items())
        fits, over = (middle, over) if tokens <= limit else (fits, middle)
    return fits


def _most_tokens(stage1: float, settings: ReplaySettings) -> float:
    """Original tokens that may be drawn, of so many tokens of stage 1's text."""
    if settings.review_original_share:
        return settings.review_original_share * stage1
    return max(PAPER_SHARE * stage1, min(LEAST_TOKENS, LARGEST_SHARE * stage1))


def _stage1_tokens(supply: dict[str, Supply]) -> float:
    return sum(float(each.tokens.sum()) for each in supply.values() if each.group == "expanded")


def _statistics(supply: dict[str, Supply], counts: dict[str, int], settings: ReplaySettings) -> dict[str, Any]:
    languages: dict[str, dict[str, Any]] = {
        language: {
            "group": each.group,
            "documents": counts.get(language, 0),
            "available": len(each.tokens),
            "tokens": round(each.first(counts.get(language, 0))),
        }
        for language, each in sorted(supply.items())
    }
    totals = {
        f"{group}_{what}": sum(each[what] for each in languages.values() if each["group"] == group)
        for group in GROUPS
        for what in ("documents", "tokens")
    }
    stage1 = max(1.0, _stage1_tokens(supply))
    return {
        "documents": totals["original_documents"] + totals["expanded_documents"],
        **totals,
        "expanded_documents_per_original": round(totals["expanded_documents"] / totals["original_documents"], 3),
        "expanded_tokens_per_original": round(totals["expanded_tokens"] / max(1, totals["original_tokens"]), 3),
        "stage1_tokens": round(stage1),
        "share_of_stage1": round(totals["original_tokens"] / stage1, 6),
        "share_limit": round(_most_tokens(stage1, settings) / stage1, 6),
        "languages": languages,
    }


def _summary(drawn: dict[str, Any]) -> str:
    """One paragraph: what is reviewed, its share of stage 1, and where it is not as in the paper."""
    text = (
        f"the review replays {drawn['original_documents']:,} original and {drawn['expanded_documents']:,} expanded "
        f"documents (1:{drawn['expanded_documents_per_original']:.3g}; paper 1:2), about "
        f"{describe(drawn['original_tokens'])} and {describe(drawn['expanded_tokens'])} tokens; the originals are "
        f"{100 * drawn['share_of_stage1']:.3g}% of the {describe(drawn['stage1_tokens'])} tokens of stage 1's text"
    )
    if drawn["share_of_stage1"] > PAPER_SHARE:
        text += (
            f", more than the paper's {100 * PAPER_SHARE:.3g}% (here {describe(PAPER_SHARE * drawn['stage1_tokens'])} "
            "tokens, few documents to review); with more text of the expanded languages the share comes down to it"
        )
    return text


def _strata(
    table: pa.Table, strata: dict[tuple[str, str], int], ratio: dict[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each document of a part the number of its (group, language), int16 [n], -1 if it may not be drawn, and the
    bytes per token of its language, float64 [n]. strata: gets the new ones in the order of the documents."""
    (language, languages), (group, groups), (split, splits) = (
        codes_of(table[name]) for name in ("language", "group", "split")
    )
    allowed = np.array([name == "train" for name in splits], bool)[split]
    allowed &= np.array([name != "other" for name in groups], bool)[group]
    here = np.flatnonzero(allowed)
    pairs, first, inverse = np.unique(
        group[here] * len(languages) + language[here], return_index=True, return_inverse=True
    )
    places = np.empty(len(pairs), np.int16)
    for each in np.argsort(first).tolist():
        of_group, of_language = divmod(int(pairs[each]), len(languages))
        places[each] = strata.setdefault((groups[of_group], languages[of_language]), len(strata))
    numbers = np.full(len(table), -1, np.int16)
    numbers[here] = places[inverse]
    return numbers, np.array([ratio.get(name, BYTES_PER_TOKEN) for name in languages])[language]


def _write(documents: Artifact, chosen: np.ndarray, out: Draft) -> None:
    """Writes the chosen documents; row groups without one are not read."""
    report_progress, row = progress(len(chosen), "drawing the review", "documents"), 0
    others = [name for name in SCHEMA.names if name != "text"]
    with DocumentsWriter(out) as writer:
        for path in parts(documents):
            table, first = read_part_table(path, others), row
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    begin, row = row, row + file.metadata.row_group(group).num_rows
                    if chosen[begin:row].any():
                        texts = file.read_row_group(group, columns=["text"])["text"]
                        here = table.slice(begin - first, row - begin).append_column("text", texts)
                        for part in range(0, len(here), ROWS_PER_GROUP):
                            rows = here.slice(part, ROWS_PER_GROUP)
                            kept = rows.filter(pa.array(chosen[begin + part : begin + part + len(rows)]))
                            if len(kept):
                                writer.write(kept)
                    report_progress(row)
