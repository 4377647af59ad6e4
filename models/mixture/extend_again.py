"""Extending an extended model again: adds experts to a model; all experts that it already has are frozen from then on.

    experts 0..N-1 stay;  experts N..N+M-1 = copies of expert 0;  one router row each, `[N + M, hidden]`
    per layer:  minimise |r|^2 + big * sum over tokens of max(0, r.x - (t - margin))^2        t = K-th largest logit

The first upcycling equals its base for any router, since all its experts are copies of one. Here experts differ, and
no row r keeps a new expert out of the top K for *every* input: without a bias, r.x would have to stay below the K-th
largest w_i.x for all x, so r would lie in the convex hull of the rows {w_j : j != i} for each i (K >= 2); these hulls
are faces of one simplex if the N rows are linearly independent, and such faces have no point in common. So the rows are
fitted: on `calibration`, text of the languages that the model knows, they keep new experts out of the top K by
`margin`, as far as such rows can. Two checks follow. With the old experts alone the logits are equal (within rounding,
on all of the text). As routed, the share of tokens that choose a new expert, and the change of the loss, are measured
on held-out calibration text; above `largest_share` nothing is written. The rows are as short as possible: text unlike
the calibration text, such as that of new languages, can reach the new experts from the first step, encouraged by the
balance loss. The review later pulls known text back to the old experts.

To train: `split_experts(model, frozen=N)`, then the two stages as usual, the prior loss with `original_experts=N`.
Cost: the model in memory, a forward pass over the calibration text, and a few solves of a hidden x hidden system per
layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eclectus.models.checkpoints.door import open_model
from eclectus.models.checkpoints.families import MATRICES, Family, moe_family_of
from eclectus.models.checkpoints.proof import StepZeroError
from eclectus.models.checkpoints.side_files import REPORT
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSpec, read_config
from eclectus.models.checkpoints.writing import write_checkpoint
from eclectus.models.losses.objectives import next_token_loss
from eclectus.models.mixture.experts import moe_blocks
from eclectus.models.staged_folder import require_new_folder, staged_folder

# One in this many rows of the calibration text is held out.
HELD_OUT = 4
NEWTON_STEPS = 50


@dataclass(frozen=True)
class ExtendAgainReport:
    """Comparison of the extended model with the one before; appended to upcycle.json as `extended`."""

    experts_before: tuple[int, ...]
    """Experts per layer before, which are all frozen from then on."""
    experts: int
    margin: float
    tolerance: float
    max_abs_delta: float
    """Largest difference of any logit to the model before, with routing restricted to the old experts, on all text."""
    new_chosen_share: float
    """Share of (token, layer) pairs with a new expert among the top K, on the text that the rows were fitted on."""
    kept_back_chosen_share: float
    """The same on the held-out quarter of the text."""
    kept_back_loss: tuple[float, float]
    """Next-token loss on that quarter in nats, of the model before and of this one, as routed."""


@torch.no_grad()
def extend_again(
    moe_dir: str | Path,
    out_dir: str | Path,
    *,
    new_experts: int,
    calibration: Tensor,
    margin: float = 0.5,
    tolerance: float = 1e-4,
    largest_share: float = 0.05,
    seed: int = 0,
) -> ExtendAgainReport:
    """Writes the upcycled checkpoint `moe_dir` with `new_experts` more experts in every layer to `out_dir`.

    calibration: token ids `[n >= 4, length]` of text in the languages that the model knows; a quarter is held out to
    measure on. margin: distance of a new expert's logit below the K-th largest, in nats. tolerance: largest difference
    of a logit over the old experts, as a share of the largest absolute logit (at least of 1). largest_share: largest
    share of held-out (token, layer) pairs that may choose a new expert.
    Raises ValueError for the settings, StepZeroError above the tolerance or the share.
    """
    moe_dir, out_dir = Path(moe_dir), Path(out_dir)
    config = read_config(moe_dir)
    family = moe_family_of(config, moe_dir)
    if new_experts < 1:
        raise ValueError(f"new_experts is {new_experts}: choose 1 or more")
    if calibration.dim() != 2 or len(calibration) < HELD_OUT:
        raise ValueError(f"calibration has shape {tuple(calibration.shape)}, expected [{HELD_OUT} or more, length]")
    require_new_folder(out_dir)
    before = config.get("experts_per_layer") or [int(config["num_local_experts"])] * config["num_hidden_layers"]
    held_out, fitted = calibration[::HELD_OUT], calibration[_rest(len(calibration))]
    model = open_model(moe_dir)
    rows = _calibrated_rows(model, fitted, new_experts, margin, seed)
    wider = config | {"num_local_experts": max(before) + new_experts}
    if "experts_per_layer" in config:
        wider["experts_per_layer"] = [count + new_experts for count in before]
    with staged_folder(out_dir) as partial:
        _write(moe_dir, partial, wider, family, before, rows)
        result = open_model(partial)
        fit, held = _compare(model, result, fitted, before), _compare(model, result, held_out, before)
        delta = _checked_delta(fit, held, new_experts, tolerance, largest_share)
        report = ExtendAgainReport(
            tuple(before),
            max(before) + new_experts,
            margin,
            tolerance,
            delta,
            fit.chosen,
            held.chosen,
            (held.old_loss, held.loss),
        )
        _write_report(moe_dir, partial, report)
    return report


def _rest(count: int) -> Tensor:
    return torch.tensor([row for row in range(count) if row % HELD_OUT])


def _calibrated_rows(model: PreTrainedModel, tokens: Tensor, count: int, margin: float, seed: int) -> list[Tensor]:
    """By layer, router rows `[count, hidden]` whose logits stay below the K-th largest on these tokens."""
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.gate.register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.__setitem__(layer, args[0].detach().flatten(0, -2).double())
        )
        for layer, block in moe_blocks(model)
    ]
    seen: dict[int, list[Tensor]] = {}
    for row in tokens:
        model(input_ids=row[None], use_cache=False)
        for layer, x in inputs.items():
            seen.setdefault(layer, []).append(x)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(seed)
    top_k = model.config.num_experts_per_tok
    rows = []
    for layer, block in moe_blocks(model):
        x_TH = torch.cat(seen[layer])
        limit_T = (x_TH @ block.gate.weight.double().T).topk(top_k, dim=-1).values[:, -1]
        row_H = shortest_row_below(x_TH, limit_T - margin)
        # Rows differ a little: equal ones would always learn the same.
        noise = torch.randn(count, x_TH.shape[1], generator=generator, dtype=torch.float64)
        noise *= margin / 4 / (x_TH @ noise.T).abs().amax(0).clamp_min(1e-9).unsqueeze(-1)
        rows.append((row_H + noise).float())
    return rows


def shortest_row_below(x_TH: Tensor, limit_T: Tensor) -> Tensor:
    """The shortest r with r.x <= limit for all tokens, up to a penalty; if there is none, that of least violation.

    x_TH `[T, H]` and limit_T `[T]` in float64. Newton's method on the squared excess: a step is exact for the tokens
    that exceed their limit now, and is shortened if it would make others exceed theirs.
    """
    hidden = x_TH.shape[1]
    weight = 1e-6 * x_TH.square().sum() / hidden

    def excess(row: Tensor) -> Tensor:
        return (x_TH @ row - limit_T).clamp_min(0).square().sum() + weight * row.square().sum()

    row_H = x_TH.new_zeros(hidden)
    now = excess(row_H)
    for _ in range(NEWTON_STEPS):
        over = x_TH @ row_H > limit_T
        x, limit = x_TH[over], limit_T[over]
        system = x.T @ x + weight * torch.eye(hidden, dtype=x_TH.dtype)
        step_H = torch.linalg.solve(system, x.T @ limit) - row_H
        tries = [row_H + step_H / 2**power for power in range(12)]
        best, value = min(((each, excess(each)) for each in tries), key=lambda pair: pair[1].item())
        if not value < now * (1 - 1e-9):
            break
        row_H, now = best, value
    return row_H


def _write(
    moe_dir: Path, out_dir: Path, config: dict[str, Any], family: Family, before: list[int], rows: list[Tensor]
) -> None:
    """Writes all tensors of `moe_dir` unchanged, new experts as copies of expert 0, and the longer routers."""
    count = len(rows[0])
    with CheckpointReader(moe_dir) as source:
        specs = list(source.specs.values())
        routers: dict[str, Tensor] = {}
        copied_from: dict[str, str] = {}
        for layer, new_rows in enumerate(rows):
            router = family.router_name(layer)
            own = source.specs[router]
            index = next(i for i, spec in enumerate(specs) if spec.name == router)
            specs[index] = TensorSpec(router, own.dtype, (own.shape[0] + count, own.shape[1]))
            routers[router] = torch.cat([source.tensor(router), new_rows.to(own.dtype)])
            for expert in range(before[layer], before[layer] + count):
                for matrix in MATRICES:
                    first = family.expert_name(layer, 0, matrix)
                    name = family.expert_name(layer, expert, matrix)
                    specs.append(TensorSpec(name, source.specs[first].dtype, source.specs[first].shape))
                    copied_from[name] = first

        def read(name: str) -> Tensor:
            return routers[name] if name in routers else source.tensor(copied_from.get(name, name))

        write_checkpoint(out_dir, config, specs, read, side_files=moe_dir)


@dataclass(frozen=True)
class _Comparison:
    delta: float
    scale: float
    chosen: float
    old_loss: float
    loss: float


def _compare(model: PreTrainedModel, result: PreTrainedModel, tokens: Tensor, before: list[int]) -> _Comparison:
    """Compares logits with routing restricted to the old experts, and loss and choices as routed, row by row."""
    rows = []
    for row in tokens[:, None]:
        expected = model(input_ids=row, use_cache=False).logits
        routed = result(input_ids=row, use_cache=False, output_router_logits=True)
        hooks = [block.gate.register_forward_hook(_restricted_to(before[layer])) for layer, block in moe_blocks(result)]
        old = result(input_ids=row, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        best = [logits.topk(model.config.num_experts_per_tok).indices for logits in routed.router_logits]
        new = [chosen >= old for chosen, old in zip(best, before, strict=True)]
        chosen = torch.stack(new).any(-1).float().mean()
        losses = [next_token_loss(logits, row) for logits in (expected, routed.logits)]
        rows.append(torch.stack([(old - expected).abs().max(), expected.abs().max(), chosen, *losses]))
    rows_RV = torch.stack(rows)
    delta, scale = rows_RV[:, :2].amax(0).tolist()
    return _Comparison(delta, scale, *rows_RV[:, 2:].mean(0).tolist())


def _checked_delta(
    fit: _Comparison, held: _Comparison, new_experts: int, tolerance: float, largest_share: float
) -> float:
    """The largest difference of a logit over old experts. Raises StepZeroError above a limit."""
    delta, scale = max(fit.delta, held.delta), max(1.0, fit.scale, held.scale)
    if not delta <= tolerance * scale:
        raise StepZeroError(
            f"with {new_experts} more experts a logit differs by {delta:.3g} though only old ones are used, where "
            f"{tolerance * scale:.3g} is allowed; nothing was written"
        )
    if not held.chosen <= largest_share:
        raise StepZeroError(
            f"{held.chosen:.1%} of held-out tokens would choose a new expert before training, where "
            f"{largest_share:.1%} is allowed; nothing was written. Give more calibration text, of the known languages "
            "only, or raise largest_share and rely on the review"
        )
    return delta


def _restricted_to(before: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A hook of the router that keeps the choice among the first `before` experts."""

    def route(_: nn.Module, __: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = output
        best = logits[..., :before].softmax(-1).topk(indices.shape[-1], dim=-1)
        return logits, (best.values / best.values.sum(-1, keepdim=True)).to(weights.dtype), best.indices

    return route


def _write_report(moe_dir: Path, out_dir: Path, report: ExtendAgainReport) -> None:
    path = moe_dir / REPORT
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    per_layer = [count + report.experts - max(report.experts_before) for count in report.experts_before]
    known |= {"experts": report.experts, "experts_per_layer": per_layer if len(set(per_layer)) > 1 else None}
    known |= {"extended": [*known.get("extended", []), asdict(report)], "trained": []}
    (out_dir / REPORT).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
