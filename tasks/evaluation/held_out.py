"""Held-out documents for evaluation: chosen by id, tokenised, in streams of one language and domain.

Ids are hashes of texts, so the lowest ids are a random choice that is the same for every model and hardly changes when
documents are added. Cost: two passes over the documents; the tokens of the chosen ones are held in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_batches
from eclectus.tasks.packing.text_tokens import TextTokens

TEXTS_AT_ONCE = 512
UNKNOWN = "unknown"
MOST_DOMAINS = 500
OTHER_DOMAINS = "(other domains)"
HELD_OUT = [("split", "==", "heldout"), ("group", "!=", "other")]


@dataclass
class HeldOut:
    """The documents to score, in the order of their streams.

    Lists have one entry per document, except streams (language, domain) and lengths (tokens) with one per stream.
    known: all languages of the corpus, with or without held-out documents.
    """

    documents: list[str] = field(default_factory=list)
    works: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    streams: list[tuple[str, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def read_held_out(documents: Artifact, tokenizer: Any, most: int, around: int = 1) -> HeldOut:
    """Reads and tokenises at most `most` held-out documents per language and domain.

    Of very many domains the MOST_DOMAINS largest of a language are kept apart, and the others are one.
    around: tokens that begin and end a document in its stream; they are not among its own.

    Raises EclectusError if there are none.
    """
    large = _large_domains(documents)
    chosen, held, encode = _choose(documents, most, large), HeldOut(), TextTokens(tokenizer)
    rows: list[tuple[str, str, str, str, str, int, list[int]]] = []
    names = ["document", "work", "language", "domain", "group", "split", "bytes", "text"]
    for batch in read_batches(documents, ["language", "group"], [("group", "!=", "other")]):
        held.known |= set(batch["language"].unique().to_pylist())
    wanted = [("document", "in", sorted(chosen)), ("split", "==", "heldout")]
    for batch in read_batches(documents, names, wanted, TEXTS_AT_ONCE):
        if not len(batch):
            continue
        columns = {name: batch[name].to_pylist() for name in names}
        encoded = encode(columns["text"])
        domains = [_shown(*pair, large) for pair in zip(columns["language"], columns["domain"], strict=True)]
        labels = (columns["language"], domains, columns["document"], columns["work"], columns["group"])
        rows += zip(*labels, columns["bytes"], encoded, strict=True)
    for language, domain, document, work, group, size, ids in sorted(rows, key=lambda row: row[:3]):
        if not ids:
            continue
        held.documents.append(document)
        held.works.append(work)
        held.languages.append(language)
        held.domains.append(domain)
        held.groups.append(group)
        held.bytes.append(size)
        held.tokens.append(ids)
        if not held.streams or held.streams[-1] != (language, domain):
            held.streams.append((language, domain))
            held.lengths.append(0)
        held.lengths[-1] += len(ids) + around
    return held


def choose_prompts(held: HeldOut, tokens: int, samples: int) -> list[int]:
    """Indices of `samples` documents per language whose first `tokens` tokens are continued, alternating over domains.

    The choice depends on documents and tokenizer alone, so all models continue the same prompts.
    """
    by_language: dict[str, list[tuple[int, str, int]]] = defaultdict(list)
    seen: dict[tuple[str, str], int] = defaultdict(int)
    for number, (language, domain, ids) in enumerate(zip(held.languages, held.domains, held.tokens, strict=True)):
        if len(ids) > tokens:
            by_language[language].append((seen[language, domain], domain, number))
            seen[language, domain] += 1
    return [number for language in sorted(by_language) for _, _, number in sorted(by_language[language])[:samples]]


def _large_domains(documents: Artifact) -> dict[str, set[str]]:
    """The domains of each language that are kept apart, by held-out documents; equal ones by name."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for batch in read_batches(documents, ["language", "domain"], HELD_OUT):
        for language, domain in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            counts[language][domain or UNKNOWN] += 1
    return {
        language: set(sorted(each, key=lambda domain: (-each[domain], domain))[:MOST_DOMAINS])
        for language, each in counts.items()
    }


def _shown(language: str, domain: str | None, large: dict[str, set[str]]) -> str:
    return (domain or UNKNOWN) if (domain or UNKNOWN) in large.get(language, ()) else OTHER_DOMAINS


def _choose(documents: Artifact, most: int, large: dict[str, set[str]]) -> set[str]:
    """Ids of the documents to score: ids are hashes, so the lowest are a random and stable choice."""
    ids: dict[tuple[str, str], list[str]] = defaultdict(list)
    for batch in read_batches(documents, ["document", "language", "domain"], HELD_OUT):
        for document, language, domain in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            ids[language, _shown(language, domain, large)].append(document)
    if not ids:
        raise EclectusError(
            f"{documents.name} has no held-out documents in a wanted language, so no model can be evaluated; hold some "
            "out when splitting, or add documents"
        )
    return {document for each in ids.values() for document in sorted(each)[:most]}
