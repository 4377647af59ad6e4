"""The two stages of MoE-LPR on a Lory model: new experts join the merge, the prior keeps the routing of known
languages.

    experts E..2E-1 = copies of 0..E-1, router rows too:  every copy halves the weight of its original, so the merged
                                                          network is the same for any input (docs/methods.md 1.1)
    stage 1   new experts and their router rows train on the expanded languages                next-token
    stage 2   only the new router rows train, on a little replay data of all languages         next-token + gamma *
                                    mean over segments of original languages of -log sum_{i < E} e_i

The old experts and router rows are parameters of their own without gradients. Since *all* old rows stay, the old
experts keep their proportions among each other: as far as the prior removes the new ones' weight, the merged network is
the original one. Therefore every expert gets a copy, not only some. An extended model is extended again in the same
way; all its experts are old ones then. Cost: twice the experts' memory; the merge costs 2E/T of the FFN instead of E/T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eclectus.models.checkpoints.door import open_model
from eclectus.models.checkpoints.proof import Probes, checked, logits_of
from eclectus.models.checkpoints.writing import save_model
from eclectus.models.lory.documents import sums_by_segment
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import NextToken, in_languages
from eclectus.models.losses.step import Loss, Objective, Pass, Term
from eclectus.models.staged_folder import staged_folder
from eclectus.models.training.instances import Batch


@dataclass(frozen=True)
class LoryExtensionReport:
    """The result of extending a Lory model, with the check that both compute the same."""

    experts_before: int
    experts: int
    max_abs_delta: float
    """Largest difference of any logit, in fp32, over the probes."""
    max_abs_logit: float
    tolerance: float


@torch.no_grad()
def extend_lory(
    lory_dir: str | Path, out_dir: str | Path, *, tolerance: float = 1e-4, probes: Tensor | None = None
) -> LoryExtensionReport:
    """Writes the Lory checkpoint with a copy of every expert and router row to `out_dir`, an empty or new directory.

    tolerance: largest difference of a logit as a share of the largest absolute logit (at least of 1). probes: token ids
    `[n, length]`; by default seeded random ones over three segments. Raises ValueError for a model without a router,
    StepZeroError above the tolerance; nothing is written then.
    """
    model = cast(LoryForCausalLM, open_model(lory_dir))
    before = model.config.num_experts
    if before < 2:
        raise ValueError(
            f"{lory_dir} has one expert and no router: it is dense, extend it as such (models/lory/dense.py)"
        )
    if probes is None:
        length = min(3 * model.config.segment_length, model.config.max_position_embeddings)
        probes = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    on = Probes.of(probes)
    expected = logits_of(model, on)
    for layer in model.model.layers:
        layer.mlp.experts = nn.Parameter(torch.cat([layer.mlp.experts, layer.mlp.experts]))
        layer.mlp.router.weight = nn.Parameter(torch.cat([layer.mlp.router.weight, layer.mlp.router.weight]))
    model.config.num_experts, model.config.original_experts = 2 * before, before
    model.config.extension_trained = False
    with staged_folder(Path(out_dir)) as partial:
        save_model(model, partial, Path(lory_dir))
        # What counts is what was written.
        ours = logits_of(open_model(partial), on)
        proof = checked(
            f"the Lory model with {before} more experts differs from {lory_dir}", ours, expected, tolerance, on
        )
    return LoryExtensionReport(before, 2 * before, proof.max_abs_delta, proof.max_abs_logit, tolerance)


class _Joined(nn.Module):
    """Old and new rows as one tensor: `[E, ...]` and `[M, ...]` to `[E + M, ...]`."""

    def __init__(self, old: int) -> None:
        super().__init__()
        self.old = old

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        # In bf16 training the old ones are held in bf16.
        return torch.cat([old, new.to(old.dtype)])

    def right_inverse(self, both: Tensor) -> tuple[Tensor, Tensor]:
        return both[: self.old].clone(), both[self.old :].clone()


def split_lory(model: LoryForCausalLM, stage: Literal["post_pretrain", "review"]) -> LoryForCausalLM:
    """Splits old from new experts and router rows, in place; only parameters that the stage trains get gradients.

    Raises ValueError if the model is not an extended one.
    """
    old = getattr(model.config, "original_experts", 0)
    if not 0 < old < model.config.num_experts:
        raise ValueError("the Lory model has no new experts to train: extend_lory makes a checkpoint that has")
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.frozen_experts = old
        for module, name in ((layer.mlp, "experts"), (layer.mlp.router, "weight")):
            parametrize.register_parametrization(module, name, _Joined(old))
            parts = module.parametrizations[name]
            parts.original0.requires_grad_(False)
            parts.original1.requires_grad_(stage == "post_pretrain" or name == "weight")
    return model


def save_lory(model: LoryForCausalLM, out: str | Path, side_files: str | Path) -> None:
    """Joins a split model, in place, and writes it with the tokenizer of `side_files`."""
    for layer in model.model.layers:
        parametrize.remove_parametrizations(layer.mlp, "experts")
        parametrize.remove_parametrizations(layer.mlp.router, "weight")
        layer.mlp.frozen_experts = 0
    model.config.extension_trained = True
    save_model(model.eval(), Path(out), Path(side_files))


def segment_prior_loss(
    router_weights: Sequence[Tensor],
    original_mask: Tensor,
    segment: int,
    old: int,
    segments: Tensor | None = None,
) -> Tensor:
    """Mean over layers and segments of -log of the old experts' weight, each segment weighted by its original tokens.

    router_weights: by layer, `[B, N, E]`. original_mask: `[B, L]`, true on tokens of original languages. segment: T.
    old: number of leading experts that are old. segments: of packed documents, as in LoryModelOutput. Returns 0, with
    zero gradient, if there are no original tokens.
    """
    dtype = torch.promote_types(router_weights[0].dtype, torch.float32)
    mask_BL1 = original_mask.to(dtype).unsqueeze(-1)
    share_BN = sums_by_segment(mask_BL1, segment, segments, router_weights[0].shape[1]).squeeze(-1)
    losses = []
    for weights_BNE in router_weights:
        prior_BN = -weights_BNE[..., :old].to(dtype).sum(-1).clamp_min(1e-9).log()
        losses.append((prior_BN * share_BN).sum() / share_BN.sum().clamp(min=1))
    return torch.stack(losses).mean()


class SegmentPrior(Loss):
    """`segment_prior_loss` over the tokens of original languages.

    original_languages: their numbers in the batch's labels.
    """

    name = "lpr_loss"

    def __init__(self, weight: float, original_languages: Sequence[int]) -> None:
        self.weight, self.languages = weight, original_languages

    def count(self, batch: Batch) -> Tensor:
        return in_languages(batch, self.languages).sum()

    def measure(self, done: Pass, statistic: Tensor | None) -> tuple[Tensor, dict[str, Term]]:
        original, config = in_languages(done.batch, self.languages), done.config
        segment = min(config.segment_length, original.shape[1])
        weights, segments = done.output.router_weights, done.output.segments
        return segment_prior_loss(weights, original, segment, config.original_experts, segments), {}


def post_pretrain_lory() -> Objective:
    """The objective of stage 1 on a Lory model; logs the new experts' share of the weight."""

    def new_expert_weight(done: Pass) -> dict[str, Term]:
        weights = torch.stack([layer.detach() for layer in done.output.router_weights])
        new = weights[..., done.config.original_experts :].sum(-1)
        return {"new_expert_weight": Term(new.sum(), new.new_full((), new.numel()))}

    return Objective([NextToken()], {"output_router_weights": True}, new_expert_weight)


def review_lory(gamma: float, original_languages: Sequence[int]) -> Objective:
    """The objective of stage 2 on a Lory model. original_languages: their numbers in the batch's labels."""
    return Objective([NextToken(), SegmentPrior(gamma, original_languages)], {"output_router_weights": True})
