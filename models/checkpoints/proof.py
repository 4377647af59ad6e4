"""Step-0 proofs: a converted model computes what the files of its base say, or it is not written.

    probes     two rows of seeded random tokens: one at positions 0, 1, 2, ..., one stretched over all positions that
               the model has, so that a wrong scaling of positions shows however short the row is
    expected   the plain forward pass of models/checkpoints/reference.py in float64, which reads config and tensors
               itself: a proof that transformers makes of its own reading would not notice what it drops
    allowed    `tolerance` of the largest absolute logit (at least of 1)

The angle per position is compared first, within `FREQUENCY`, and the reference then takes the model's: at position
100,000 the last bit of an fp32 frequency moves a logit by more than any tolerance worth having.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from eclectus.models.checkpoints.config_file import read_config
from eclectus.models.checkpoints.door import read_transformers_config
from eclectus.models.checkpoints.families import family_of, moe_family_of
from eclectus.models.checkpoints.reference import ReferenceModel, reference_of
from eclectus.models.checkpoints.streaming import logits_at, streamed_logits
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSource
from eclectus.models.checkpoints.writing import plain_config
from eclectus.models.training.parallel import reshard
from eclectus.models.training.process import Process

TOLERANCE = 1e-4
# Relative difference of two computations of an fp32 frequency, with room for the power function's own error.
FREQUENCY = 1e-5
SHORTEST, LONGEST = 64, 2048
# Rows are as long as these allow: floating-point operations of one forward pass, and logits in memory.
OPERATIONS, LOGITS = 250e9, 2**24


class StepZeroError(RuntimeError):
    """The new checkpoint does not compute what its base computes; nothing was left on disk."""


@dataclass(frozen=True)
class Probes:
    """Tokens to compare two models on."""

    tokens: Tensor
    """Token ids `[n, length]`."""
    positions: Tensor
    """Their positions, of the same shape."""

    @property
    def last_position(self) -> int:
        """The largest position."""
        return int(self.positions.max())

    def first(self, limit: int) -> "Probes":
        """The first `limit` tokens of each row, at positions below `limit`."""
        return Probes(self.tokens[:, :limit], self.positions[:, :limit].clamp_max(limit - 1))

    @classmethod
    def of(cls, tokens: Tensor) -> "Probes":
        """The given tokens at the positions 0, 1, 2, ..."""
        return cls(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


def probes_for(config: PretrainedConfig, parameters: int) -> Probes:
    """Probes for a model: as long as its positions, as far as that is cheap. parameters: of a forward pass."""
    limit, vocabulary = config.max_position_embeddings, config.vocab_size
    cheap = int(min(LONGEST, OPERATIONS / (4 * max(1, parameters)), LOGITS / vocabulary))
    length = min(limit, max(SHORTEST, cheap))
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    stretched = torch.linspace(0, limit - 1, length, dtype=torch.float64).round().long()
    return Probes(tokens, torch.stack([torch.arange(length), stretched]))


@dataclass(frozen=True)
class StepZero:
    """The proof that a model computes what its base's files say."""

    max_abs_delta: float
    """Largest difference of any logit over the probes."""
    max_abs_logit: float
    tolerance: float
    """Largest allowed difference, as a share of the largest absolute logit (at least of 1)."""
    probe_shape: tuple[int, ...]
    last_position: int
    """Largest position of the probes."""


def checked(what: str, ours: Tensor, expected: Tensor, tolerance: float, probes: Probes) -> StepZero:
    """Compares logits `[n, length, vocabulary]`. Raises StepZeroError above the tolerance. what: named in the error."""
    delta, largest = (ours - expected).abs().max().item(), expected.abs().max().item()
    allowed = tolerance * max(1.0, largest)
    if not delta <= allowed:
        raise StepZeroError(
            f"{what} by {delta:.3g} in a logit; {allowed:.3g} is allowed ({tolerance:g} of the largest), nothing was "
            "written. A base in an unusual configuration is the likely reason; raise the tolerance only if the "
            "difference is rounding"
        )
    return StepZero(delta, largest, tolerance, tuple(probes.tokens.shape), probes.last_position)


def reference_logits(reference: ReferenceModel, config: PretrainedConfig, probes: Probes, what: str) -> Tensor:
    """The reference's logits in float64, at the frequencies that transformers computes from `config`.

    Raises StepZeroError if these are not the reference's. what: the model, named in the error.
    """
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    return reference_logits_with(reference, kind(config=config), probes, what)


def reference_logits_with(reference: ReferenceModel, rotary: Any, probes: Probes, what: str) -> Tensor:
    """`reference_logits` at the frequencies of a rotary module of transformers."""
    rotary(torch.zeros(1), probes.positions)  # Some kinds compute their frequencies from the positions.
    found = rotary.inv_freq.detach().cpu()
    own = reference.rope.frequencies(reference.head_width, probes.last_position + 1)
    if found.shape != own.shape:
        raise StepZeroError(
            f"{what} rotates {2 * len(found)} dimensions of a head, transformers read; its files say {2 * len(own)}"
        )
    worst = ((found.double() - own) / own).abs().max().item()
    scale = float(rotary.attention_scaling)
    if not (worst <= FREQUENCY and abs(scale - reference.rope.scale) <= FREQUENCY):
        raise StepZeroError(
            f"transformers computes other rotary positions for {what} than its files say ({reference.rope.kind}): a "
            f"frequency differs by {worst:.2g} of itself, the scale is {scale:.6g} instead of "
            f"{reference.rope.scale:.6g}; nothing was written. Correct rope_parameters (and rope_scaling, rope_theta) "
            "in config.json"
        )
    return reference.logits(probes.tokens, probes.positions, found)


def prove_start(
    model: nn.Module, checkpoint: Path, what: str, tolerance: float = TOLERANCE, process: Process | None = None
) -> StepZero | None:
    """Compares a model in memory with a plain reading of the dense checkpoint that it was made of.

    what: the model, named in errors. process: of a sharded model, whose processes must all call this; as `compared`.
    """
    with CheckpointReader(checkpoint) as reader:
        config = read_transformers_config(checkpoint)
        reference = reference_of(read_config(checkpoint), plain_config(config), reader, checkpoint)
        probes = probes_for(config, parameters_of(reader))
        rotary = next(module for module in model.modules() if hasattr(module, "attention_scaling"))
        return compared(
            lambda: reference_logits_with(reference, rotary, probes, what),
            logits_of(model, probes),
            probes,
            f"{what} differs from {checkpoint}",
            tolerance,
            process,
        )


def prove_as_stored(
    model: nn.Module, checkpoint: Path, what: str, tolerance: float = TOLERANCE, process: Process | None = None
) -> StepZero | None:
    """Compares a mixture of experts in memory, in its form for training, with the stock class on the stored tensors.

    As `prove_start`; also for a Lory model.
    """
    with CheckpointReader(checkpoint) as reader:
        config, raw = read_transformers_config(checkpoint), read_config(checkpoint)
        family = None if raw.get("model_type") == "lory" else moe_family_of(raw, checkpoint)
        probes = probes_for(config, parameters_of(reader))
        return compared(
            lambda: streamed_logits(reader, config, family, probes.tokens, positions=probes.positions),
            logits_of(model, probes),
            probes,
            f"{what} differs from {checkpoint}",
            tolerance,
            process,
        )


def compared(
    expected: Callable[[], Tensor],
    ours: Tensor,
    probes: Probes,
    what: str,
    tolerance: float,
    process: Process | None = None,
) -> StepZero | None:
    """`checked`, by rank 0 alone; None on the other ranks.

    process: of a sharded model; all processes must call this, and all of them raise StepZeroError above the tolerance.
    """
    process, proof, fault = process or Process(), None, None
    if process.is_main:
        try:
            proof = checked(what, ours, expected(), tolerance, probes)
        except StepZeroError as error:
            fault = str(error)
    if fault := process.gather(fault)[0]:
        raise StepZeroError(fault)
    return proof


def prove_files(directory: Path, reference: ReferenceModel, what: str, tolerance: float = TOLERANCE) -> StepZero:
    """Compares a dense checkpoint just written, as transformers reads it, with the reference of what it was made of.

    what: the checkpoint, named in errors. Raises StepZeroError above the tolerance.
    """
    with CheckpointReader(directory) as reader:
        config = read_transformers_config(directory)
        family = family_of(read_config(directory), directory)
        probes = probes_for(config, parameters_of(reader))
        expected = reference_logits(reference, config, probes, what)
        ours = streamed_logits(reader, config, family, probes.tokens, positions=probes.positions)
    return checked(f"{what} differs from what it was made of", ours, expected, tolerance, probes)


def prove_extracted(source: TensorSource, moe_dir: Path, base_dir: Path, tolerance: float = TOLERANCE) -> StepZero:
    """Compares a base extracted from a mixture, by a plain reading, with that mixture's expert 0 in its stock class.

    source: the mixture's tensors. Raises StepZeroError above the tolerance.
    """
    config, family = read_transformers_config(moe_dir), moe_family_of(read_config(moe_dir), moe_dir)
    with CheckpointReader(base_dir) as reader:
        resolved = read_transformers_config(base_dir)
        reference = reference_of(read_config(base_dir), plain_config(resolved), reader, base_dir)
        probes = probes_for(resolved, parameters_of(reader))
        expected = reference_logits(reference, config, probes, f"the mixture {moe_dir}")
    ours = streamed_logits(source, config, family, probes.tokens, only_expert=0, positions=probes.positions)
    # The mixture may have more rows, for words that the base does not know.
    ours = ours[..., : expected.shape[-1]]
    return checked(f"the base extracted from {moe_dir} differs from its expert 0", ours, expected, tolerance, probes)


def logits_of(model: nn.Module, probes: Probes) -> Tensor:
    """A model's logits on the probes, as in evaluation, on the CPU."""
    training, device = model.training, next(model.parameters()).device
    logits = logits_at(model.eval(), probes.tokens.to(device), probes.positions.to(device)).cpu()
    model.train(training)
    reshard(model)
    return logits


def parameters_of(source: TensorSource) -> int:
    """Number of values in all tensors."""
    return sum(torch.Size(spec.shape).numel() for spec in source.specs.values())
