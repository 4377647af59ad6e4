"""What each method of extension does: what it starts from, what trains on which data, whether a review follows.

Only the standard library is imported: flows read the table to know their steps, before any PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "moe_lpr", "full", "lora", "llama_pro", "moe_all", "no_review", "no_lpr", "random_experts", "one_stage"
]

Stage = Literal["post_pretrain", "review", "all", "full"]


@dataclass(frozen=True)
class Recipe:
    """How a method extends a dense model; the defaults are MoE-LPR's."""

    title: str
    start: Literal["upcycled", "dense", "lora", "blocks"] = "upcycled"
    trained: Stage = "post_pretrain"
    """What trains in stage 1 of an upcycled model."""
    mixed: bool = False
    """Whether stage 1 also reads the review's data, with both losses."""
    reviewed: bool = True
    prior: bool = True
    """Whether the review has the language prior loss; without it gamma is 0."""
    random_experts: bool = False
    """Whether new experts are random (init "drop" with drop_ratio 1) instead of copies."""


RECIPES: dict[Method, Recipe] = {
    "moe_lpr": Recipe("MoE-LPR"),
    "full": Recipe("full fine-tuning", start="dense", trained="full", reviewed=False),
    "lora": Recipe("LoRA", start="lora", reviewed=False),
    "llama_pro": Recipe("LLaMA-Pro", start="blocks", reviewed=False),
    "moe_all": Recipe("MoE, all trained", trained="all", reviewed=False),
    "no_review": Recipe("MoE-LPR without review", reviewed=False),
    "no_lpr": Recipe("MoE-LPR, review without LPR", prior=False),
    "random_experts": Recipe("MoE-LPR, random new experts", random_experts=True),
    "one_stage": Recipe("MoE-LPR in one stage", mixed=True, reviewed=False),
}


def recipe_of(method: str) -> Recipe:
    """The recipe of that name. Raises ValueError naming the existing ones."""
    if method not in RECIPES:
        raise ValueError(f"unknown extension method {method!r}: choose {', '.join(RECIPES)}")
    return RECIPES[method]
