"""MoE-LPR and its baselines: ways to extend a dense model to new languages (docs/methods.md 2.5).

    moe_lpr     an upcycled model; new experts and routers train, then a review of the routers
    full        every weight of the dense model trains
    lora        low-rank adapters on every linear layer train, merged at the end (arXiv 2106.09685; peft)
    llama_pro   copies of blocks, with zero output projections, are inserted; only they train (arXiv 2401.02415)
    moe_all     the upcycled model, all of whose weights train
    no_review, no_lpr, random_experts, one_stage        MoE-LPR without one of its parts

Each is a `Recipe`: the initial model, what trains on which data, and whether a review follows. `open_method` returns
the model ready for `eclectus.models.training.loop.train`, `save_method` writes the trained model as a stock checkpoint.
Cost: `full` and `moe_all` hold AdamW moments for everything; `llama_pro` adds new_blocks / layers to every token's
compute, `lora` nothing after merging.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eclectus.models.checkpoints.door import read_transformers_config
from eclectus.models.checkpoints.families import family_of
from eclectus.models.checkpoints.proof import (
    StepZero,
    checked,
    compared,
    logits_of,
    probes_for,
    prove_as_stored,
    prove_start,
)
from eclectus.models.checkpoints.side_files import REPORT
from eclectus.models.checkpoints.streaming import streamed_logits
from eclectus.models.checkpoints.tensor_files import CheckpointReader, read_config, tensor_bytes
from eclectus.models.checkpoints.writing import save_model
from eclectus.models.extension.lory import save_lory, split_lory
from eclectus.models.extension.recipes import RECIPES, Recipe, recipe_of
from eclectus.models.extension.split_vocabulary import join_vocabulary, split_vocabulary
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.mixture.experts import set_trainable, split_experts
from eclectus.models.mixture.export import export_checkpoint
from eclectus.models.sharding.blueprint import Blueprint, stock_blueprint
from eclectus.models.sharding.training_form import deeper_values, hold_no_memory
from eclectus.models.training.instances import Batch, Instances, rows_at
from eclectus.models.training.parallel import reshard, whole
from eclectus.models.training.process import Process

# Largest difference of a logit by merging adapters, as a share of the largest: matrix products on GPUs may be TF32.
MERGED = 1e-2
MERGING = "the model with merged adapters differs from itself"

P = ParamSpec("P")


def method_blueprint(
    method: str,
    checkpoint: str | Path | Blueprint,
    *,
    lora_rank: int = 8,
    new_blocks: int | None = None,
    new_words: bool = False,
    seed: int = 0,
    frozen: int | Sequence[int] | None = None,
) -> Blueprint:
    """The model of `checkpoint` in fp32, ready for stage 1 of a method: only trained parameters require gradients.

    checkpoint: the upcycled one for recipes that start "upcycled" (or a Lory model with new experts, for MoE-LPR), else
    the dense base; or the stock model's blueprint, with `frozen`, its leading experts that stay frozen. new_blocks:
    blocks that llama_pro adds, by default half of the existing number. new_words: whether the rows that the last
    extension of the vocabulary added train, and of these matrices no others, except where a method trains every weight.
    Raises ValueError for an unknown method or settings that do not fit.
    """
    recipe = recipe_of(method)
    if _model_type(checkpoint) == "lory":
        return _lory_blueprint(checkpoint, recipe, "post_pretrain")
    stock = _stock(checkpoint)
    model = cast(PreTrainedModel, stock.model)
    if recipe.start == "lora":
        hold_no_memory(model)
        adapted: Any = add_lora(model, lora_rank, seed)
        if new_words:
            split_vocabulary(adapted.get_base_model())
        return stock.formed(adapted)
    if recipe.start == "blocks":
        layers, count = model.config.num_hidden_layers, new_blocks or max(1, model.config.num_hidden_layers // 2)
        deeper = expand_blocks(model, count)
        stock.values = deeper_values(stock.values, _block_origins(layers, count))
        return stock.formed(split_vocabulary(deeper) if new_words else deeper)
    if recipe.start == "upcycled":
        split_experts(model, _frozen(checkpoint, frozen))
    set_trainable(model, recipe.trained)
    everything = recipe.start == "dense" or recipe.trained == "all"
    return stock.formed(split_vocabulary(model) if new_words and not everything else model)


def review_blueprint(checkpoint: str | Path | Blueprint, frozen: int | Sequence[int] | None = None) -> Blueprint:
    """The result of stage 1 in fp32, ready for the review, which trains only routers. Both: as `method_blueprint`."""
    if _model_type(checkpoint) == "lory":
        return _lory_blueprint(checkpoint, RECIPES["moe_lpr"], "review")
    stock = _stock(checkpoint)
    model = cast(PreTrainedModel, stock.model)
    split_experts(model, _frozen(checkpoint, frozen))
    set_trainable(model, "review")
    return stock.formed(model)


def _stock(checkpoint: str | Path | Blueprint) -> Blueprint:
    return checkpoint if isinstance(checkpoint, Blueprint) else stock_blueprint(checkpoint)


def _model_type(checkpoint: str | Path | Blueprint) -> str | None:
    if isinstance(checkpoint, Blueprint):
        return str(checkpoint.model.config.model_type)
    return read_config(Path(checkpoint)).get("model_type")


def _frozen(checkpoint: str | Path | Blueprint, given: int | Sequence[int] | None) -> int | Sequence[int]:
    if given is not None or isinstance(checkpoint, Blueprint):
        return given or 1
    return frozen_experts(checkpoint)


def _in_memory(blueprint_of: Callable[P, Blueprint]) -> Callable[P, nn.Module]:
    """The same function, but for the model itself, whole and in memory."""

    @functools.wraps(blueprint_of)
    def opened(*args: P.args, **options: P.kwargs) -> nn.Module:
        with blueprint_of(*args, **options) as blueprint:
            made: nn.Module = blueprint.make()
            return made

    return opened


open_method, open_review = _in_memory(method_blueprint), _in_memory(review_blueprint)


def prove_method(
    model: nn.Module, method: str, checkpoint: str | Path, process: Process | None = None
) -> StepZero | None:
    """The proof that a model of `open_method` or `open_review` computes, before training, what its checkpoint does.

    A dense model with new blocks or adapters is compared with a plain reading of the checkpoint; a mixture or a Lory
    model, split for training, with the stored one. process: of a sharded model; all must call this, rank 0 has the
    proof. Raises StepZeroError if they differ.
    """
    path, what = Path(checkpoint), f"the start of {recipe_of(method).title}"
    prove = prove_as_stored if recipe_of(method).start == "upcycled" else prove_start
    return prove(model, path, what, process=process)


def _lory_blueprint(
    checkpoint: str | Path | Blueprint, recipe: Recipe, stage: Literal["post_pretrain", "review"]
) -> Blueprint:
    if recipe.start != "upcycled" or recipe.trained != "post_pretrain" or recipe.mixed or recipe.random_experts:
        raise ValueError(
            f"{recipe.title} extends dense models, {checkpoint} is a Lory model: choose moe_lpr or no_review"
        )
    stock = _stock(checkpoint)
    return stock.formed(split_lory(cast(LoryForCausalLM, stock.model), stage))


def frozen_experts(checkpoint: str | Path) -> int | list[int]:
    """Number of leading experts that stay frozen: 1, or a list by layer for a checkpoint that was extended again."""
    path = Path(checkpoint) / REPORT
    extended = json.loads(path.read_text("utf-8")).get("extended") if path.is_file() else None
    return list(extended[-1]["experts_before"]) if extended else 1


def save_method(model: nn.Module, out: str | Path, side_files: str | Path, process: Process | None = None) -> None:
    """Writes a trained model as a stock checkpoint; adapters are first merged into the weights.

    process: of a sharded model; all processes must call this, and each writes a part of the checkpoint.
    """
    out, side_files = Path(out), Path(side_files)
    if process is not None:
        _save_sharded(model, out, side_files, process)
        return
    if isinstance(model, LoryForCausalLM):
        save_lory(model, out, side_files)
        return
    plain = join_vocabulary(_merged(model) if hasattr(model, "merge_and_unload") else cast(PreTrainedModel, model))
    if hasattr(plain.config, "num_experts_per_tok"):
        export_checkpoint(plain, out, side_files=side_files)
        return
    save_model(plain, out, side_files)


def _save_sharded(model: Any, out: Path, side_files: Path, process: Process) -> None:
    if hasattr(model.config, "num_experts_per_tok"):
        export_checkpoint(model, out, side_files=side_files, process=process)
        return
    if isinstance(model, LoryForCausalLM):
        model.config.extension_trained = True
    if not hasattr(model, "merge_and_unload"):
        save_model(model, out, side_files, process=process)
        return
    probes = probes_for(model.config, sum(each.numel() for each in model.parameters()))
    expected = logits_of(model, probes)
    save_model(model, out, side_files, process=process)

    def written() -> Tensor:
        config = read_transformers_config(out)
        with CheckpointReader(out) as reader:
            family = family_of(config.to_dict(), out)
            return streamed_logits(reader, config, family, probes.tokens, positions=probes.positions)

    compared(written, expected, probes, MERGING, MERGED, process)


def _merged(model: Any) -> PreTrainedModel:
    """The model with its adapters merged into the weights. Raises StepZeroError if it then computes something else."""
    probes = probes_for(model.config, sum(each.numel() for each in model.parameters()))
    expected = logits_of(model, probes)
    merged = cast(PreTrainedModel, model.merge_and_unload())
    checked(MERGING, logits_of(merged, probes), expected, MERGED, probes)
    return merged


def add_lora(model: PreTrainedModel, rank: int, seed: int = 0) -> nn.Module:
    """The model with trainable adapters of this rank, scaled by 2, on every linear layer except the output layer."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("LoRA needs peft, which is not installed: pip install 'eclectus[lora]'") from error
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}: choose 1 or more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)


def expand_blocks(model: PreTrainedModel, new_blocks: int) -> PreTrainedModel:
    """LLaMA-Pro: a deeper model that computes the same, in which only the new blocks train.

    Each new block is a copy of the block before it with zero output projections (`o_proj`, `down_proj`), so that at
    first it adds nothing to the residual stream. They are spaced evenly. Raises ValueError for more new blocks than
    existing ones, UnsupportedModelError for a family that cannot be upcycled.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= new_blocks <= layers:
        raise ValueError(f"new_blocks is {new_blocks}: choose 1 to {layers}, the number of existing blocks")
    family_of(model.config.to_dict(), "this model")
    origins = _block_origins(layers, new_blocks)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(origins)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[origin] for origin, _ in origins]
    with torch.device("meta"):
        deeper = type(model)(config)
    deeper.to_empty(device=model.device).to(model.dtype)  # type: ignore[arg-type]  # a decorator hides `self`
    own = model.state_dict()
    prefix = "model.layers."
    state = {name: value for name, value in own.items() if not name.startswith(prefix)}
    for index, (origin, new) in enumerate(origins):
        for name in [name for name in own if name.startswith(f"{prefix}{origin}.")]:
            zero = new and (".o_proj." in name or ".down_proj." in name)
            value = torch.zeros_like(own[name]) if zero else own[name].clone()
            state[f"{prefix}{index}.{name.removeprefix(f'{prefix}{origin}.')}"] = value
    # Rotary frequencies are not parameters, so the model on `meta` has none: take the original's module.
    deeper.model.rotary_emb = model.model.rotary_emb
    deeper.load_state_dict(state, strict=True)
    deeper.tie_weights()
    deeper.generation_config = model.generation_config
    for parameter in deeper.parameters():
        parameter.requires_grad_(False)
    for block, (_, new) in zip(deeper.model.layers, origins, strict=True):
        block.requires_grad_(new)
    return deeper


def _block_origins(layers: int, new_blocks: int) -> list[tuple[int, bool]]:
    """(block that it is copied from, whether it is new) for each block of the deeper model."""
    followed = {(i + 1) * layers // new_blocks - 1 for i in range(new_blocks)}
    origins = []
    for layer in range(layers):
        origins.append((layer, False))
        if layer in followed:
            origins.append((layer, True))
    return origins


def untrained_digest(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters that do not train; training must not change it."""
    digest = hashlib.sha256()
    reshard(model)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            digest.update(tensor_bytes(whole(parameter.detach())))
    return digest.hexdigest()


class MixedInstances(Instances):
    """Two sets of instances read as one: `share` of every batch comes from the second, as evenly as possible.

    Rows are a pure function of (step, size, seed), so resuming is exact. Raises ValueError if lengths or vocabularies
    differ or the share is not between 0 and 1.
    """

    def __init__(self, first: Instances, second: Instances, share: float) -> None:
        for what in ("length", "vocabulary", "end_of_document"):
            if getattr(first, what) != getattr(second, what):
                raise ValueError(
                    f"the two sets of instances differ in {what}: {getattr(first, what)} and {getattr(second, what)}; "
                    "pack both with the same tokenizer and length"
                )
        if not 0 < share < 1:
            raise ValueError(f"the share of the second set is {share}: choose a number between 0 and 1")
        self._sets, self._share = (first, second), share
        self.length, self.vocabulary, self.end_of_document = first.length, first.vocabulary, first.end_of_document
        self.languages = list(dict.fromkeys(first.languages + second.languages))
        self.domains = list(dict.fromkeys(first.domains + second.domains))

    def __len__(self) -> int:
        return sum(len(each) for each in self._sets)

    def largest_token(self) -> int:
        """As Instances.largest_token, of both sets."""
        return max(each.largest_token() for each in self._sets)

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows from len(first) on are of the second set; labels are numbered by the languages and domains of both."""
        begin = len(self._sets[0])
        positions = [np.flatnonzero(rows < begin), np.flatnonzero(rows >= begin)]
        order = torch.from_numpy(np.argsort(np.concatenate(positions)))
        parts = [
            self._renumbered(each, each.batch(rows[own] - offset))
            for each, own, offset in zip(self._sets, positions, (0, begin), strict=True)
        ]
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        return Batch(*(torch.cat(pair)[order] for pair in fields))

    def _renumbered(self, own: Instances, batch: Batch) -> Batch:
        languages = _renumbered(batch.languages, own.languages, self.languages)
        domains = _renumbered(batch.domains, own.domains, self.domains)
        return Batch(batch.tokens, batch.labels, languages, domains, batch.documents)

    def rows_of_step(self, step: int, size: int, seed: int) -> np.ndarray:
        """The instance numbers [size] of a training step, from both sets and shuffled within the batch."""
        begin, end = (int(each * size * self._share) for each in (step, step + 1))
        second = rows_at(np.arange(begin, end), len(self._sets[1]), seed + 1) + len(self._sets[0])
        first = rows_at(np.arange(step * size - begin, (step + 1) * size - end), len(self._sets[0]), seed)
        return np.random.default_rng([seed, step]).permutation(np.concatenate([first, second]))


def _renumbered(numbers: torch.Tensor, names: Sequence[str], all_names: Sequence[str]) -> torch.Tensor:
    """Label numbers over `names` as numbers over `all_names`; -1 stays."""
    table: Any = torch.tensor([*(all_names.index(name) for name in names), -1])
    return table[numbers]
