"""New rows in a model's embeddings and output layer, for tokens that were appended to its tokenizer.

    row of a new token = mean of the rows of its pieces, which are its tokens under the old tokenizer
    old rows, and all other weights, stay bit by bit

So a text without new tokens passes the same hidden states, and the logit of a new token is the mean of its pieces'.
Both are verified before anything is kept: old logits against a plain reading of the base's files (of a mixture, against
its own stock class), new ones against the means of the old. Rows for ids between the old ones and the new, which no
text yields, are the mean of all rows. Streamed: memory for one matrix.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eclectus.models.checkpoints.dense_base import open_base
from eclectus.models.checkpoints.door import check_checkpoint, read_transformers_config
from eclectus.models.checkpoints.expected_tensors import EMBEDDINGS, HEAD
from eclectus.models.checkpoints.families import family_of, moe_family_of
from eclectus.models.checkpoints.proof import TOLERANCE, checked, parameters_of, probes_for, reference_logits
from eclectus.models.checkpoints.side_files import REPORT, SIDE_FILES, copy_side_files, side_files
from eclectus.models.checkpoints.streaming import streamed_logits
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSpec, read_config
from eclectus.models.checkpoints.writing import write_checkpoint
from eclectus.models.extension.split_vocabulary import BEFORE
from eclectus.models.staged_folder import require_new_folder, staged_folder
from eclectus.models.training.parallel import reshard

NEW_TOKENS = "new_tokens.json"
# Largest difference of a new logit from the mean of its pieces', where rows are stored in 16 bits.
ROUNDED = 2e-2
# Terms of use and settings of generation: the model's; the others are the tokenizer's.
OF_THE_MODEL = SIDE_FILES[-4:]


@dataclass(frozen=True)
class NewRows:
    """The comparison of the model with new rows and the one before, and its sizes."""

    vocabulary_before: int
    vocabulary: int
    new_tokens: int
    max_abs_delta: float
    """Largest difference of any logit of an old token over the probes, which hold old tokens."""
    new_max_abs_delta: float
    """Largest difference of any new token's logit from the mean of its pieces'."""
    max_abs_logit: float
    tolerance: float
    probe_shape: tuple[int, ...]
    last_position: int
    parameters: int


def add_new_rows(
    checkpoint: str | Path, tokenizer: str | Path, out_dir: str | Path, tolerance: float = TOLERANCE
) -> NewRows:
    """Writes a dense model or an upcycled mixture with a row for each new token of a tokenizer, and that tokenizer.

    tokenizer: a folder with NEW_TOKENS, {"first": id, "pieces": [ids of each new token]}; without new ones the model
    stays as it is. out_dir: new or empty; written completely or not at all.
    Raises ValueError for a model that has no stock embeddings, StepZeroError above the tolerance.
    """
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    require_new_folder(out_dir)
    found = check_checkpoint(checkpoint)
    if found.kind not in ("dense", "mixture"):
        raise ValueError(
            f"new words are for dense models and for mixtures upcycled here; {checkpoint} is a "
            f"{found.config.get('model_type')!r} model: set extension_vocabulary to 0"
        )
    made = json.loads((Path(tokenizer) / NEW_TOKENS).read_text("utf-8"))
    config, rows = dict(found.config), int(found.config["vocab_size"])
    filler = max(0, made["first"] - rows) if made["pieces"] else 0
    config[BEFORE] = [*config.get(BEFORE, []), rows]
    config["vocab_size"] = rows + filler + len(made["pieces"])
    with staged_folder(out_dir) as partial, CheckpointReader(found.path) as source:
        specs = [_grown(spec, config["vocab_size"]) for spec in source.specs.values()]

        def read(name: str) -> Tensor:
            value = source.tensor(name)
            return _with_new_rows(value, made["pieces"], filler) if name in (EMBEDDINGS, HEAD) else value

        write_checkpoint(partial, config, specs, read)
        _copy_files(checkpoint, Path(tokenizer), partial)
        proof = _prove(checkpoint, partial, found.kind == "mixture", made["pieces"], rows + filler, tolerance)
        return NewRows(rows, config["vocab_size"], len(made["pieces"]), *proof, parameters=_parameters(specs))


def _grown(spec: TensorSpec, rows: int) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (rows, *spec.shape[1:])) if spec.name in (EMBEDDINGS, HEAD) else spec


def _parameters(specs: list[TensorSpec]) -> int:
    return sum(torch.Size(spec.shape).numel() for spec in specs)


def _with_new_rows(table: Tensor, pieces: list[list[int]], filler: int) -> Tensor:
    """table `[V, H]`, with a row for each list of pieces behind `filler` rows of no token."""
    if not pieces:
        return table
    wide = table.float()
    between = wide.mean(0, keepdim=True).expand(filler, -1)
    means = torch.stack([wide[each].mean(0) for each in pieces])
    return torch.cat([table, between.to(table.dtype), means.to(table.dtype)])


def _copy_files(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """The tokenizer's files, and of the checkpoint's those that are not of its old tokenizer."""
    copy_side_files(tokenizer, out)
    for path in side_files(checkpoint):
        if any(path.match(pattern) for pattern in OF_THE_MODEL):
            shutil.copyfile(checkpoint / path, out / path)
    if (checkpoint / REPORT).is_file():
        shutil.copyfile(checkpoint / REPORT, out / REPORT)


def _prove(
    checkpoint: Path, out: Path, mixture: bool, pieces: list[list[int]], first: int, tolerance: float
) -> tuple[float, float, float, float, tuple[int, ...], int]:
    """Compares logits on probes of old tokens; raises StepZeroError. first: id of the first new token."""
    with ExitStack() as stack:
        before = stack.enter_context(CheckpointReader(checkpoint))
        after = stack.enter_context(CheckpointReader(out))
        config, wider = read_transformers_config(checkpoint), read_transformers_config(out)
        probes = probes_for(config, parameters_of(before))
        what = f"{out.name} with new rows"
        if mixture:
            family = moe_family_of(read_config(out), out)
            expected = streamed_logits(before, config, family, probes.tokens, positions=probes.positions)
        else:
            family = family_of(read_config(out), out)
            base = open_base(checkpoint, stack)
            assert base.reference is not None
            expected = reference_logits(base.reference, config, probes, what)
        ours = streamed_logits(after, wider, family, probes.tokens, positions=probes.positions)
        exact = after.specs[EMBEDDINGS].dtype == torch.float32
        old = checked(f"{what} differs from {checkpoint}", ours[..., : expected.shape[-1]], expected, tolerance, probes)
        delta = 0.0
        if pieces:
            means = _means(expected, pieces)
            allowed = tolerance if exact else max(tolerance, ROUNDED)
            delta = checked(
                f"{what}: new logits differ from means", ours[..., first:], means, allowed, probes
            ).max_abs_delta
    return old.max_abs_delta, delta, old.max_abs_logit, tolerance, old.probe_shape, old.last_position


def _means(logits: Tensor, pieces: list[list[int]]) -> Tensor:
    """Mean logit of each list of tokens: `[n, length, V]` to `[n, length, N]`."""
    owner = torch.tensor([number for number, each in enumerate(pieces) for _ in each])
    flat = torch.tensor([token for each in pieces for token in each])
    sizes = torch.tensor([len(each) for each in pieces], dtype=logits.dtype)
    sums = logits.new_zeros(*logits.shape[:-1], len(pieces))
    return sums.index_add_(-1, owner, logits[..., flat]) / sizes


@torch.no_grad()
def new_token_mass(model: Any, tokens: Tensor, first: int) -> dict[str, float]:
    """What new tokens take of the next token's probability on a text without any, and what that costs.

    tokens: `[n, length]`, all below `first`, the id of the first new token. Returns `mass`, its mean over positions,
    and `bits_per_token`, the mean of -log2(1 - mass): so much better the text scores with new tokens closed.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    masses = []
    for row in tokens:
        logits = model(input_ids=row[None].to(device), use_cache=False).logits[0].float()
        everything = logits.logsumexp(-1)
        masses.append((logits[:, first:].logsumexp(-1) - everything).double().exp().cpu())
    model.train(training)
    reshard(model)
    mass = torch.cat(masses)
    return {"mass": mass.mean().item(), "bits_per_token": (-torch.log2((1 - mass).clamp_min(1e-12))).mean().item()}
