"""Similarity: of known and new languages in each layer of a model, and new experts per layer (LayerMoE)."""

from __future__ import annotations

from dataclasses import dataclass

from eclectus.flows.flow import flow
from eclectus.flows.parameters import SimilarityParameters
from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.ingest import IngestSettings, ingest
from eclectus.tasks.documents.languages import LanguageSettings, languages
from eclectus.tasks.documents.split import SplitSettings, split
from eclectus.tasks.lookup import check_before_work
from eclectus.tasks.training.check_base import check_base_to_measure
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from eclectus.tasks.training.layer_similarity import LENGTH, LayerSimilaritySettings, layer_similarity


@dataclass(frozen=True)
class Measured:
    base: Artifact
    similarity: Artifact


@flow
def similarity(parameters: SimilarityParameters) -> Measured:
    """Measures the cosine similarity of languages in every layer and divides a budget of new experts (LayerMoE)."""
    check_before_work(check_base_to_measure, parameters.base_model, LENGTH)
    base = fetch(settings=FetchSettings.of(parameters))
    documents = ingest(settings=IngestSettings.of(parameters))
    documents = languages(documents=documents, settings=LanguageSettings.of(parameters))
    documents = split(documents=documents, settings=SplitSettings.of(parameters))
    found = layer_similarity(documents=documents, checkpoint=base, settings=LayerSimilaritySettings.of(parameters))
    return Measured(base, found)
