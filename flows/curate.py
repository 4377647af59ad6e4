"""Curate: sources to training instances, grouped by similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eclectus.flows.flow import flow
from eclectus.flows.parameters import CurateParameters
from eclectus.flows.run import current_home
from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.grouping.embed import STATIC, EmbedSettings, embed
from eclectus.tasks.grouping.group import GroupSettings, group
from eclectus.tasks.grouping.neighbors import NeighborSettings, neighbors
from eclectus.tasks.grouping.static_embedding import StaticEmbeddingSettings, train_embedding
from eclectus.tasks.packing.budget import BudgetSettings, budget
from eclectus.tasks.packing.conversation_tokens import check_template
from eclectus.tasks.packing.new_vocabulary import ExtendTokenizerSettings, extend_tokenizer
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.packing.replay import ReplaySettings, replay
from eclectus.tasks.packing.tokenizer import TRAINED_HERE, TokenizerSettings, tokenizer
from eclectus.tasks.plan import Planned
from eclectus.tasks.report.data_report import DataReportSettings, data_report
from eclectus.tasks.rights.forgotten import forgotten, left_out


@dataclass(frozen=True)
class ReadDocuments:
    """Documents as ingested, and with language and split: all that the evaluation of a model needs."""

    ingested: Artifact
    documents: Artifact


@dataclass(frozen=True)
class Curated(ReadDocuments):
    """original, expanded, review: instances of the original languages, of the expanded ones and for the review stage;
    the last two are None without expanded languages. documents: with the split that training uses, after budgets.
    """

    grouping: Artifact
    tokenizer: Artifact
    original: Artifact
    expanded: Artifact | None
    review: Artifact | None
    data_report: Artifact


def read_documents(parameters: CurateParameters) -> tuple[Artifact, Artifact]:
    """The first steps: (documents as ingested, documents with language and split)."""
    ingested = ingest(settings=IngestSettings.of(parameters))
    documents = languages(documents=ingested, settings=LanguageSettings.of(parameters))
    return ingested, split(documents=documents, settings=SplitSettings.of(parameters))


def pack_settings(parameters: CurateParameters, documents: Artifact, group: str, **changes: Any) -> PackSettings:
    """Settings of a packing, which leaves out what the home forgot. group: as in `pack_group`."""
    wanted = {*parameters.pack_left_out, *forgotten(current_home())}
    known = [] if isinstance(documents, Planned) else left_out(wanted, documents, group)
    return PackSettings.of(parameters, pack_group=group, pack_left_out=known, **changes)


@flow
def curate(parameters: CurateParameters = CurateParameters()) -> Curated:
    """From sources to training instances: languages, held-out split, embeddings, similarity grouping, packing."""
    chosen, tokens = TokenizerSettings.of(parameters), None
    if chosen.tokenizer != TRAINED_HERE:
        # First, since a wrong one should not be found after hours.
        tokens = tokenizer(documents=None, settings=chosen)
        if parameters.conversations and not isinstance(tokens, Planned):
            check_template(tokens)
    ingested, documents = read_documents(parameters)
    model = None
    if parameters.embedding_model == STATIC:
        model = train_embedding(documents=documents, settings=StaticEmbeddingSettings.of(parameters))
    embeddings = embed(documents=documents, model=model, settings=EmbedSettings.of(parameters))
    nearest = neighbors(documents=documents, embeddings=embeddings, settings=NeighborSettings.of(parameters))
    grouping = group(
        documents=documents, neighbors=nearest, embeddings=embeddings, settings=GroupSettings.of(parameters)
    )
    tokens = tokens or tokenizer(documents=documents, settings=chosen)
    if parameters.extension_vocabulary:
        tokens = extend_tokenizer(documents=documents, base=tokens, settings=ExtendTokenizerSettings.of(parameters))
    divided = documents
    if parameters.language_budgets or parameters.language_weights:
        documents = budget(documents=documents, tokenizer=tokens, settings=BudgetSettings.of(parameters))

    def packed(name: str, of: Artifact, order: Artifact | None, which: str) -> Artifact:
        return pack(
            label=f"pack {name}",
            documents=of,
            tokenizer=tokens,
            grouping=order,
            embeddings=embeddings,
            settings=pack_settings(parameters, of, which),
        )

    original = packed("original", documents, grouping, "original")
    expanded = review = replayed = None
    if parameters.expanded_languages:
        expanded = packed("expanded", documents, grouping, "expanded")
        replayed = replay(
            documents=documents, grouping=grouping, tokenizer=tokens, settings=ReplaySettings.of(parameters)
        )
        review = packed("review", replayed, None, "all")
    page = data_report(
        ingested=ingested,
        documents=documents,
        divided=divided,
        grouping=grouping,
        instances={"original": original, "expanded": expanded, "review": review},
        replayed=replayed,
        settings=DataReportSettings.of(parameters),
    )
    return Curated(ingested, documents, grouping, tokens, original, expanded, review, page)
