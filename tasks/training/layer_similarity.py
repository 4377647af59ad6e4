"""Similarity of languages in each layer of a dense model, and new experts per layer (LayerMoE, docs/methods.md 2.7).

A sample of each language's documents goes through the dense model; layers in which known and new languages are similar
get few new experts, the others many, `extension_expert_budget` in total. File: `similarity.json`.
Cost: one forward pass over `similarity_tokens` tokens per language, in this process.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import read_batches
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer
from eclectus.tasks.run import metric
from eclectus.tasks.settings import BASIC
from eclectus.tasks.step import step
from eclectus.tasks.training.check_base import open_checked

if TYPE_CHECKING:
    from torch import Tensor

RESULT = "similarity.json"
LENGTH = 128


class LayerSimilaritySettings(BeginSettings):
    """How similarity is measured and new experts are distributed over the layers."""

    extension_expert_budget: int = Field(
        0,
        ge=0,
        description="New experts in total over all layers, more where the new languages differ most from the known "
        "ones (LayerMoE). 0: extension_experts in every layer.",
        json_schema_extra=BASIC,
    )
    similarity_tokens: int = Field(
        16_384,
        ge=LENGTH,
        description="Tokens per language for measuring the similarity of languages in each layer.",
    )


@step(makes="report", version=3)
def layer_similarity(documents: Artifact, checkpoint: Artifact, settings: LayerSimilaritySettings, out: Draft) -> None:
    """Measures the similarity of known and new languages in each layer and distributes the budget of new experts.

    documents: with language, group and split. Raises EclectusError for a budget below one expert per layer and for a
    language without text.
    """
    from eclectus.models.mixture.layer_similarity import ffn_input_means, propose_experts
    from eclectus.models.mixture.layer_similarity import layer_similarity as similarity_by_layer

    tokens = load_tokenizer(checkpoint.path)
    samples, groups = _samples(documents, tokens, settings.begin(tokens), settings.similarity_tokens)
    known = sorted(language for language in samples if groups[language] == "original")
    new = sorted(language for language in samples if groups[language] == "expanded")
    model = open_checked(checkpoint.path, checkpoint.name)
    try:
        similarity = similarity_by_layer(ffn_input_means(model, samples), known, new)
        # Without a budget: three per layer, as with the default of four experts.
        proposal = propose_experts(similarity, settings.extension_expert_budget or 3 * len(similarity))
    except ValueError as error:
        raise EclectusError(str(error)) from error
    result = {
        "known": known,
        "new": new,
        "tokens": {language: rows.numel() for language, rows in sorted(samples.items())},
        "similarity": [round(value, 6) for value in similarity],
        "new_experts": proposal,
    }
    for layer, value in enumerate(similarity):
        metric("layer_similarity", value, layer=str(layer))
    out.file(RESULT).write_text(json.dumps(result, indent=1) + "\n")
    out.statistics = result


def _samples(
    documents: Artifact, tokenizer: Any, begin: list[int], tokens: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """By language, token ids `[n, LENGTH]` of the first training documents, and the language's group."""
    import torch

    ids: dict[str, list[int]] = defaultdict(list)
    encode = TextTokens(tokenizer)
    groups: dict[str, str] = {}
    for batch in read_batches(documents, ["text", "language", "group", "split"]):
        for text, language, group, split in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if split == "train" and group != "other" and len(ids[language]) < tokens:
                groups[language] = group
                ids[language] += [*begin, *encode([text])[0]]
    rows = {language: min(len(each), tokens) // LENGTH for language, each in ids.items() if language in groups}
    if short := sorted(language for language, count in rows.items() if count == 0):
        raise EclectusError(
            f"language '{short[0]}' has less than {LENGTH} tokens of training text to measure; add documents"
        )
    return {
        language: torch.tensor(ids[language][: count * LENGTH]).view(count, LENGTH) for language, count in rows.items()
    }, groups
