"""The mixture of merged experts that replaces a LLaMA layer's FFN (docs/methods.md 1.1, 1.2, 1.4).

A layer computes in one of three ways: all segments at once (training and prefill); step by step with a cache, within a
segment or across its border; or with one merged FFN for everything (prompt routing, or weights given by the caller).

Shapes: B rows, L tokens, N segments of T tokens, D width, F FFN width, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LoryConfig
from .documents import DocumentPlan
from .merge import apply_merged, merge_experts, merged_ffn
from .routing import LoryCache, LoryCacheLayer, RoutingPlan


class LoryRouter(nn.Linear):
    """Mixture weights from mean hidden states: softmax of one linear map, in at least fp32."""

    def __init__(self, config: LoryConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)

    def forward(self, mean: Tensor) -> Tensor:
        """`[..., D]` to `[..., E]`."""
        dtype = torch.promote_types(mean.dtype, torch.float32)
        with torch.autocast(mean.device.type, enabled=False):
            return F.linear(mean.to(dtype), self.weight.to(dtype)).softmax(dim=-1)


class LoryFFN(nn.Module):
    """E expert FFNs in one parameter `[E, 3F, D]` (models/lory/merge.py) and their router."""

    def __init__(self, config: LoryConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.block_bytes = config.merge_block_bytes
        # Leading experts that are frozen in training (models/extension/lory.py).
        self.frozen_experts = 0
        self.experts = nn.Parameter(torch.empty(config.num_experts, 3 * config.intermediate_size, config.hidden_size))
        self.router = LoryRouter(config) if config.num_experts > 1 else None

    def forward(
        self, x: Tensor, plan: RoutingPlan, expert_weights: Tensor | None = None, cache: LoryCache | None = None
    ) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`. expert_weights: `[layers, B or 1, E]`, used instead of the router's."""
        if self.router is None or plan.routing == "dense":
            return apply_merged(x, self.experts[:1])
        if cache is None:
            return self._fixed(x, expert_weights) if expert_weights is not None else self._by_segment(x, plan)
        layer = cache.layer(self.layer_idx)
        expert_weights = cache.expert_weights if expert_weights is None else expert_weights
        if expert_weights is None and cache.generation_routing == "segment":
            return self._by_segment(x, plan, layer) if layer.weights is None else self._continue(x, plan, layer)
        if layer.merged is None:
            if expert_weights is None:
                weights = self._route(plan.prompt_mean(x, cache.prompt_length))
            else:
                weights = expert_weights[self.layer_idx]
            layer.merged = self._merge(weights, x)
        return apply_merged(x, layer.merged)

    def _route(self, mean: Tensor) -> Tensor:
        """Mixture weights `[..., E]` from mean hidden states `[..., D]`."""
        assert self.router is not None, "a layer of one expert does not route"
        return self.router(mean)

    def _merge(self, weights: Tensor, x: Tensor) -> Tensor:
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else self.experts.dtype
        return merge_experts(weights.to(x.device), self.experts).to(dtype)

    def _fixed(self, x: Tensor, expert_weights: Tensor) -> Tensor:
        weights = expert_weights[self.layer_idx].to(x.device).expand(x.shape[0], -1)
        return self._merged(x, weights)

    def _merged(self, x: Tensor, weights: Tensor) -> Tensor:
        return merged_ffn(x, weights, self.experts, self.block_bytes, self.frozen_experts)

    def _by_segment(self, x: Tensor, plan: RoutingPlan, layer: LoryCacheLayer | None = None) -> Tensor:
        x_BNTD = plan.to_segments(x)
        if plan.real is None and layer is None:
            weights = plan.shift(self._route(x_BNTD.mean(dim=2)))
        else:
            sums = plan.segment_sums(x_BNTD)
            sizes = plan.segment_sizes(sums)
            weights = plan.shift(self._route(sums / sizes.clamp(min=1)))
            if layer is not None:
                self._remember(layer, plan, weights, sums, sizes)
        if plan.routing == "prefix" and x_BNTD.shape[1] > 2 and not isinstance(plan, DocumentPlan):
            # All segments but the first share one mixture: merge it once per row.
            first = self._merged(x_BNTD[:, :1], weights[:, :1])
            rest = self._merged(x_BNTD[:, 1:].flatten(1, 2), weights[:, 1])
            return plan.from_segments(torch.cat([first, rest.view_as(x_BNTD[:, 1:])], dim=1))
        return plan.from_segments(self._merged(x_BNTD, weights))

    def _remember(self, layer: LoryCacheLayer, plan: RoutingPlan, weights: Tensor, sums: Tensor, sizes: Tensor) -> None:
        """Stores the state of each row's last segment, which generation continues."""
        last = torch.tensor([(start + plan.length - 1) // plan.segment_length for start in plan.starts])
        rows, last = torch.arange(sums.shape[0], device=sums.device), last.to(sums.device)
        layer.weights = weights[rows, last]
        # The sum grows token by token, which bf16 would round away.
        layer.segment_sum, layer.segment_count = (t[rows, last].to(weights.dtype) for t in (sums, sizes))

    def _continue(self, x: Tensor, plan: RoutingPlan, layer: LoryCacheLayer) -> Tensor:
        """New tokens after a cached past, processed piece by piece between the segment borders of all rows."""
        assert layer.weights is not None and layer.segment_sum is not None and layer.segment_count is not None
        if layer.merged is None:
            layer.merged = self._merge(layer.weights, x)
        T, length = plan.segment_length, x.shape[1]
        borders = {0, length} | {at for start in plan.starts for at in range(-start % T, length, T)}
        outputs = []
        for begin, end in zip(sorted(borders), sorted(borders)[1:], strict=False):
            positions = [start + begin for start in plan.starts]
            crossing = [row for row, at in enumerate(positions) if at > 0 and at % T == 0]
            if crossing:
                self._cross(x, plan, layer, crossing, positions)
            piece = x[:, begin:end]
            outputs.append(apply_merged(piece, layer.merged))
            if plan.mask is None:
                layer.segment_sum = layer.segment_sum + piece.sum(dim=1)
                layer.segment_count = layer.segment_count + (end - begin)
            else:
                real = plan.mask[:, begin:end, None]
                layer.segment_sum = layer.segment_sum + (piece * real).sum(dim=1)
                layer.segment_count = layer.segment_count + real.sum(dim=1)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _cross(
        self, x: Tensor, plan: RoutingPlan, layer: LoryCacheLayer, rows: list[int], positions: list[int]
    ) -> None:
        """Routes the rows that cross a border by the segment that ends there, and starts their new segment."""
        assert layer.weights is not None and layer.segment_sum is not None and layer.segment_count is not None
        assert layer.merged is not None
        leaving = torch.tensor(rows, device=x.device)
        routed = [row for row in rows if plan.routing == "causal_segment" or positions[row] == plan.segment_length]
        if routed:
            by = leaving if routed == rows else torch.tensor(routed, device=x.device)
            weights = self._route(layer.segment_sum[by] / layer.segment_count[by].clamp(min=1))
            layer.weights = layer.weights.index_copy(0, by, weights)
            if len(routed) == x.shape[0]:
                layer.merged = self._merge(weights, x)
            else:
                layer.merged = layer.merged.index_copy(0, by, self._merge(weights, x))
        layer.segment_sum = layer.segment_sum.index_fill(0, leaving, 0)
        layer.segment_count = layer.segment_count.index_fill(0, leaving, 0)
