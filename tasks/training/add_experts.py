"""More experts for a model that has experts: an extended model (lifelong extension) or a Lory model.

All existing experts are frozen from then on. An extended model gets router rows that route text of its known languages
away from the new experts (models/mixture/extend_again.py); a Lory model gets a copy of each expert, which leaves the
merge unchanged (models/extension/lory.py). Both are verified before anything is written.
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
from eclectus.tasks.training.upcycle import UpcycleSettings

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["dense", "upcycled", "extended", "lory", "lory upcycled"]


class AddExpertsSettings(Settings):
    extension_experts: int = Field(
        4, ge=2, description=UpcycleSettings.model_fields["extension_experts"].description, json_schema_extra=BASIC
    )
    extension_calibration_tokens: int = Field(
        16_384,
        ge=1,
        description="Extending again: tokens of the known languages that the new router rows are fitted on.",
    )
    extension_largest_share: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Extending again: largest share of held-back known text that may be routed to a new expert before "
        "training.",
    )
    upcycle_tolerance: float = Field(
        1e-4, gt=0, description=UpcycleSettings.model_fields["upcycle_tolerance"].description
    )
    seed: int = SEED


def kind_of(checkpoint: Artifact) -> Kind:
    """What the model is: dense, upcycled but not trained yet, extended (upcycled and trained), or Lory likewise."""
    config = json.loads(checkpoint.file("config.json").read_text())
    if config.get("model_type") == "lory":
        return "lory upcycled" if config.get("original_experts") and not config.get("extension_trained") else "lory"
    if not config.get("upcycled_from"):
        return "dense"
    made = checkpoint.file("upcycle.json")
    trained = json.loads(made.read_text()).get("trained") if made.is_file() else None
    return "extended" if trained or not made.is_file() else "upcycled"


@step(makes="checkpoint", version=1)
def add_experts(instances: Artifact, checkpoint: Artifact, settings: AddExpertsSettings, out: Draft) -> None:
    """Adds experts to an extended or a Lory checkpoint. instances: of its known languages."""
    from eclectus.models.checkpoints.proof import StepZeroError
    from eclectus.models.extension.lory import extend_lory
    from eclectus.models.mixture.extend_again import extend_again

    try:
        if kind_of(checkpoint).startswith("lory"):
            out.statistics = asdict(extend_lory(checkpoint.path, out.path, tolerance=settings.upcycle_tolerance))
            return
        report = extend_again(
            checkpoint.path,
            out.path,
            new_experts=settings.extension_experts - 1,
            calibration=_calibration(instances, settings),
            tolerance=settings.upcycle_tolerance,
            largest_share=settings.extension_largest_share,
            seed=settings.seed,
        )
    except (ValueError, StepZeroError) as error:
        raise EclectusError(str(error)) from error
    out.statistics = asdict(report)


def _calibration(instances: Artifact, settings: AddExpertsSettings) -> Tensor:
    """Token ids [rows, length] of about `extension_calibration_tokens` tokens."""
    from eclectus.models.training.instances import Instances

    data = Instances(Path(instances.path))
    rows = min(len(data), max(4, settings.extension_calibration_tokens // data.length))
    return data.batch(data.rows_of_step(0, rows, settings.seed)).tokens
