"""Upcycling: converts a dense checkpoint to a mixture of experts with equal logits (docs/methods.md 2.1, 2.7).

    expert 0 = the base's FFN;  experts 1..E-1 = copies of it;  a router, hidden x E, Xavier normal
    y = sum over the top K of  G_i / (sum of the top K's G) * E_i(x)

All chosen experts equal the base's FFN and their weights add up to 1, so the result is the base's for *any* router.
This is verified (models/checkpoints/proof.py): both checkpoints compute logits on fixed probes, and so does a plain
forward pass that reads the base's files by itself; above the tolerance nothing is written. The result is a stock
Mixtral, Qwen2Moe or Qwen3Moe checkpoint.

Tensors are streamed. Cost: memory for one layer, whatever the size of the base; one read of the base and E writes of
its FFN, plus three passes over the probes. A GGUF base is dequantised matrix by matrix.

Other initialisations of the new experts give up this equality so that experts differ from the first step: `noise` adds
Gaussian noise, `drop` redraws a share of each expert's inner dimensions (Drop-Upcycling, arXiv 2502.19261: the same
ones in all three matrices). For these the check sends every token to expert 0, which must equal the base.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from eclectus.models.checkpoints.dense_base import DenseBase, open_base
from eclectus.models.checkpoints.families import SHARED_EXPERT_WIDTH, moe_config, parse_dense_ffn
from eclectus.models.checkpoints.proof import Probes, checked, parameters_of, probes_for, reference_logits
from eclectus.models.checkpoints.side_files import REPORT
from eclectus.models.checkpoints.streaming import misaligned, streamed_logits
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSpec
from eclectus.models.checkpoints.writing import write_checkpoint
from eclectus.models.extension.split_vocabulary import original_rows
from eclectus.models.mixture.experts import original_digest
from eclectus.models.staged_folder import require_new_folder, staged_folder

Init = Literal["copy", "noise", "drop"]
Proof = Literal["as_routed", "expert_0"]


@dataclass(frozen=True)
class UpcycleReport:
    """The base, the result, and the check that both are equal; stored with the weights as upcycle.json."""

    base_model_type: str
    model_type: str
    experts: int
    """Experts per layer, the original one included; the largest number if layers differ."""
    experts_per_layer: tuple[int, ...] | None
    """Experts of each layer if they differ; the checkpoint is then one of models/mixture/layered.py."""
    top_k: int
    init: Init
    seed: int
    proof: Proof
    """`as_routed`: the checkpoint as it is; `expert_0`: with every token sent to expert 0 (init noise and drop)."""
    max_abs_delta: float
    """Largest difference of any logit to the base's over the probes, in fp32."""
    as_routed_delta: float
    """The same with tokens routed by the router; differs from max_abs_delta for init noise and drop only."""
    reference_delta: float | None
    """The same to a second reading of the base's files, by models/checkpoints/reference.py; None for a base with its
    own code, which max_abs_delta compares with."""
    max_abs_logit: float
    tolerance: float
    """Largest allowed max_abs_delta and reference_delta, as a share of the largest absolute logit (at least of 1)."""
    probe_shape: tuple[int, ...]
    last_position: int
    """Largest position of the probes; half of them are stretched over all positions of the model."""
    base_digest: str
    """eclectus.models.mixture.experts.frozen_digest of the base, which every later checkpoint must have too."""
    base_types: dict[str, str]
    """By name, dtypes of the base's tensors that differ from its config's dtype."""
    base_parameters: int
    parameters: int
    notes: tuple[str, ...]


def upcycle(
    base_dir: str | Path,
    out_dir: str | Path,
    *,
    experts: int | Sequence[int] = 6,
    top_k: int = 2,
    init: Init = "copy",
    seed: int = 0,
    tolerance: float = 1e-4,
    probes: Tensor | None = None,
    noise_scale: float = 0.01,
    drop_ratio: float = 0.5,
    max_shard_bytes: int = 5_000_000_000,
    trust_remote_code: bool = False,
) -> UpcycleReport:
    """Writes the upcycled checkpoint of `base_dir` to `out_dir` with tokenizer, generation config and upcycle.json.

    base_dir: a checkpoint directory (safetensors, one file or shards), one with one .gguf file, or a .gguf file.
    out_dir: a directory that does not exist or is empty; it is written completely or not at all.
    experts: number per layer, the original one included; one for all layers or one per layer. If they differ, the
        result is in one of our classes (models/mixture/layered.py), since the stock ones have one number for all
        layers.
    tolerance: largest allowed difference of a logit to the base's, as a share of the largest absolute logit (at least
        of 1). fp32 rounding alone gives about 4e-7 in a tiny model and 1.6e-6 in SmolLM2-135M (5e-5 of 34).
    noise_scale: standard deviation of init "noise", relative to each matrix's own.
    drop_ratio: share of inner dimensions that init "drop" redraws; with 1 new experts are random, on the base's scale.
    probes: token ids `[n, length]` for the check; seeded random ones by default.
    trust_remote_code: run code in the base's directory; the check then compares with what that code computes.
    Raises UnsupportedModelError (the base), CheckpointError (its files), ValueError (the settings) before anything is
    written, StepZeroError if the check fails.
    """
    base_dir, out_dir = Path(base_dir), Path(out_dir)
    _check_settings(init, tolerance, noise_scale, drop_ratio)
    require_new_folder(out_dir)
    with ExitStack() as stack:
        base = open_base(base_dir, stack, trust_remote_code)
        counts = expert_counts(experts, top_k, base.config.num_hidden_layers)
        if len(set(counts)) > 1:
            base.family = base.family.layered()
        plan = _Plan(base, counts, init, seed, noise_scale, drop_ratio)
        partial = stack.enter_context(staged_folder(out_dir))
        _check_space(partial, plan)
        config = moe_config(base.config_dict, base.family, counts, top_k)
        write_checkpoint(partial, config, plan.specs, plan.tensor, max_shard_bytes=max_shard_bytes)
        base.copy_side_files(partial)
        report = _prove(base, partial, plan, top_k, tolerance, probes)
        (partial / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def _check_settings(init: str, tolerance: float, noise_scale: float, drop_ratio: float) -> None:
    if init not in ("copy", "noise", "drop"):
        raise ValueError(f"unknown init {init!r}: choose copy, noise or drop")
    if tolerance <= 0 or noise_scale <= 0:
        raise ValueError(f"tolerance ({tolerance}) and noise_scale ({noise_scale}) must be above 0")
    if not 0 < drop_ratio <= 1:
        raise ValueError(f"drop_ratio is {drop_ratio}: choose a share of inner dimensions above 0, at most 1")


def expert_counts(experts: int | Sequence[int], top_k: int, layers: int) -> list[int]:
    """Experts of each layer, from one number or a list. Raises ValueError for numbers that do not fit."""
    counts = [experts] * layers if isinstance(experts, int) else list(experts)
    if len(counts) != layers:
        raise ValueError(
            f"experts names {len(counts)} layers, the base has {layers}: give one number, or one per layer"
        )
    if min(counts) < 2:
        raise ValueError(f"experts is {min(counts)}: at least 2 are needed in every layer, the original and one new")
    if not 1 <= top_k <= min(counts):
        raise ValueError(f"top_k is {top_k}: choose 1 to {min(counts)}, the (smallest) number of experts of a layer")
    return counts


def _check_space(directory: Path, plan: "_Plan") -> None:
    needed, free = sum(spec.nbytes for spec in plan.specs), shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(f"{directory.parent} has {free / 1e9:.1f} GB free, the checkpoint takes {needed / 1e9:.1f} GB")


class _Plan:
    """Every tensor of the upcycled checkpoint: names, dtypes and shapes, and its values on demand."""

    def __init__(
        self, base: DenseBase, experts: list[int], init: Init, seed: int, noise_scale: float, drop_ratio: float
    ) -> None:
        self.experts, self.init, self.seed = experts, init, seed
        self._base, self._family = base.tensors, base.family
        self._noise_scale, self._drop_ratio = noise_scale, drop_ratio
        self.specs: list[TensorSpec] = []
        self._made: dict[str, tuple[Any, ...]] = {}
        for name in sorted(base.tensors.specs, key=_natural_order):
            spec = base.tensors.specs[name]
            ffn = parse_dense_ffn(name)
            if ffn is None:
                self._add(TensorSpec(self._family.stored_name(name), spec.dtype, spec.shape), "base", name)
                continue
            layer, matrix = ffn
            for expert in range(experts[layer]):
                stored = self._family.expert_name(layer, expert, matrix)
                self._add(TensorSpec(stored, spec.dtype, spec.shape), "expert", name, layer, expert, matrix)
            if matrix == "down_proj":
                self._add_routing(layer, spec, spec.shape[0])

    def _add(self, spec: TensorSpec, *recipe: Any) -> None:
        self.specs.append(spec)
        self._made[spec.name] = recipe

    def _add_routing(self, layer: int, down: TensorSpec, hidden: int) -> None:
        router = TensorSpec(self._family.router_name(layer), down.dtype, (self.experts[layer], hidden))
        self._add(router, "router", layer, router)
        if self._family.stock_moe == "qwen2_moe":
            shapes = {
                "shared_expert.gate_proj": (SHARED_EXPERT_WIDTH, hidden),
                "shared_expert.up_proj": (SHARED_EXPERT_WIDTH, hidden),
                "shared_expert.down_proj": (hidden, SHARED_EXPERT_WIDTH),
                "shared_expert_gate": (1, hidden),
            }
            for part, shape in shapes.items():
                spec = TensorSpec(f"model.layers.{layer}.mlp.{part}.weight", down.dtype, shape)
                self._add(spec, "zeros", spec)

    def tensor(self, name: str) -> Tensor:
        """The values of one tensor, independent of what was read before."""
        kind, *rest = self._made[name]
        if kind == "base":
            return self._base.tensor(rest[0])
        if kind == "zeros":
            return torch.zeros(rest[0].shape, dtype=rest[0].dtype)
        if kind == "router":
            layer, spec = rest
            std = math.sqrt(2.0 / sum(spec.shape))
            values = torch.randn(spec.shape, generator=self._generator("router", layer))
            return (values * std).to(spec.dtype)
        base_name, layer, expert, matrix = rest
        value = self._base.tensor(base_name)
        if expert == 0 or self.init == "copy":
            return value
        if self.init == "noise":
            noise = torch.randn(value.shape, generator=self._generator("noise", layer, expert, matrix))
            wide = value.float()
            return (wide + noise * (self._noise_scale * wide.std())).to(value.dtype)
        return self._redrawn(value, layer, expert, matrix)

    def _redrawn(self, value: Tensor, layer: int, expert: int, matrix: str) -> Tensor:
        # One inner dimension is a row of gate and up and a column of down.
        inner = 1 if matrix == "down_proj" else 0
        width = value.shape[inner]
        dimensions = torch.randperm(width, generator=self._generator("drop", layer, expert))
        dimensions = dimensions[: max(1, round(self._drop_ratio * width))]
        wide = value.float().clone()
        replaced = wide.index_select(inner, dimensions)
        fresh = torch.randn(replaced.shape, generator=self._generator("redraw", layer, expert, matrix))
        wide.index_copy_(inner, dimensions, fresh * replaced.std() + replaced.mean())
        return wide.to(value.dtype)

    def _generator(self, *what: Any) -> torch.Generator:
        """A generator of its own for each tensor, so that values do not depend on the order of writing."""
        key = hashlib.sha256(repr((self.seed, *what)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def _natural_order(name: str) -> tuple[Any, ...]:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _prove(
    base: DenseBase, out_dir: Path, plan: _Plan, top_k: int, tolerance: float, tokens: Tensor | None
) -> UpcycleReport:
    """Compares logits of base and result on the probes; raises StepZeroError above the tolerance."""
    parameters = parameters_of(base.tensors)
    if base.reference is None:
        # Its own code knows no other positions.
        tokens = probes_for(base.config, parameters).tokens if tokens is None else tokens
    probes = probes_for(base.config, parameters) if tokens is None else Probes.of(tokens)
    what = f"the upcycled {base.family.moe} differs from its base"
    expected = base.logits(probes.tokens, probes.positions)
    config = AutoConfig.from_pretrained(out_dir)
    with CheckpointReader(out_dir) as result:
        routed = streamed_logits(result, config, base.family, probes.tokens, positions=probes.positions)
        alone = routed
        if plan.init != "copy":
            alone = streamed_logits(
                result, config, base.family, probes.tokens, only_expert=0, positions=probes.positions
            )
    proof = checked(what, alone, expected, tolerance, probes)
    by_reference = None
    if base.reference is not None:
        own = reference_logits(base.reference, config, probes, f"the upcycled {base.family.moe}")
        by_reference = checked(f"{what}'s files", alone, own, tolerance, probes).max_abs_delta
    return UpcycleReport(
        base_model_type=base.family.dense,
        model_type=base.family.moe,
        experts=max(plan.experts),
        experts_per_layer=tuple(plan.experts) if len(set(plan.experts)) > 1 else None,
        top_k=top_k,
        init=plan.init,
        seed=plan.seed,
        proof="as_routed" if plan.init == "copy" else "expert_0",
        max_abs_delta=proof.max_abs_delta,
        as_routed_delta=(routed - expected).abs().max().item(),
        reference_delta=by_reference,
        max_abs_logit=proof.max_abs_logit,
        tolerance=tolerance,
        probe_shape=proof.probe_shape,
        last_position=proof.last_position,
        base_digest=original_digest(base.tensors, base.family, base.tied, vocabulary=original_rows(base.config_dict)),
        base_types=_odd_types(base),
        base_parameters=parameters,
        parameters=sum(torch.Size(spec.shape).numel() for spec in plan.specs),
        notes=_notes(base, plan, top_k),
    )


def _odd_types(base: DenseBase) -> dict[str, str]:
    usual = base.config_dict.get("dtype") or "float32"
    types = {name: str(spec.dtype).removeprefix("torch.") for name, spec in base.tensors.specs.items()}
    return {name: own for name, own in types.items() if own != usual}


def _notes(base: DenseBase, plan: _Plan, top_k: int) -> tuple[str, ...]:
    """Limitations that a user of the checkpoint must know. They are content of upcycle.json: its digest covers them."""
    notes = []
    if top_k == 1:
        notes.append(
            "top_k 1: the one chosen expert has weight 1 after normalisation, so the language modelling loss gives the "
            "router no gradient; only the balance and language prior losses train it. Use top_k 2 to train"
        )
    if plan.init != "copy":
        notes.append(f"init {plan.init}: equal to the base with every token sent to expert 0, not as routed")
    if len(set(plan.experts)) > 1:
        notes.append(
            f"layers hold {min(plan.experts)} to {max(plan.experts)} experts, and the stock {base.family.stock_moe} "
            "holds one number for all: this checkpoint opens with `import eclectus.models` "
            "(models/mixture/layered.py), in no server"
        )
    if misaligned(base.config):
        notes.append(
            "hidden or inner width is no multiple of 8, which grouped matrix products ask for in bf16 (4 in fp32): "
            'open it with from_pretrained(..., experts_implementation="eager")'
        )
    if len(set(base.config_dict.get("layer_types") or [])) > 1:
        notes.append("some layers have a sliding window and some have not: transformers 4.57 gives it to all of them")
    return tuple(notes)
