"""Models and steps of `lpr_claims.py` by size, chosen on the part `valid` of the held-out text (docs/log.md)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A base and how long everything trains. Batches are instances of `length` tokens."""

    name: str
    length: int
    shape: dict[str, int] | None
    """Of the Llama that is trained here; None for a pretrained base."""
    vocabulary: int
    base_steps: int
    base_batch: int
    base_rate: float
    foreign_share: float
    """Of the base's text in the expanded languages: web text is never of one language alone."""
    experts: int
    batch: int
    micro_batch: int
    stage1_steps: int
    stage1_rate: float
    alpha: float
    review_steps: int
    review_batch: int
    review_rate: float
    gamma: float
    review_share: float
    """Original-language tokens in the review, each counted once, over stage 1's."""
    review_ratio: float
    """Tokens of each expanded language in the review over those of each original one."""
    held_bytes: int
    task_limit: int
    """Questions of each lm-eval task: 0 for no tasks, -1 for all questions."""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Review:
    """Settings of a review. away: weight of -log(1 - G_0) on tokens of expanded languages, ours, beyond the paper."""

    gamma: float
    rate: float
    steps: int
    form: str = "paper"
    away: float = 0.0


SMALL = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
LAPTOP = Size(
    name="laptop",
    length=256,
    shape=SMALL,
    vocabulary=1024,
    base_steps=6000,
    base_batch=4,
    base_rate=4e-3,
    foreign_share=0.3,
    experts=6,
    batch=4,
    micro_batch=8,
    stage1_steps=600,
    stage1_rate=1e-3,
    alpha=0.01,
    review_steps=480,
    review_batch=2,
    review_rate=2e-2,
    gamma=0.1,
    review_share=0.009,
    review_ratio=2.0,
    held_bytes=240_000,
    task_limit=0,
)
TINY = dataclasses.replace(
    LAPTOP,
    name="tiny",
    length=128,
    shape=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2),
    vocabulary=512,
    base_steps=20,
    stage1_steps=8,
    review_steps=4,
    review_share=0.1,
    held_bytes=4_000,
    note="to see that everything works; the numbers mean nothing",
)
SMOLLM = dataclasses.replace(
    LAPTOP,
    name="smollm",
    length=512,
    shape=None,
    vocabulary=0,
    base_steps=0,
    foreign_share=0.0,
    batch=32,
    micro_batch=16,
    stage1_steps=300,
    stage1_rate=5e-4,
    review_steps=60,
    review_batch=32,
    review_rate=2e-3,
    gamma=0.5,
    held_bytes=60_000,
    task_limit=-1,
)
SMOLLM_SHORT = dataclasses.replace(
    SMOLLM,
    length=256,
    experts=2,
    batch=4,
    micro_batch=2,
    stage1_steps=16,
    review_steps=6,
    review_batch=4,
    review_share=0.1,
    held_bytes=8_000,
    task_limit=20,
    note="shortened run on a CPU: one new expert, few steps, few questions; no measure of the method",
)

# Of lpr_real.py: 2 million tokens of stage 1, on two cores.
REAL = dataclasses.replace(
    SMOLLM,
    name="real",
    experts=3,
    batch=8,
    micro_batch=2,
    stage1_steps=488,
    review_steps=60,
    review_batch=8,
    held_bytes=60_000,
    task_limit=500,
)


def size_of(name: str, cuda: bool) -> Size:
    """The size of that name; SmolLM2 without a GPU is shortened, and its note says so."""
    if name == "smollm" and not cuda:
        return SMOLLM_SHORT
    return {"laptop": LAPTOP, "tiny": TINY, "smollm": SMOLLM}[name]
