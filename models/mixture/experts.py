"""The training form of an upcycled model: original experts are a frozen parameter, new ones a trainable one.

transformers 5 holds a layer's experts in one `[experts, ...]` parameter. A slice of a parameter cannot be frozen, and
with a masked gradient it still changes by AdamW's weight decay. So `SplitExperts` replaces that module during training:
the original experts are one frozen parameter, which no optimizer changes, and the new ones another. `join_experts`
restores the stock module, bit for bit.

A step costs as much as the stock grouped GEMM, less the weight gradients of the frozen experts; if only routers train,
no expert weight gradient is computed and the expert inputs are not kept. Tokens are sorted by expert, new ones first:

    rows of new experts | rows of frozen experts          forward and input gradient: one grouped GEMM over all
    \\___ weight gradient ___/                             a second one that ends where the frozen rows begin

The new and the frozen parameter are adjacent in one allocation, so that the one GEMM over both reads them in place. In
bf16 training the frozen ones are held in bf16, behind room for a cast of the new ones, made once in a forward pass. If
neither holds (FSDP gathers each separately) they are concatenated for the call and not kept. On CUDA, with sizes that
are multiples of 8, there is no loop over experts and no wait for the device.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eclectus.models.checkpoints.expected_tensors import EMBEDDINGS, HEAD
from eclectus.models.checkpoints.families import MATRICES, Family, dense_ffn, moe_family_of
from eclectus.models.checkpoints.tensor_files import TensorSource, TensorSpec, tensor_bytes
from eclectus.models.extension.split_vocabulary import original_rows, stored_parameters
from eclectus.models.mixture.grouped_gemm import combine_tokens, dispatch_tokens, expert_linear, room_for_new
from eclectus.models.training.parallel import item, reshard, whole

Stage = Literal["post_pretrain", "review", "all", "full"]


class Experts(Protocol):
    """What transformers' experts modules have in common, stock ones and SplitExperts."""

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter


class MoeBlock(Protocol):
    """A layer's mixture in transformers: the router, whose weight is `[experts, hidden]`, and the experts."""

    gate: nn.Linear
    experts: nn.Module


class SplitExperts(nn.Module):
    """The experts of one layer, `frozen` original ones and the rest new; replaces transformers' experts module.

    Parameters: `frozen_gate_up [F, 2I, H]`, `frozen_down [F, H, I]` and `new_gate_up [N, 2I, H]`, `new_down [N, H, I]`.
    Expert i of the router is frozen expert i for i < F, new expert i - F otherwise.
    """

    def __init__(self, stock: Any, frozen: int) -> None:
        """stock: an experts module of transformers (which have no common class)."""
        super().__init__()
        self.stock_class = type(stock)
        self.config = stock.config
        self.act_fn = stock.act_fn
        self.num_frozen = frozen
        self.num_experts = stock.num_experts
        self.frozen_gate_up = nn.Parameter(stock.gate_up_proj.detach()[:frozen].clone(), requires_grad=False)
        self.frozen_down = nn.Parameter(stock.down_proj.detach()[:frozen].clone(), requires_grad=False)
        self.new_gate_up = nn.Parameter(stock.gate_up_proj.detach()[frozen:].clone())
        self.new_down = nn.Parameter(stock.down_proj.detach()[frozen:].clone())
        self.share_storage()
        self.register_load_state_dict_post_hook(lambda module, _: module.share_storage())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[T, H]`, top_k_index and top_k_weights `[T, K]`; returns `[T, H]`."""
        x_TH, top_k = hidden_states, top_k_index.shape[-1]
        # New experts first, so that the weight gradient covers a prefix of the sorted rows.
        order_S = (top_k_index.reshape(-1) - self.num_frozen) % self.num_experts
        sorted_S, permutation_S = torch.sort(order_S, stable=True)
        boundaries = torch.arange(self.num_experts, device=sorted_S.device)
        ends_E = torch.searchsorted(sorted_S, boundaries, right=True, out_int32=True)
        x_SH = dispatch_tokens(x_TH.to(self._compute_dtype(x_TH)), permutation_S, top_k)
        gate_SI, up_SI = expert_linear(x_SH, self.new_gate_up, self.frozen_gate_up, ends_E).chunk(2, dim=-1)
        y_SH = expert_linear(self.act_fn(gate_SI) * up_SI, self.new_down, self.frozen_down, ends_E)
        return combine_tokens(y_SH, top_k_weights, permutation_S).to(hidden_states.dtype)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.new_gate_up.dtype

    def share_storage(self) -> None:
        """Moves each pair of parameters into one allocation, so that one GEMM reads both in place.

        Frozen experts that are held in another dtype than the new ones get room in front of them, into which the new
        ones are cast. This is for speed only; nothing happens if the parameters are not plain tensors of one device
        (FSDP, meta).
        """
        for new, frozen in ((self.new_gate_up, self.frozen_gate_up), (self.new_down, self.frozen_down)):
            plain = type(new.data) is Tensor and type(frozen.data) is Tensor and not new.is_meta
            if not plain or new.device != frozen.device:
                continue
            if new.dtype != frozen.dtype:
                frozen.data = room_for_new(new.data, frozen.data)
            else:
                both = torch.cat([new.data, frozen.data])
                new.data, frozen.data = both[: len(new)], both[len(new) :]

    def _apply(self, fn: Any, recurse: bool = True) -> "SplitExperts":
        super()._apply(fn, recurse)
        self.share_storage()
        return self

    def fused(self, matrix: Literal["gate_up", "down"]) -> Tensor:
        """Frozen and new experts in the router's order, as transformers stacks them; a copy."""
        if matrix == "gate_up":
            return torch.cat([self.frozen_gate_up.detach(), self.new_gate_up.detach()])
        return torch.cat([self.frozen_down.detach(), self.new_down.detach()])


def split_experts(model: PreTrainedModel, frozen: int | Sequence[int] = 1) -> PreTrainedModel:
    """Replaces every layer's experts by SplitExperts with `frozen` original experts, in place; the function is the
    same.

    frozen: number of leading experts that are original, one for all layers or one per layer; more than 1 when an
        extended model is extended again.
    Raises ValueError if the model is not an upcycled one, is split already, or has no more than `frozen` experts.
    """
    moe_family_of(model.config.to_dict(), "this model")
    for layer, block in moe_blocks(model):
        if isinstance(block.experts, SplitExperts):
            raise ValueError("the model's experts are split already; join_experts(model) first to split otherwise")
        count, kept = count_experts(block), frozen if isinstance(frozen, int) else frozen[layer]
        if not 1 <= kept < count:
            raise ValueError(f"frozen is {kept}, layer {layer} has {count} experts: choose 1 to {count - 1}")
        block.experts = SplitExperts(block.experts, kept)
    return model


def join_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Restores the stock experts, in place, with bit-identical weights; the inverse of split_experts."""
    for _, block in moe_blocks(model):
        split = block.experts
        if not isinstance(split, SplitExperts):
            raise ValueError("the model's experts are not split; nothing to join")
        with torch.device("meta"):
            stock = split.stock_class(split.config)
        stock.gate_up_proj = nn.Parameter(split.fused("gate_up"))
        stock.down_proj = nn.Parameter(split.fused("down"))
        block.experts = stock.train(split.training)
    return model


def moe_blocks(model: nn.Module) -> Iterator[tuple[int, MoeBlock]]:
    """(layer, MoE block) over the layers that have one. Raises ValueError if there is none."""
    layers = getattr(getattr(model, "model", None), "layers", [])
    blocks = [(i, layer.mlp) for i, layer in enumerate(layers) if hasattr(getattr(layer, "mlp", None), "experts")]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no MoE layer; expected an upcycled model")
    yield from blocks


def count_experts(block: MoeBlock) -> int:
    """Number of experts of a block, stock or split."""
    return cast(Experts, block.experts).num_experts


def set_trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Sets which parameters train; returns their names, in the model's order.

    `post_pretrain`: new experts and routers (docs/methods.md 2.2).  `review`: routers only (2.3).
    `all`: everything in an upcycled model, the original experts too (the baseline "MoE, all trained").
    `full`: everything in a dense model (the baseline "full fine-tuning").
    The shared expert of zeros, which Qwen2Moe requires, is never trained.
    Raises ValueError for an unknown stage, and for post_pretrain on a model that is not split.
    """
    if stage not in ("post_pretrain", "review", "all", "full"):
        raise ValueError(f"unknown stage {stage!r}: choose post_pretrain, review, all or full")
    blocks = [] if stage == "full" else list(moe_blocks(model))
    for parameter in model.parameters():
        parameter.requires_grad_(stage in ("all", "full"))
    for layer, block in blocks:
        block.gate.weight.requires_grad_(True)
        if stage == "post_pretrain":
            if not isinstance(block.experts, SplitExperts):
                raise ValueError(f"the experts of layer {layer} are not split: call split_experts(model) first")
            block.experts.new_gate_up.requires_grad_(True)
            block.experts.new_down.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if ".shared_expert" in name:
            parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class MoeTensors:
    """The tensors of a loaded upcycled model, split or stock, by their names in checkpoint files (a TensorSource)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.family = moe_family_of(model.config.to_dict(), "this model")
        reshard(model)
        self._blocks = dict(moe_blocks(model))
        self._others: dict[str, tuple[Tensor, ...]] = {}
        self.specs: dict[str, TensorSpec] = {}
        for module_name, parts in stored_parameters(model):
            if ".mlp.experts." in module_name:
                continue
            name, rows = self.family.stored_name(module_name), sum(len(part) for part in parts)
            self._others[name] = parts
            self.specs[name] = TensorSpec(name, parts[0].dtype, (rows, *parts[0].shape[1:]))
        for layer, block in self._blocks.items():
            for expert in range(count_experts(block)):
                for matrix in MATRICES:
                    name = self.family.expert_name(layer, expert, matrix)
                    stacked, _ = self._stacked(layer, expert, matrix)
                    _, rows, columns = stacked.shape
                    shape = (rows if matrix == "down_proj" else rows // 2, columns)
                    self.specs[name] = TensorSpec(name, stacked.dtype, shape)

    def _stacked(self, layer: int, expert: int, matrix: str) -> tuple[Tensor, int]:
        """The parameter that holds a matrix of an expert, and the expert's index in it."""
        experts, down = self._blocks[layer].experts, matrix == "down_proj"
        if not isinstance(experts, SplitExperts):
            stock = cast(Experts, experts)
            return stock.down_proj if down else stock.gate_up_proj, expert
        if expert < experts.num_frozen:
            return experts.frozen_down if down else experts.frozen_gate_up, expert
        return experts.new_down if down else experts.new_gate_up, expert - experts.num_frozen

    def tensor(self, name: str) -> Tensor:
        """The tensor of that checkpoint name, on the CPU; of a sharded model all processes must read it."""
        if name in self._others:
            first, *others = (whole(part.detach()).cpu() for part in self._others[name])
            return torch.cat([first, *(part.to(first.dtype) for part in others)]) if others else first
        parsed = self.family.parse_expert(name)
        if parsed is None or name not in self.specs:
            raise KeyError(f"no tensor {name} in this model")
        stacked, index = self._stacked(*parsed)
        rows = item(stacked, index)
        if parsed[2] != "down_proj":
            rows = rows.chunk(2)[MATRICES.index(parsed[2])]
        return rows.cpu()


def frozen_digest(model: PreTrainedModel) -> str:
    """SHA-256 over the names and values of the original parameters, which training must never change.

    It equals the digest of the dense base (`base_digest`): both hash the base's names, shapes and values, the values
    widened to fp32 (exactly), so that a bf16 base and its fp32 training copy agree. In a split model all frozen experts
    are included.
    """
    frozen = [getattr(block.experts, "num_frozen", 1) for _, block in moe_blocks(model)]
    tensors, tied = MoeTensors(model), bool(model.config.tie_word_embeddings)
    return original_digest(tensors, tensors.family, tied, frozen, original_rows(model.config))


def original_digest(
    source: TensorSource, family: Family, tied: bool, frozen: int | Sequence[int] = 1, vocabulary: int | None = None
) -> str:
    """frozen_digest of any source of tensors: a dense base, an upcycled checkpoint directory, a loaded model.

    vocabulary: rows of the base's own vocabulary, if it was extended (`original_rows`); others are not hashed.
    """
    originals = original_tensors(source, family, tied, frozen)
    digest = hashlib.sha256()
    for name in sorted(originals):
        value = source.tensor(originals[name])
        if name in (EMBEDDINGS, HEAD):
            value = value[:vocabulary]
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(tensor_bytes(value.float()))
    return digest.hexdigest()


def original_tensors(
    source: TensorSource, family: Family, tied: bool, frozen: int | Sequence[int] = 1
) -> dict[str, str]:
    """From dense to stored names of the original tensors of a dense or an upcycled source.

    Original experts after the first have no dense name; they are `model.layers.L.mlp.experts.E.MATRIX.weight`.
    """
    originals = {}
    for name in source.specs:
        computed = name.endswith("rotary_emb.inv_freq")
        if computed or family.is_routing(name) or (tied and name == "lm_head.weight"):
            continue
        if parsed := family.parse_expert(name):
            layer, expert, matrix = parsed
            if expert >= (frozen if isinstance(frozen, int) else frozen[layer]):
                continue
            dense = dense_ffn(layer, matrix)
            originals[dense if expert == 0 else dense.replace(".mlp.", f".mlp.experts.{expert}.")] = name
        else:
            originals[name] = name
    return originals
