"""Upcycling: a dense checkpoint becomes a mixture of experts that computes exactly the same (papers.md 2.1).

Expert 0 is the original feed-forward network, the others are copies. The proof, the largest difference of any logit on
fixed probes, is stored with the artifact; above the tolerance nothing is written.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field

from storage.artifact import Artifact, Draft
from storage.errors import EclectusError
from tasks.settings import Settings
from tasks.step import step


class UpcycleSettings(Settings):
    extension_experts: int = Field(
        4, ge=2, description="Experts in every layer after upcycling, the original one included."
    )
    extension_top_k: int = Field(2, ge=1, description="Experts that each token is sent to.")
    extension_init: Literal["copy", "noise", "drop"] = Field(
        "copy", description="New experts start as copies, as copies with noise, or half redrawn (Drop-Upcycling)."
    )
    upcycle_tolerance: float = Field(
        1e-4,
        gt=0,
        description="Largest difference of any logit to the dense model at step 0; above it nothing is written.",
    )
    seed: int = Field(0, description="Seed of everything random.")


@step(makes="checkpoint", version=1)
def upcycle(checkpoint: Artifact, settings: UpcycleSettings, out: Draft) -> None:
    """Upcycles a dense checkpoint to a stock mixture-of-experts checkpoint, with the proof."""
    from models.upcycle import StepZeroError
    from models.upcycle import upcycle as upcycle_checkpoint

    try:
        report = upcycle_checkpoint(
            Path(checkpoint.path),
            out.path,
            experts=settings.extension_experts,
            top_k=settings.extension_top_k,
            init=settings.extension_init,
            seed=settings.seed,
            tolerance=settings.upcycle_tolerance,
        )
    except (ValueError, StepZeroError) as error:
        raise EclectusError(str(error)) from error
    out.statistics = asdict(report)
