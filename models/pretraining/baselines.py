"""Baselines of Lory: Expert Choice, and a top-k mixture of transformers (docs/methods.md 1.7).

Expert Choice (Zhou et al., arXiv 2202.09368): every expert takes its best tokens, so that all have equal load.

    S = softmax(x W)                      [n, E] over the n tokens of a batch
    expert e takes its n c / E best       c: capacity, 1 for as many FFN passes as in the dense twin
    y = sum over the experts that took x of  (E / c) S[x, e] FFN_e(x)

It is NOT causal: whether a token is taken depends on later tokens and on other rows. `calibrate` replaces the choice by
a fixed threshold per expert, the mean of the lowest scores that were taken in training: causal, at about the same load.
A unit of T > 1 tokens gives the paper's segment-level Expert Choice, routed by the previous segment, as in Lory. The
factor E / c keeps a model that starts from copies of one dense FFN near the dense one; it is a constant scale of the
down projections.

Top-k: transformers' Mixtral with G copies of the dense FFN, each cut into C narrower experts; a token takes the K best
of G C experts. By default K = C: together as wide as one dense FFN. With routers equal across the C cuts the start
equals the dense model exactly (virtual groups, arXiv 2410.07524) for any multiple K of C.

Both start from a dense model; prefix routing is LoryConfig(routing="prefix"), the dense twin a LlamaForCausalLM.
Cost: a dense step and the gathering of tokens; G or E times the FFN's parameters.

Shapes: B rows, L tokens, T tokens per unit, U units per batch, D width, F FFN width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from eclectus.models.lory.config import check_choice
from eclectus.models.lory.dense import dense_ffn_names, expand_dense_tensors
from eclectus.models.lory.merge import apply_merged

SELECTIONS = ("batch", "threshold")


class ExpertChoiceConfig(LlamaConfig):
    """LLaMA's configuration, plus that of Expert Choice.

    Args:
        num_experts: E, expert FFNs per layer.
        capacity: average number of experts per token.
        segment_length: T, tokens that are taken together; 1 is token-level.
        selection: "batch", as in training (looks ahead), or "threshold", as set by `calibrate` (causal).
        router_initializer_range: standard deviation of the routers' initial weights.
    """

    model_type = "expert_choice"

    num_experts: int = 8
    num_experts_per_tok: int = 1
    capacity: float = 1.0
    segment_length: int = 1
    selection: str = "batch"
    router_initializer_range: float = 0.02
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("selection", self.selection, SELECTIONS)
        for name in ("num_experts", "segment_length", "capacity"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be more than 0.")


class ExpertChoiceRouter(nn.Linear):
    """Router logits of the units' mean hidden states, in at least fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., E]`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class ExpertChoiceFFN(nn.Module):
    """E expert FFNs in Lory's layout `[E, 3F, D]` and their router."""

    threshold: Tensor

    def __init__(self, config: ExpertChoiceConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_experts, 3 * config.intermediate_size, config.hidden_size)
        self.experts = nn.Parameter(torch.empty(shape))
        self.router = ExpertChoiceRouter(config.hidden_size, config.num_experts, bias=False)
        self.register_buffer("threshold", torch.zeros(config.num_experts))
        self.cutoffs: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`; 0 for tokens that no expert takes."""
        rows, length, width = x.shape
        unit = min(self.config.segment_length, length)
        x_UTD = F.pad(x, (0, 0, 0, -length % unit)).view(rows, -1, unit, width)
        scores = self.router(x_UTD.mean(dim=2)).softmax(dim=-1)
        if unit > 1:
            scores = torch.cat([scores[:, :1].detach(), scores[:, :-1]], dim=1)
        chosen = self._by_threshold if self.config.selection == "threshold" else self._by_batch
        y_UTD = chosen(x_UTD.flatten(0, 1), scores.flatten(0, 1))
        return y_UTD.view(rows, -1, width)[:, :length]

    def _by_batch(self, x: Tensor, scores: Tensor) -> Tensor:
        """x `[U, T, D]`, scores `[U, E]`: every expert takes its best units."""
        units, tokens, width = x.shape
        experts = scores.shape[1]
        most = min(units, max(1, round(self.config.capacity * units / experts)))
        weight_EK, taken_EK = scores.t().topk(most)
        if self.cutoffs is not None:
            self.cutoffs.append(weight_EK[:, -1].detach())
        y = apply_merged(x[taken_EK].view(experts, most * tokens, width), self.experts).view(experts * most, -1)
        y = y * (experts / self.config.capacity * weight_EK).view(-1, 1)
        return y.new_zeros(units, tokens * width).index_add(0, taken_EK.flatten(), y).view(x.shape)

    def _by_threshold(self, x: Tensor, scores: Tensor) -> Tensor:
        """As `_by_batch`, but an expert takes all units whose score reaches its threshold; it computes all of them."""
        weights = torch.where(scores >= self.threshold, scores, 0.0) * (scores.shape[1] / self.config.capacity)
        each = [
            apply_merged(x.flatten(0, 1).unsqueeze(0), self.experts[e : e + 1]).view(x.shape)
            * weights[:, e, None, None]
            for e in range(scores.shape[1])
        ]
        return torch.stack(each).sum(0)


class ExpertChoiceForCausalLM(LlamaForCausalLM):
    """A LLaMA whose FFNs are Expert Choice mixtures; attention, norms and embeddings are the dense twin's classes."""

    config_class = ExpertChoiceConfig

    def __init__(self, config: ExpertChoiceConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ExpertChoiceFFN(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ExpertChoiceRouter):
            init.normal_(module.weight, std=self.config.router_initializer_range)
        elif isinstance(module, ExpertChoiceFFN):
            init.normal_(module.experts, std=self.config.initializer_range)
            init.zeros_(module.threshold)
        else:
            super()._init_weights(module)

    def forward(self, *args: Any, output_router_logits: bool = False, **kwargs: Any) -> MoeCausalLMOutputWithPast:
        """As LlamaForCausalLM; output_router_logits: a tuple over layers of each token's router logits `[B * L, E]`."""
        logits: list[Tensor] = []
        routers = [layer.mlp.router for layer in self.model.layers] if output_router_logits else []
        hooks = [router.register_forward_hook(lambda _, __, output: logits.append(output)) for router in routers]
        try:
            output = super().forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        length = output.logits.shape[1]
        unit = min(self.config.segment_length, length)
        by_token = tuple(each.repeat_interleave(unit, dim=1)[:, :length].flatten(0, 1) for each in logits)
        # transformers writes tuple[Tensor] for a tuple of any length.
        return MoeCausalLMOutputWithPast(**output, router_logits=by_token or None)  # type: ignore[arg-type]

    @classmethod
    def from_dense(
        cls, llama: LlamaForCausalLM, num_experts: int = 8, segment_length: int = 1, seed: int = 0, **config: Any
    ) -> ExpertChoiceForCausalLM:
        """A model whose experts are copies of the dense FFN. config: other fields of ExpertChoiceConfig."""
        model = cls(expert_choice_config(llama.config, num_experts, segment_length=segment_length, **config))
        state = expand_dense_tensors(llama.state_dict(), num_experts, shared_memory=True)
        state |= drawn_routers(model, num_experts, model.config.router_initializer_range, seed)
        _load(model, state)
        return model.train(llama.training)


def expert_choice_config(dense: LlamaConfig, num_experts: int, **config: Any) -> ExpertChoiceConfig:
    """The configuration of `ExpertChoiceForCausalLM.from_dense`."""
    fields = {name: value for name, value in dense.to_dict().items() if name != "model_type"}
    return ExpertChoiceConfig(**{**fields, "num_experts": num_experts, **config})


@torch.no_grad()
def calibrate(model: ExpertChoiceForCausalLM, batches: Iterable[Tensor]) -> None:
    """Sets every expert's threshold to its mean cut-off over batches of tokens `[B, L]`; selection becomes "threshold".

    The batches should be training batches of the size used in training. Raises ValueError without any.
    """
    layers = [layer.mlp for layer in model.model.layers]
    model.config.selection = "batch"
    for ffn in layers:
        ffn.cutoffs = []
    for tokens in batches:
        model(input_ids=tokens, use_cache=False)
    for ffn in layers:
        if not ffn.cutoffs:
            raise ValueError("no batches to calibrate with; give at least one.")
        ffn.threshold.copy_(torch.stack(ffn.cutoffs).mean(0))
        ffn.cutoffs = None
    model.config.selection = "threshold"


def top_k_from_dense(
    llama: LlamaForCausalLM,
    copies: int = 8,
    top_k: int = 2,
    router_initializer_range: float = 0.02,
    balance: float = 0.01,
    seed: int = 0,
    cuts: int | None = None,
) -> MixtralForCausalLM:
    """A Mixtral of `copies * cuts` experts, each 1/cuts of the dense FFN wide, with the dense model's logits.

    cuts: by default top_k, so that a token's experts are together as wide as the dense FFN. balance: coefficient of
    transformers' own load-balancing loss. Raises ValueError if cuts does not divide the FFN's width and top_k.
    """
    model = MixtralForCausalLM(MixtralConfig(**top_k_fields(llama.config, copies, top_k, cuts or top_k, balance)))
    fill_top_k(model, llama, copies, cuts or top_k, router_initializer_range, seed)
    return model


def top_k_fields(dense: LlamaConfig, copies: int, top_k: int, cuts: int, balance: float) -> dict[str, Any]:
    """The fields of the MixtralConfig of `top_k_from_dense`. Raises ValueError as that does."""
    if dense.intermediate_size % cuts:
        raise ValueError(f"the FFN is {dense.intermediate_size} wide, which top_k {cuts} does not divide.")
    if top_k % cuts or top_k > copies * cuts:
        raise ValueError(
            f"top_k is {top_k}: with FFNs cut into {cuts} it must be a multiple of {cuts}, at most {copies * cuts}."
        )
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps "
        "rope_parameters max_position_embeddings tie_word_embeddings initializer_range bos_token_id eos_token_id "
        "pad_token_id"
    )
    return dict(
        {name: getattr(dense, name) for name in same.split()},
        intermediate_size=aligned(dense.intermediate_size // cuts),
        num_local_experts=copies * cuts,
        num_experts_per_tok=top_k,
        router_aux_loss_coef=balance,
        sliding_window=None,
    )


def fill_top_k(
    model: MixtralForCausalLM, llama: LlamaForCausalLM, copies: int, cuts: int, deviation: float, seed: int
) -> None:
    """Gives a model of `top_k_fields` the weights of `top_k_from_dense`, and the dense model's mode."""
    state = _cut_experts(llama.state_dict(), copies, cuts, gate_up_scale=1.0, down_scale=cuts)
    drawn = drawn_routers(model, copies, deviation, seed)
    _load(model, state | {name: router.repeat(cuts, 1) for name, router in drawn.items()})
    model.train(llama.training)


def _cut_experts(
    dense: Mapping[str, Tensor], copies: int, cuts: int, gate_up_scale: float, down_scale: float
) -> dict[str, Tensor]:
    """From tensors by LLaMA's names to those by Mixtral's: expert `k * copies + g` is the k-th cut of copy g."""
    state = {name: value.clone() for name, value in dense.items() if ".mlp." not in name}
    for layer in range(sum(name.endswith(".mlp.gate_proj.weight") for name in dense)):
        gate, up, down = (dense[name] for name in dense_ffn_names(layer))
        fill = aligned(len(gate) // cuts) - len(gate) // cuts
        gates = [F.pad(cut, (0, 0, 0, fill)) for cut in gate.chunk(cuts)]
        ups = [F.pad(cut, (0, 0, 0, fill)) for cut in up.chunk(cuts)]
        downs = [F.pad(cut, (0, fill)) for cut in down.chunk(cuts, dim=1)]
        pairs = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        experts = f"model.layers.{layer}.mlp.experts"
        state[f"{experts}.gate_up_proj"] = torch.stack(pairs).repeat_interleave(copies, dim=0) * gate_up_scale
        state[f"{experts}.down_proj"] = torch.stack(downs).repeat_interleave(copies, dim=0) * down_scale
    return state


def aligned(width: int) -> int:
    """The next width whose rows start at multiples of 16 bytes in bf16, which transformers' grouped kernel requires.

    The padding has zero weights and zero gradients, so it stays zero.
    """
    return -(-width // 8) * 8


def drawn_routers(model: nn.Module, rows: int, deviation: float, seed: int) -> dict[str, Tensor]:
    """Random routers `[rows, D]` for each layer, by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, parameter.shape[1], generator=generator) * deviation
        for name, parameter in model.named_parameters()
        if name.endswith((".mlp.router.weight", ".mlp.gate.weight"))
    }


def _load(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [name for name in missing if not name.endswith((".threshold", "lm_head.weight"))] + unexpected
    if wrong:
        raise ValueError(
            f"the dense model does not fit: {', '.join(wrong[:3])}; give a SwiGLU model without FFN biases."
        )
    model.tie_weights()


def masked_experts(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts on all tokens, with weight 0 for experts that a token did not choose.

    self: an experts module of transformers. hidden `[n, D]`; top_k_index, top_k_weights `[n, K]`. E/K times the FLOPs,
    but no wait for the GPU: faster than a loop over experts if the experts are small.
    """
    weights_nE = hidden.new_zeros(len(hidden), self.num_experts, dtype=top_k_weights.dtype)
    weights_nE = weights_nE.scatter(1, top_k_index, top_k_weights)
    gate, up = torch.matmul(hidden, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    weighted = self.act_fn(gate) * up * weights_nE.t().unsqueeze(-1).to(gate.dtype)
    y_EnD = torch.matmul(weighted, self.down_proj.transpose(1, 2))
    return y_EnD.sum(0).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register("masked", masked_experts)

if "expert_choice" not in CONFIG_MAPPING:
    AutoConfig.register("expert_choice", ExpertChoiceConfig)
    AutoModelForCausalLM.register(ExpertChoiceConfig, ExpertChoiceForCausalLM)
