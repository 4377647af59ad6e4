"""Document pools: a top-k mixture whose tokens choose among the experts of a pool that their document shares.

EMO (arXiv 2605.06663): documents, not tokens, decide which experts are used together, so that experts specialise in
what documents are about. On top of the top-k baseline (models/pretraining/baselines.py):

    S        = softmax(x W)                                  [n, E], of every token
    pool(d)  = the P experts with the largest mean of S over the tokens of document d
    token x  takes its K best experts of pool(d), renormalised

In training P is drawn for each document, uniformly from K, 2 K, ... E, by a hash of its number (the same at every
reading, so that a resumed training repeats to the bit), or is fixed (`pool_size`). The choice of a pool has no
gradient. Load is balanced over the whole step, as in the paper, with the shares of actual choices and the
probabilities before the restriction.

The pool of a whole document LOOKS AHEAD: which experts a token may use depends on later tokens. It is for training.
Scores are causal (selection "causal"): a model trained with random pools uses all experts, as in the paper, where it is
then a plain top-k model; with a fixed P the pool of a token is chosen by the mean of S over its document up to that
token. Generation with such a pool reads the whole text again for every token.

Shapes: B rows, L tokens, n = B L, D width, E experts, G groups (documents in rows; at most n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from eclectus.models.lory.config import check_choice
from eclectus.models.losses.objectives import ROUTERS, NextToken, TransformersBalance
from eclectus.models.losses.router_losses import count_choices
from eclectus.models.losses.step import Objective, Pass
from eclectus.models.pretraining.baselines import fill_top_k, top_k_fields

SELECTIONS = ("document", "causal")


class DocumentPoolConfig(MixtralConfig):
    """Mixtral's configuration, plus that of pools.

    Args:
        pool_size: P, experts in a document's pool; 0: drawn for each document in training, all experts in scoring.
        selection: "document", by all tokens of a document, as in training (looks ahead), or "causal".
    """

    model_type = "document_pool"

    pool_size: int = 0
    selection: str = "document"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choice("selection", self.selection, SELECTIONS)
        if self.pool_size and not self.num_experts_per_tok <= self.pool_size <= self.num_local_experts:
            raise ValueError(
                f"pool_size is {self.pool_size}, but must be 0 or {self.num_experts_per_tok} to "
                f"{self.num_local_experts}: a token chooses {self.num_experts_per_tok} of the pool's experts."
            )


@dataclass(frozen=True)
class WholePools:
    """Pools by all tokens of a document. groups, real [n]: each token's group, and that it is no padding; sizes [G]."""

    groups: Tensor
    real: Tensor
    sizes: Tensor

    def mask(self, logits: Tensor) -> Tensor:
        """Router logits `[n, E]` to `[n, E]`, true for the experts of a token's pool."""
        S_nE = logits.float().softmax(-1) * self.real.unsqueeze(-1)
        sums_GE = S_nE.new_zeros(len(self.sizes), S_nE.shape[1]).index_add(0, self.groups, S_nE)
        return _largest(sums_GE, self.sizes.unsqueeze(-1))[self.groups]


@dataclass(frozen=True)
class RunningPools:
    """Pools by the tokens of a document so far. first [B, L]: where each token's document begins; real [B, L]."""

    first: Tensor
    real: Tensor
    size: int

    def mask(self, logits: Tensor) -> Tensor:
        """As WholePools.mask."""
        S_BLE = (logits.double().softmax(-1).view(*self.first.shape, -1)) * self.real.unsqueeze(-1)
        sums_BLE = S_BLE.cumsum(1)
        before_BLE = F.pad(sums_BLE, (0, 0, 1, 0)).gather(1, self.first.unsqueeze(-1).expand_as(sums_BLE))
        return _largest((sums_BLE - before_BLE).flatten(0, 1), self.size)


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of 32 bits, so that neighbouring numbers of documents draw unrelated sizes."""
    numbers = numbers % 2**32
    for _ in range(2):
        numbers = (numbers ^ (numbers >> 16)) * 0x45D9F3B % 2**32
    return numbers ^ (numbers >> 16)


def _largest(values_GE: Tensor, size: Tensor | int) -> Tensor:
    """True for the `size` largest of each row, the first ones among equals."""
    order = values_GE.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1) < size


class PoolRouter(MixtralTopKRouter):
    """Mixtral's router, restricted to `pools` (set by the model before each pass; None for all experts)."""

    pools: WholePools | RunningPools | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(raw logits `[n, E]`, weights `[n, K]`, experts `[n, K]`)."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        probabilities = restricted(logits.float(), self.pools).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


def restricted(logits: Tensor, pools: WholePools | RunningPools | None) -> Tensor:
    """Router logits `[n, E]`, minus infinity outside a token's pool."""
    return logits if pools is None else logits.masked_fill(~pools.mask(logits.detach()), -torch.inf)


class DocumentPoolForCausalLM(MixtralForCausalLM):
    """A Mixtral whose tokens choose within their document's pool of experts."""

    config_class = DocumentPoolConfig
    config: DocumentPoolConfig

    def __init__(self, config: DocumentPoolConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = PoolRouter(config)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As MixtralForCausalLM. documents: `[B, L]` numbers, -1 at padding; by default from end-of-document tokens.

        router_logits are raw in training, for the balance; else minus infinity outside the pools, so that they are what
        was chosen from.
        """
        pools = pools_of(self.config, input_ids, attention_mask, documents)
        cache = kwargs.get("past_key_values")
        if pools is not None and cache is not None and cache.get_seq_length():
            raise ValueError("pools depend on the whole text, which a cache does not hold; set use_cache=False.")
        for layer in self.model.layers:
            layer.mlp.gate.pools = pools
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if not self.training and pools is not None and getattr(output, "router_logits", None):
            output.router_logits = tuple(restricted(each, pools) for each in output.router_logits)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers, without a cache if pools restrict the experts."""
        return super().generate(  # type: ignore[misc]
            *args, **kwargs | ({"use_cache": False} if restricts(self.config) else {})
        )


@torch.no_grad()
def pools_of(
    config: DocumentPoolConfig, input_ids: Tensor | None, attention_mask: Tensor | None, documents: Tensor | None
) -> WholePools | RunningPools | None:
    """The pools of a batch `[B, L]`; None if they do not restrict. Raises ValueError without input_ids."""
    if not restricts(config):
        return None
    if input_ids is None:
        raise ValueError("document pools need input_ids, by whose end-of-document tokens documents are told apart.")
    rows, length = input_ids.shape
    if documents is None:
        end = config.eos_token_id
        ends = torch.tensor([] if end is None else end, dtype=torch.int64, device=input_ids.device)
        begins = torch.isin(input_ids.roll(1, dims=1), ends)
    else:
        begins = documents.ne(documents.roll(1, dims=1))
    begins[:, 0] = False
    real = torch.ones_like(begins)
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask.bool()
    if config.selection == "causal":
        places = torch.arange(length, device=begins.device).expand(rows, -1)
        return RunningPools(torch.where(begins, places, 0).cummax(1).values, real, config.pool_size)
    groups = (begins.cumsum(1) + length * torch.arange(rows, device=begins.device).unsqueeze(1)).flatten()
    numbers = groups if documents is None else documents.flatten()
    return WholePools(groups, real.flatten(), pool_sizes(config, torch.zeros_like(groups).scatter(0, groups, numbers)))


def restricts(config: DocumentPoolConfig) -> bool:
    """Whether a pool can be smaller than all experts."""
    if config.pool_size == 0:
        return config.selection == "document"
    return config.pool_size < config.num_local_experts


def pool_sizes(config: DocumentPoolConfig, numbers: Tensor) -> Tensor:
    """The pool size of the documents with these numbers."""
    if config.pool_size:
        return torch.full_like(numbers, config.pool_size)
    step = config.num_experts_per_tok
    return step * (1 + _mixed(numbers) % (config.num_local_experts // step))


class PoolBalance(TransformersBalance):
    """Transformers' load balance with the choices that tokens made within their pools.

    The probabilities are those of all experts, before the restriction, so that the gradient raises unused ones too.
    """

    def statistic(self, done: Pass) -> Tensor:
        logits, real = self._routed(done)
        pools = pools_of(done.config, done.batch.tokens, None, done.batch.documents)
        layers = len(done.output.router_logits)
        chosen_from = [torch.cat([restricted(each, pools) for each in logits[0].detach().float().chunk(layers)])]
        return torch.cat(count_choices(chosen_from, self._top_k(done), real))


def pooled(domains: Sequence[str] = ()) -> Objective:
    """The objective: next-token and the weighted balance. domains: as in `objectives.next_token`."""
    return Objective([NextToken(domains), PoolBalance()], ROUTERS, reads={"documents": "documents"})


def check_pool(pool_size: int, top_k: int) -> None:
    """Raises ValueError for pools that could hold some parts of one FFN and not the others."""
    if pool_size % top_k:
        raise ValueError(f"pool_size is {pool_size}: with FFNs cut into {top_k} it must be a multiple of that.")


def document_pools_from_dense(
    llama: LlamaForCausalLM,
    copies: int = 8,
    top_k: int = 2,
    pool_size: int = 0,
    router_initializer_range: float = 0.02,
    balance: float = 0.01,
    seed: int = 0,
) -> DocumentPoolForCausalLM:
    """The model of `top_k_from_dense`, with pools; its logits are the dense model's.

    Raises ValueError as that does, and for a pool_size that is no multiple of top_k: the parts of one FFN start with
    equal routers, and a pool that held some of them could not start as the dense model.
    """
    check_pool(pool_size, top_k)
    fields = top_k_fields(llama.config, copies, top_k, top_k, balance)
    model = DocumentPoolForCausalLM(DocumentPoolConfig(**fields, pool_size=pool_size))
    fill_top_k(model, llama, copies, top_k, router_initializer_range, seed)
    return model


if "document_pool" not in CONFIG_MAPPING:
    AutoConfig.register("document_pool", DocumentPoolConfig)
    AutoModelForCausalLM.register(DocumentPoolConfig, DocumentPoolForCausalLM)
