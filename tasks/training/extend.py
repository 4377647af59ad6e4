"""Extension to new languages: MoE-LPR's two training stages, baselines and ablations (docs/methods.md 2.2, 2.3, 2.5).

    post_pretrain   new experts and routers learn the expanded languages     next-token + alpha * balance
    review          the routers alone train on a replay of all languages     next-token + gamma * LPR

The original weights are parameters without gradients, so they cannot change; a hash of all weights that do not train is
still checked at every checkpoint, and a change ends the training. A Lory model is trained in the same two stages with
its own losses (models/extension/lory.py). Other values of `extension_method` are the baselines and ablations of
models/extension/methods.py, which share data, steps and everything else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.first_losses import keep_first_losses
from eclectus.tasks.packing.tokenizer import load_tokenizer
from eclectus.tasks.packing.tokenizer_training import labelled_sample
from eclectus.tasks.run import notify
from eclectus.tasks.step import step
from eclectus.tasks.training.extend_settings import ExtendStageSettings, recipe_of
from eclectus.tasks.training.extend_stage import train_stage
from eclectus.tasks.training.run_training import resume_directory, run_training

MASS_ROWS, ROW_TOKENS = 64, 128


@step(makes="checkpoint", version=5)
def extend(
    instances: Artifact,
    checkpoint: Artifact,
    settings: ExtendStageSettings,
    out: Draft,
    review: Artifact | None = None,
    documents: Artifact | None = None,
) -> None:
    """Trains one stage from the given checkpoint and writes a stock checkpoint.

    review: the instances of the review, for the method that trains on them in its only stage. documents: if the
    vocabulary was extended, those on whose original text it is measured what new words take of the probability.
    """
    if recipe_of(settings.extension_method).mixed and review is None:
        raise EclectusError(
            f"extension_method {settings.extension_method} needs the review's instances as well as the others"
        )
    if settings.extend_stage == "review":
        notify("review", _repeats(settings, instances))
    settings.note_precision()
    with resume_directory("extend", instances, checkpoint, review, settings.key_values()) as work:
        out.statistics = run_training(
            settings,
            train_stage,
            {
                "instances": instances.path,
                "review": review.path if review else None,
                "original": _original_text(documents, checkpoint, work) if documents else None,
                "checkpoint": checkpoint.path,
                "settings": settings.model_dump(),
                "work": str(work),
                "out": str(out.path),
            },
            what=f"training {settings.extend_stage.replace('_', '-')}",
        )
        keep_first_losses(work, instances)
    if settings.extend_stage == "review":
        out.statistics["training_flops"] += checkpoint.statistics.get("training_flops", 0)


def _repeats(settings: ExtendStageSettings, instances: Artifact) -> str:
    """How often the review reads what it has, and how much of it is text of the original languages."""
    packed, read = instances.statistics, settings.review_steps * settings.review_batch
    by_language = packed.get("tokens_by_language", {})
    known = sum(size for language, size in by_language.items() if language in settings.original_languages)
    return (
        f"the review reads its {packed['instances']:,} instances {read / max(1, packed['instances']):.3g} times "
        f"({settings.review_steps} steps of {settings.review_batch}); {known:,} of their "
        f"{sum(by_language.values()):,} tokens are of the original languages"
    )


def _original_text(documents: Artifact, checkpoint: Artifact, work: Path) -> str:
    """A file with token ids [rows, ROW_TOKENS] of text of the original languages, held out if some is."""
    from eclectus.tasks.packing.text_tokens import TextTokens

    encode, rows = TextTokens(load_tokenizer(checkpoint.path)), list[list[int]]()
    for split in ("heldout", "train"):
        for _, text in labelled_sample(documents, 4 * MASS_ROWS * ROW_TOKENS, split, "original"):
            ids = encode([text])[0]
            rows += [ids[at : at + ROW_TOKENS] for at in range(0, len(ids) - ROW_TOKENS + 1, ROW_TOKENS)]
        if rows:
            break
    path = work / "original_text.npy"
    np.save(path, np.array(rows[:MASS_ROWS], np.int64).reshape(-1, ROW_TOKENS))
    return str(path)
