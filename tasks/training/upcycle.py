"""Upcycling: turns a dense checkpoint into a mixture of experts with equal logits (docs/methods.md 2.1).

Expert 0 is the original feed-forward network, the others are copies. The verification, the largest difference of any
logit on fixed probes, is stored with the artifact; above the tolerance nothing is written.
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
        description="Experts in every layer after upcycling, including the original one. An extended model gets one "
        "fewer than this in addition to its own; a Lory model gets a copy of each of its experts.",
        json_schema_extra=BASIC,
    )
    extension_experts_per_layer: list[int] = Field(
        [],
        description="Experts of each layer, if they differ; such a model loads with this package only, since the stock "
        "classes have one number for all layers. Empty: extension_experts in every layer.",
    )
    extension_top_k: int = Field(2, ge=1, description="Experts that each token is routed to.")
    extension_init: Literal["copy", "noise", "drop"] = Field(
        "copy",
        description="New experts start as copies, as copies with noise, or as partly reinitialised copies "
        "(Drop-Upcycling).",
    )
    extension_noise_scale: float = Field(
        0.01,
        gt=0,
        description="Noise of extension_init 'noise', as a fraction of each matrix's standard deviation.",
    )
    extension_drop_ratio: float = Field(
        0.5, gt=0, le=1, description="Share of an expert's inner dimensions that extension_init 'drop' reinitialises."
    )
    upcycle_tolerance: float = Field(
        1e-4,
        gt=0,
        description="Largest difference of any logit from the dense model at step 0, relative to the largest logit (at "
        "least 1); above it nothing is written.",
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
    """Upcycles a dense checkpoint to a stock mixture-of-experts checkpoint and stores the verification.

    similarity: if given, its proposed number of new experts per layer is used instead of one number for all.
    """
    experts = None
    if similarity is not None:
        experts = [new + 1 for new in json.loads(similarity.file(RESULT).read_text())["new_experts"]]
    out.statistics = asdict(upcycle_folder(Path(checkpoint.path), out.path, settings, experts))


def upcycle_folder(
    base: Path, out: Path, settings: UpcycleSettings, experts: list[int] | None = None, trust_remote_code: bool = False
) -> UpcycleReport:
    """Upcycles the checkpoint in a folder or .gguf file. experts: per layer, overriding the settings.

    Raises EclectusError naming what is wrong with base or settings, or by how much the result differs from the base.
    """
    from eclectus.models.checkpoints.proof import StepZeroError
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
