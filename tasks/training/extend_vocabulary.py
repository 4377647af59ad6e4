"""Extend vocabulary: rows in a model's embeddings and output layer for the new tokens of its tokenizer.

Each new row is the mean of the rows of the token's pieces; nothing else of the model changes, which is verified before
anything is kept (models/extension/new_rows.py). What fewer tokens save is stored with the artifact: tokens and bytes of
KV cache per kilobyte of text, before and after, by language.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.run import metric
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.upcycle import UpcycleSettings

CACHE_BYTES = 2
"""Of a number in the KV cache, in bfloat16."""


class ExtendVocabularySettings(Settings):
    upcycle_tolerance: float = Field(
        1e-4, gt=0, description=UpcycleSettings.model_fields["upcycle_tolerance"].description
    )


@step(makes="checkpoint", version=1)
def extend_vocabulary(
    checkpoint: Artifact, tokenizer: Artifact, settings: ExtendVocabularySettings, out: Draft
) -> None:
    """Writes the checkpoint with a row for each new token. tokenizer: of the step `extend_tokenizer`."""
    from eclectus.models.checkpoints.proof import StepZeroError
    from eclectus.models.extension.new_rows import add_new_rows

    try:
        made = add_new_rows(checkpoint.path, tokenizer.path, out.path, settings.upcycle_tolerance)
    except (ValueError, StepZeroError) as error:
        raise EclectusError(f"extension_vocabulary: {error}") from error
    config = json.loads(out.file("config.json").read_text("utf-8"))
    out.statistics = asdict(made) | {"languages": costs_by_language(config, tokenizer.statistics["bytes_per_token"])}
    for language, each in out.statistics["languages"].items():
        for name in ("tokens_per_kilobyte", "cache_bytes_per_kilobyte"):
            metric(f"{name}_before", each[name][0], language=language)
            metric(name, each[name][1], language=language)


def costs_by_language(config: dict[str, Any], bytes_per_token: dict[str, list[float]]) -> dict[str, Any]:
    """Language -> tokens, and bytes of KV cache, for 1,000 bytes of text, [before, after].

    config: the model's config.json. bytes_per_token: [before, after] by language.
    """
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * CACHE_BYTES * config["num_hidden_layers"] * heads * width
    return {
        language: {
            "bytes_per_token": both,
            "tokens_per_kilobyte": [round(1000 / each, 1) for each in both],
            "cache_bytes_per_kilobyte": [round(1000 / each * cache) for each in both],
        }
        for language, both in bytes_per_token.items()
    }
