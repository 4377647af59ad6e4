"""Held-out documents for evaluation: chosen by id, tokenised, in streams of one language and domain.

Ids are hashes of texts, so the lowest ids are a random choice that is the same for every model and hardly changes when
documents are added. Each stream is led by tokens of a training document of its language and domain, which are read and
not scored: so the whole of every chosen document is scored, by every tokenizer the same text. Cost: three passes over
the documents, one of them over texts; the tokens of the chosen ones are held in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import TRAINING, read_batches
from eclectus.tasks.packing.text_tokens import TextTokens

TEXTS_AT_ONCE = 512
MOST_BYTES_OF_A_TOKEN = 16
UNKNOWN = "unknown"
MOST_DOMAINS = 500
OTHER_DOMAINS = "(other domains)"
HELD_OUT = [("split", "==", "heldout"), ("group", "!=", "other")]


@dataclass
class HeldOut:
    """The documents to score, in the order of their streams.

    Lists have one entry per document, except streams (language, domain), lengths (tokens) and leads (the tokens that
    come first; none where there is no document for it), with one per stream. known: all languages of the corpus, with
    or without held-out documents.
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
    leads: list[list[int]] = field(default_factory=list)

    def stream_of(self, number: int) -> tuple[str, str]:
        """Language and domain of a document."""
        return self.languages[number], self.domains[number]


def read_held_out(documents: Artifact, tokenizer: Any, most: int, around: int = 1, context: int = 0) -> HeldOut:
    """Reads and tokenises at most `most` held-out documents per language and domain.

    Of very many domains the MOST_DOMAINS largest of a language are kept apart, and the others are one.
    context: tokens that lead a stream; 0 for none. around: tokens that begin and end a document in its stream; they are
    not among its own.

    Raises EclectusError if there are none.
    """
    large = _large_domains(documents)
    chosen, held, encode = _choose(documents, most, large), HeldOut(), TextTokens(tokenizer)
    leading = _leads(documents, context, large) if context else {}
    read: dict[str, list[int]] = {}
    rows: list[tuple[str, str, str, str, str, int, list[int]]] = []
    names = ["document", "work", "language", "domain", "group", "split", "bytes", "text"]
    for batch in read_batches(documents, ["language", "group"], [("group", "!=", "other")]):
        held.known |= set(batch["language"].unique().to_pylist())
    wanted = [("document", "in", sorted(chosen | set(leading.values())))]
    for batch in read_batches(documents, names, wanted, TEXTS_AT_ONCE):
        if not len(batch):
            continue
        columns = {name: batch[name].to_pylist() for name in names}
        encoded = encode(columns["text"])
        read |= dict(zip(columns["document"], encoded, strict=True))
        domains = [_shown(*pair, large) for pair in zip(columns["language"], columns["domain"], strict=True)]
        labels = (columns["language"], domains, columns["document"], columns["work"], columns["group"])
        rows += zip(*labels, columns["bytes"], encoded, strict=True)
    for language, domain, document, work, group, size, ids in sorted(rows, key=lambda row: row[:3]):
        if not ids or document not in chosen:
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
            before = read.get(_lead_of(language, domain, leading), [])
            held.leads.append([*_last_tokens(before, context - 1), tokenizer.eos_token_id] if before else [])
            held.lengths.append(len(held.leads[-1]))
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


def _leads(documents: Artifact, context: int, large: dict[str, set[str]]) -> dict[tuple[str, str], str]:
    """The training document of each language and domain with the lowest id, of those that are long enough if any is.

    Long enough: of so many bytes that any tokenizer makes `context` tokens of them.
    """
    best: dict[tuple[str, str], tuple[bool, str]] = {}
    for batch in read_batches(documents, ["document", "language", "domain", "bytes"], TRAINING):
        short = pc.less(batch["bytes"], context * MOST_BYTES_OF_A_TOKEN)
        table = pa.table(
            {"language": batch["language"], "domain": batch["domain"], "short": short, "document": batch["document"]}
        )
        found = table.group_by(["language", "domain", "short"]).aggregate([("document", "min")])
        for row in found.to_pylist():
            key = (row["language"], _shown(row["language"], row["domain"], large))
            best[key] = min(best.get(key, (True, "g")), (bool(row["short"]), row["document_min"]))
    return {key: document for key, (_, document) in best.items()}


def _lead_of(language: str, domain: str, leading: dict[tuple[str, str], str]) -> str:
    """The document that leads a stream: of its domain, else of its language, else none."""
    of_language = sorted(document for (other, _), document in leading.items() if other == language)
    return leading.get((language, domain)) or next(iter(of_language), "")


def _last_tokens(ids: list[int], count: int) -> list[int]:
    """The last `count` of the tokens, which are repeated where they are fewer."""
    return (ids * (1 + count // len(ids)))[-count:] if count else []


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
