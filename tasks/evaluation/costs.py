"""What a model cost beside what it scored: FLOPs and seconds of its training, all and active parameters.

Read from the statistics of the checkpoint (tasks/training/pretrain.py and extend.py). Models that were not trained
here, and checkpoints of versions before, have no costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from eclectus.storage.artifact import Artifact

CONTROL = "dense_equal_flops"


@dataclass(frozen=True)
class Cost:
    """step, attention: FLOPs of a training step, all of it and the part of attention. tokens: of a step.

    training: FLOPs of all steps, of pre-training with the dense warm-up, of an extension with both stages.
    cpu_seconds: over all processes; gpu_seconds: None on CPU. Both are of the last stage alone.
    """

    parameters: int
    active: int
    step: int
    attention: int
    training: int
    cpu_seconds: float
    gpu_seconds: float | None
    tokens: int

    @property
    def products(self) -> int:
        return self.step - self.attention

    def relative(self, other: Cost) -> float:
        """Matrix products per token, divided by the other's (models/training/flops.py: the stricter ratio)."""
        return self.products / self.tokens / (other.products / other.tokens)

    def relative_with_attention(self, other: Cost) -> float:
        return self.step / self.tokens / (other.step / other.tokens)


def read_costs(checkpoints: dict[str, Artifact]) -> dict[str, Cost]:
    """By model, of those whose checkpoint says what it cost."""
    costs = {}
    for name, checkpoint in checkpoints.items():
        about = checkpoint.statistics
        if "flops_per_step" in about:
            costs[name] = Cost(
                about["parameters"],
                about["active_parameters"],
                about["flops_per_step"],
                about["attention_flops_per_step"],
                about["training_flops"],
                about["cpu_seconds"],
                about.get("gpu_seconds"),
                about["tokens"] // about["steps"],
            )
    return costs


def times(cost: Cost, other: Cost) -> str:
    """'1.48 times (1.27 with attention)'."""
    return f"{cost.relative(other):.2f} times ({cost.relative_with_attention(other):.2f} with attention)"


def flops(value: float) -> str:
    """FLOPs in a unit that fits: 785e6 is '785 MFLOPs'."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}FLOPs"
    return f"{value:.0f} FLOPs"
