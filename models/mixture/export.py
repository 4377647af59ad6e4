"""Export of a stock checkpoint that transformers 4.57 and 5 and vLLM load, and extraction of the base.

The files hold one tensor per expert and matrix, named as in the original Mixtral and Qwen releases; the config has the
keys of both transformers generations (models/checkpoints/families.py). Streamed: memory is one expert matrix beyond the
model.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eclectus.models.checkpoints.families import moe_family_of
from eclectus.models.checkpoints.side_files import REPORT
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSource, TensorSpec, read_config
from eclectus.models.checkpoints.writing import plain_config, write_checkpoint
from eclectus.models.mixture.experts import MoeTensors, original_digest, original_tensors
from eclectus.models.staged_folder import staged_folder


class NotTheBaseError(ValueError):
    """The original weights are no longer in the checkpoint, or it does not record what they were."""


def export_checkpoint(
    model_or_dir: PreTrainedModel | str | Path,
    out_dir: str | Path,
    *,
    side_files: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes an upcycled model, loaded (split or stock) or in a directory, as a stock checkpoint; returns `out_dir`.

    side_files: a checkpoint directory with tokenizer, generation config and upcycle.json; by default the directory
        itself, or the one that the model was loaded from.
    dtype: dtype of the stored floats; by default unchanged. Converting an fp32 copy of a bf16 base back to bf16 gives
        the base's own bits.
    Raises UnsupportedModelError for a model that is not an upcycled one, ValueError if `out_dir` is not empty.
    """
    out_dir = Path(out_dir)
    with ExitStack() as stack:
        if isinstance(model_or_dir, PreTrainedModel):
            config = plain_config(model_or_dir.config)
            source: TensorSource = MoeTensors(model_or_dir)
            loaded_from = model_or_dir.config.name_or_path
            from_dir = Path(loaded_from) if loaded_from and Path(loaded_from).is_dir() else None
        else:
            from_dir = Path(model_or_dir)
            config = read_config(from_dir)
            source = stack.enter_context(CheckpointReader(from_dir))
        side_dir = Path(side_files) if side_files is not None else from_dir
        family = moe_family_of(config, from_dir or "this model")
        config |= {"architectures": [family.architecture], "router_aux_loss_coef": 0.0, "output_router_logits": False}
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
        partial = stack.enter_context(staged_folder(out_dir))
        specs = [TensorSpec(s.name, _stored_type(s.dtype, dtype), s.shape) for s in source.specs.values()]
        write_checkpoint(partial, config, specs, _reader(source, dtype), side_dir, max_shard_bytes)
        if side_dir is not None and (side_dir / REPORT).is_file():
            shutil.copyfile(side_dir / REPORT, partial / REPORT)
    return out_dir


def extract_base(moe_dir: str | Path, out_dir: str | Path) -> Path:
    """Extracts the dense base from an upcycled checkpoint, every tensor bit-identical; returns `out_dir`.

    Raises NotTheBaseError if the original weights were trained (by the digest in upcycle.json) or the checkpoint does
    not record its base.
    """
    moe_dir, out_dir = Path(moe_dir), Path(out_dir)
    config = read_config(moe_dir)
    family = moe_family_of(config, moe_dir)
    base_config = config.get("upcycled_from")
    if not base_config:
        raise NotTheBaseError(f"{moe_dir}/config.json has no upcycled_from: it was not written by upcycle or export")
    tied = bool(base_config.get("tie_word_embeddings"))
    with ExitStack() as stack:
        source = stack.enter_context(CheckpointReader(moe_dir))
        made = json.loads((moe_dir / REPORT).read_text("utf-8")) if (moe_dir / REPORT).is_file() else {}
        if made:
            found = original_digest(source, family, tied)
            if found != made["base_digest"]:
                raise NotTheBaseError(
                    f"expert 0 and the shared weights of {moe_dir} are no longer the base's (digest {found[:12]}, "
                    f"base {made['base_digest'][:12]}): all weights were trained, or they are stored in another dtype"
                )
        originals = original_tensors(source, family, tied)
        partial = stack.enter_context(staged_folder(out_dir))
        usual, odd = base_config.get("dtype"), made.get("base_types", {})
        types = {name: _narrowed(source.tensor(o), odd.get(name, usual)) for name, o in originals.items()}
        specs = [TensorSpec(name, types[name], source.specs[o].shape) for name, o in originals.items()]
        write_checkpoint(
            partial, base_config, specs, lambda name: source.tensor(originals[name]).to(types[name]), moe_dir
        )
    return out_dir


def _narrowed(value: Tensor, base_type: str | None) -> torch.dtype:
    """The base's dtype if it represents the values exactly (a bf16 base that was trained in fp32), else their own."""
    narrow = getattr(torch, base_type) if base_type else value.dtype
    exact = torch.equal(value.to(narrow).to(value.dtype), value)
    return narrow if exact else value.dtype


def _stored_type(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and own.is_floating_point else own


def _reader(source: TensorSource, dtype: torch.dtype | None) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        value = source.tensor(name)
        return value.to(_stored_type(value.dtype, dtype))

    return read
