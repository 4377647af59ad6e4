"""Similarity: how alike known and new languages look to each layer of a model, and how many new experts each layer needs."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.parameters import SimilarityParameters, check
from flows.run import open_run
from storage.artifact import Artifact
from tasks.fetch import FetchSettings, fetch
from tasks.ingest import IngestSettings, ingest
from tasks.languages import LanguageSettings, languages
from tasks.layer_similarity import LayerSimilaritySettings, layer_similarity
from tasks.split import SplitSettings, split


@dataclass(frozen=True)
class Measured:
    base: Artifact
    similarity: Artifact


@flow(name="similarity")
def similarity(parameters: SimilarityParameters) -> Measured:
    """Measures the cosine between languages in every layer, and shares out a budget of new experts (LayerMoE)."""
    check(parameters)
    with open_run("similarity", parameters):
        documents = ingest(settings=IngestSettings.of(parameters))
        documents = languages(documents=documents, settings=LanguageSettings.of(parameters))
        documents = split(documents=documents, settings=SplitSettings.of(parameters))
        base = fetch(settings=FetchSettings.of(parameters))
        found = layer_similarity(documents=documents, checkpoint=base, settings=LayerSimilaritySettings.of(parameters))
        return Measured(base, found)
