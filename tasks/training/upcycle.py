"""Upcycling: a dense checkpoint becomes a mixture of experts that computes exactly the same (docs/methods.md 2.1).

Expert 0 is the original feed-forward network, the others are copies. The proof, the largest difference of any logit on
fixed probes, is stored with the artifact; above the tolerance nothing is written.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import BASIC, SEED, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.layer_similarity import RESULT

if TYPE_CHECKING:
    from eclectus.models.mixture.upcycle import UpcycleReport


class UpcycleSettings(Settings):
    extension_experts: int = Field(
        4,
        ge=2,
        description="Experts in every layer after upcycling, the original one included. A model that was extended before gets this "
        "many less one beside those it has; a Lory model gets a copy of each of its experts.",
        json_schema_extra=BASIC,
    )
    extension_experts_per_layer: list[int] = Field(
        [],
        description="Experts of each layer, where they shall differ; such a model opens with this package only, since the stock classes "
        "hold one number for all layers. Empty: extension_experts in every layer.",
    )
    extension_top_k: int = Field(2, ge=1, description="Experts that each token is sent to.")
    extension_init: Literal["copy", "noise", "drop"] = Field(
        "copy", description="New experts start as copies, as copies with noise, or partly redrawn (Drop-Upcycling)."
    )
    extension_noise_scale: float = Field(
        0.01,
        gt=0,
        description="Size of the noise of extension_init 'noise', as a part of each matrix's standard deviation.",
    )
    extension_drop_ratio: float = Field(
        0.5, gt=0, le=1, description="Part of an expert's inner dimensions that extension_init 'drop' redraws."
    )
    upcycle_tolerance: float = Field(
        1e-4,
        gt=0,
        description="Largest difference of any logit to the dense model at step 0, as a part of the largest logit (at least of 1); "
        "above it nothing is written.",
    )
    seed: int = SEED

    def check_together(self) -> None:
        super().check_together()
        source = "extension_experts_per_layer" if self.extension_experts_per_layer else "extension_experts"
        fewest = min(self.extension_experts_per_layer or [self.extension_experts])
        if fewest < 2:
            raise EclectusError(f"{source} holds {fewest}; every layer needs the original expert and a new one")
        if self.extension_top_k > fewest:
            raise EclectusError(f"extension_top_k {self.extension_top_k} is more than {source} {fewest}; lower it")


@step(makes="checkpoint", version=2)
def upcycle(checkpoint: Artifact, settings: UpcycleSettings, out: Draft, similarity: Artifact | None = None) -> None:
    """Upcycles a dense checkpoint to a stock mixture-of-experts checkpoint, with the proof.

    similarity: where given, its proposal of new experts for each layer takes the place of one number for all.
    """
    experts = None
    if similarity is not None:
        experts = [new + 1 for new in json.loads(similarity.file(RESULT).read_text())["new_experts"]]
    out.statistics = asdict(upcycle_folder(Path(checkpoint.path), out.path, settings, experts))


def upcycle_folder(
    base: Path, out: Path, settings: UpcycleSettings, experts: list[int] | None = None, trust_remote_code: bool = False
) -> UpcycleReport:
    """Upcycles the checkpoint in a folder or .gguf file. experts: of each layer, instead of the settings' own.

    Raises EclectusError naming what is wrong with base or settings, or by how much the result differs from the base.
    """
    from eclectus.models.mixture.upcycle import StepZeroError
    from eclectus.models.mixture.upcycle import upcycle as upcycle_checkpoint

    try:
        return upcycle_checkpoint(
            base,
            out,
            experts=experts or settings.extension_experts_per_layer or settings.extension_experts,
            top_k=settings.extension_top_k,
            init=settings.extension_init,
            seed=settings.seed,
            tolerance=settings.upcycle_tolerance,
            noise_scale=settings.extension_noise_scale,
            drop_ratio=settings.extension_drop_ratio,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, StepZeroError) as error:
        raise EclectusError(str(error)) from error
