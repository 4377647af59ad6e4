"""Export of a stock checkpoint that transformers 4.57 and 5 and vLLM load, and extraction of the base.

The files hold one tensor per expert and matrix, named as in the original Mixtral and Qwen releases; the config has the
keys of both transformers generations (models/checkpoints/writing.py). Streamed: memory is one expert matrix beyond the
model.

What upcycle.json says about bits is verified at every export: `original_weights` is "unchanged" if expert 0 and the
shared weights, as stored, have the base's digest, "rounded" if they had it before a conversion to `original_dtype`, and
else "changed": they were trained, or the model was loaded in a narrower dtype. Cost: a second reading of these weights.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eclectus.models.checkpoints.byte_level import cut_vocabulary
from eclectus.models.checkpoints.config_file import CheckpointError, read_json_object
from eclectus.models.checkpoints.dense_base import open_base
from eclectus.models.checkpoints.door import check_checkpoint
from eclectus.models.checkpoints.expected_tensors import EMBEDDINGS, HEAD
from eclectus.models.checkpoints.families import Family, moe_family_of
from eclectus.models.checkpoints.proof import prove_extracted
from eclectus.models.checkpoints.side_files import REPORT, VOCABULARIES
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSource, TensorSpec
from eclectus.models.checkpoints.writing import MAX_SHARD_BYTES, Converted, plain_config, write_checkpoint
from eclectus.models.extension.split_vocabulary import BEFORE, original_rows
from eclectus.models.mixture.experts import MoeTensors, original_digest, original_tensors
from eclectus.models.mixture.layered import __file__ as layered_code
from eclectus.models.sharding.together import staged_together
from eclectus.models.staged_folder import staged_folder
from eclectus.models.training.process import Process


class NotTheBaseError(ValueError):
    """The original weights are no longer in the checkpoint, or it does not record what they were."""


def export_checkpoint(
    model_or_dir: PreTrainedModel | str | Path,
    out_dir: str | Path,
    *,
    side_files: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    process: Process | None = None,
) -> Path:
    """Writes an upcycled model, loaded (split or stock) or in a directory, as a stock checkpoint; returns `out_dir`.

    side_files: a checkpoint directory with tokenizer, generation config and upcycle.json; by default the directory
        itself, or the one that the model was loaded from.
    dtype: dtype of the stored floats; by default unchanged. Converting an fp32 copy of a bf16 base back to bf16 gives
        the base's own bits.
    process: of a sharded model; all processes must call this, and each writes a part.
    Raises UnsupportedModelError for a model that is not an upcycled one, ValueError if `out_dir` is not empty or a
    weight is beyond the range of `dtype`.
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
            config = check_checkpoint(from_dir).config
            source = stack.enter_context(CheckpointReader(from_dir))
        side_dir = Path(side_files) if side_files is not None else from_dir
        family = moe_family_of(config, from_dir or "this model")
        config |= {"architectures": [family.architecture], "router_aux_loss_coef": 0.0, "output_router_logits": False}
        if family.moe != family.stock_moe:
            config["auto_map"] = _code_of(family)
        if dtype is not None:
            config["dtype"] = _name(dtype)
        stored = Converted(source, dtype)
        partial = stack.enter_context(staged_together(out_dir, process or Process()))
        write_checkpoint(partial, config, stored.specs.values(), stored.tensor, side_dir, max_shard_bytes, process)
        if process is None or process.is_main:
            _add_records(partial, side_dir, source, family, config, dtype)
    return out_dir


def _add_records(
    partial: Path,
    side_dir: Path | None,
    source: TensorSource,
    family: Family,
    config: dict[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """Adds the code of a layered model and upcycle.json to an export of `source`."""
    if family.moe != family.stock_moe:
        shutil.copyfile(layered_code, partial / Path(layered_code).name)
    if side_dir is not None and (made := _read_report(side_dir)):
        # What counts is what was written.
        with CheckpointReader(partial) as stored:
            made |= _original_weights(made, source, stored, family, config, dtype)
        (partial / REPORT).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _code_of(family: Family) -> dict[str, str]:
    """auto_map of config.json: the classes in the copy of models/mixture/layered.py that the export carries."""
    name = family.architecture.removesuffix("ForCausalLM")
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {auto: f"layered.{name}{ending}" for auto, ending in classes.items()}


def _read_report(folder: Path) -> dict[str, Any]:
    """upcycle.json, empty if there is none. Raises CheckpointError if it cannot be read or has no base_digest."""
    path = folder / REPORT
    if not path.exists():
        return {}
    made = read_json_object(path)
    if not isinstance(made.get("base_digest"), str):
        raise CheckpointError(f"{path} has no base_digest, so it was not written by upcycle: move it away")
    return made


def _original_weights(
    made: dict[str, Any],
    source: TensorSource,
    stored: TensorSource,
    family: Family,
    config: dict[str, Any],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What upcycle.json says about the stored original weights. made: the source's upcycle.json."""
    base, tied, rows = made["base_digest"], bool(config.get("tie_word_embeddings")), original_rows(config)
    if original_digest(stored, family, tied, vocabulary=rows) == base:
        return {"original_weights": "unchanged", "original_dtype": None}
    if dtype is not None and original_digest(source, family, tied, vocabulary=rows) == base:
        return {"original_weights": "rounded", "original_dtype": _name(dtype)}
    if made.get("original_weights") == "rounded" and not was_trained_over(made):
        return {"original_weights": "rounded"}
    return {"original_weights": "changed", "original_dtype": None}


def was_trained_over(made: dict[str, Any]) -> bool:
    """Whether a training named in upcycle.json changed the original weights."""
    return any(stage["method"] == "moe_all" for stage in made.get("trained", []))


def export_dense_checkpoint(dense_dir: str | Path, out_dir: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes a dense checkpoint, checked as a base is, with the keys of both transformers generations; returns
    `out_dir`.

    dtype: of the stored floats; by default unchanged. Raises as open_base, and ValueError as export_checkpoint.
    """
    dense_dir, out_dir = Path(dense_dir), Path(out_dir)
    with ExitStack() as stack:
        base = open_base(dense_dir, stack)
        config = base.config_dict | ({"dtype": _name(dtype)} if dtype is not None else {})
        stored = Converted(base.tensors, dtype)
        partial = stack.enter_context(staged_folder(out_dir))
        write_checkpoint(partial, config, stored.specs.values(), stored.tensor)
        base.copy_side_files(partial)
    return out_dir


def extract_base(moe_dir: str | Path, out_dir: str | Path) -> Path:
    """Extracts the dense base from an upcycled checkpoint, every tensor bit-identical; returns `out_dir`.

    Raises NotTheBaseError if the original weights were trained or rounded (by the digest in upcycle.json) or the
    checkpoint does not record its base.
    """
    moe_dir, out_dir = Path(moe_dir), Path(out_dir)
    config = check_checkpoint(moe_dir).config
    family = moe_family_of(config, moe_dir)
    base_config = config.get("upcycled_from")
    if not base_config:
        raise NotTheBaseError(f"{moe_dir}/config.json has no upcycled_from: it was not written by upcycle or export")
    tied, rows = bool(base_config.get("tie_word_embeddings")), original_rows(config)
    if rows is not None:
        base_config = {key: value for key, value in base_config.items() if key != BEFORE} | {"vocab_size": rows}
    with ExitStack() as stack:
        source = stack.enter_context(CheckpointReader(moe_dir))
        made = _read_report(moe_dir)
        if made and original_digest(source, family, tied, vocabulary=rows) != made["base_digest"]:
            raise NotTheBaseError(_why_not_the_base(moe_dir, made))
        originals = original_tensors(source, family, tied)
        partial = stack.enter_context(staged_folder(out_dir))
        usual, odd, types = base_config.get("dtype"), made.get("base_types", {}), dict[str, torch.dtype]()

        def original(name: str) -> Tensor:
            value = source.tensor(originals[name])
            return value[:rows] if name in (EMBEDDINGS, HEAD) else value

        specs = []
        for name in originals:
            value = original(name)
            types[name] = _narrowed(value, odd.get(name, usual))
            specs.append(TensorSpec(name, types[name], tuple(value.shape)))
        write_checkpoint(partial, base_config, specs, lambda name: original(name).to(types[name]), moe_dir)
        if rows is not None:
            _cut_tokenizer(partial, rows)
        prove_extracted(source, moe_dir, partial)
    return out_dir


def _cut_tokenizer(folder: Path, rows: int) -> None:
    """Takes the tokens out of a tokenizer that were appended to one of so many rows."""
    path = folder / VOCABULARIES[0]
    if path.is_file():
        data = cut_vocabulary(read_json_object(path), rows)
        path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def _why_not_the_base(moe_dir: Path, made: dict[str, Any]) -> str:
    if made.get("original_weights") == "rounded":
        return (
            f"the original weights in {moe_dir} were rounded to {made.get('original_dtype')} by an export with "
            f"--dtype, so the base's own bits (digest {made['base_digest'][:12]}) are not in it: extract the base from "
            "the checkpoint that was exported"
        )
    return (
        f"expert 0 and the shared weights of {moe_dir} are no longer the base's (digest {made['base_digest'][:12]}): "
        "all weights were trained, or they were saved in another dtype; extract the base from an earlier checkpoint"
    )


def _narrowed(value: Tensor, base_type: str | None) -> torch.dtype:
    """The base's dtype if it represents the values exactly (a bf16 base that was trained in fp32), else their own."""
    narrow = getattr(torch, base_type) if base_type else value.dtype
    exact = torch.equal(value.to(narrow).to(value.dtype), value)
    return narrow if exact else value.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def changed_originals(moe_dir: str | Path) -> str | None:
    """What is wrong with the original weights of a mixture that should still hold them, by upcycle.json; else None.

    Weights that were trained, or rounded by an export, are said to be so there. Raises as `extract_base`.
    """
    moe_dir = Path(moe_dir)
    made = _read_report(moe_dir)
    if not made or made.get("original_weights", "unchanged") != "unchanged" or was_trained_over(made):
        return None
    config = check_checkpoint(moe_dir, trust_remote_code=True).config
    with CheckpointReader(moe_dir) as source:
        family, tied = moe_family_of(config, moe_dir), bool(config.get("tie_word_embeddings"))
        found = original_digest(source, family, tied, vocabulary=original_rows(config))
    if found == made["base_digest"]:
        return None
    return f"expert 0 or a shared weight is not the base's any more (SHA-256 {made['base_digest'][:12]} in {REPORT})"
