"""Opening a dense checkpoint for upcycling, with checks that name whatever is wrong.

A base is a directory with safetensors (one file or shards) or a GGUF file, dequantised one tensor at a time.
A directory with its own code is refused unless that code is trusted; then the upcycled model is compared with the
logits of that code, for which the model is held in memory.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from eclectus.models.checkpoints.door import check_checkpoint, check_finite, read_transformers_config
from eclectus.models.checkpoints.expected_tensors import HEAD
from eclectus.models.checkpoints.families import Family, family_of
from eclectus.models.checkpoints.gguf.reader import read_gguf
from eclectus.models.checkpoints.proof import StepZero, prove_files
from eclectus.models.checkpoints.reference import ReferenceModel, reference_of
from eclectus.models.checkpoints.side_files import TOKENIZER_CONFIG, copy_side_files, name_tokenizer_for_both
from eclectus.models.checkpoints.streaming import streamed_logits
from eclectus.models.checkpoints.tensor_files import CheckpointReader, TensorSource
from eclectus.models.checkpoints.tokenizer_files import check_tokenizer
from eclectus.models.checkpoints.writing import plain_config, write_checkpoint


class DenseBase:
    """An opened base: its config with every default resolved, its tensors, and its tokenizer files."""

    def __init__(self, config: PretrainedConfig, family: Family, tensors: TensorSource, side_files: Path) -> None:
        self.config = config
        self.family = family
        self.tensors = tensors
        self.config_dict = plain_config(config)
        self.tied = bool(config.tie_word_embeddings)
        self._side_files = side_files
        self.reference: ReferenceModel | None = None
        """Another reading of the same files, by which proofs are made; None for a base with its own code."""
        self._gguf_tokenizer: Any = None
        self._own_model: PreTrainedModel | None = None

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The base's logits in fp32 on tokens `[n, length]`: by its own code if that is trusted, else streamed.

        positions: of the tokens, by default 0, 1, 2, ...; own code is given none.
        """
        if self._own_model is not None:
            return self._own_model(input_ids=tokens).logits
        return streamed_logits(self.tensors, self.config, self.family, tokens, positions=positions)

    @classmethod
    def from_gguf(cls, path: Path) -> "DenseBase":
        """The base in a GGUF file, dequantised. Raises CheckpointError if it cannot be read."""
        model = read_gguf(path)
        base = cls(model.config, family_of(model.config_dict, path), model.tensors, path.parent)
        base.config_dict = model.config_dict
        base.reference = model.reference
        base._gguf_tokenizer = model.tokenizer
        return base

    @classmethod
    def with_own_code(cls, base_dir: Path, raw: dict[str, Any], tensors: TensorSource) -> "DenseBase":
        """A base whose config.json (`raw`) names code in the same directory. Runs that code."""
        stock = {key: value for key, value in raw.items() if key != "auto_map"}
        config = AutoConfig.for_model(**stock)
        base = cls(config, family_of(config.to_dict(), base_dir), tensors, base_dir)
        base._own_model = AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=torch.float32, trust_remote_code=True
        ).eval()
        return base

    def save(self, out_dir: Path) -> StepZero | None:
        """Writes the dense checkpoint in safetensors, with tokenizer and generation config; returns its proof.

        Raises StepZeroError if what was written does not compute what the base's files say.
        """
        write_checkpoint(out_dir, self.config_dict, self.tensors.specs.values(), self.tensors.tensor)
        self.copy_side_files(out_dir)
        return prove_files(out_dir, self.reference, f"the {self.family.dense} read") if self.reference else None

    def copy_side_files(self, out_dir: Path) -> None:
        """Copies tokenizer and generation config."""
        if self._gguf_tokenizer is not None:
            self._gguf_tokenizer.save_pretrained(out_dir)
            name_tokenizer_for_both(out_dir / TOKENIZER_CONFIG)
            return
        copy_side_files(self._side_files, out_dir)


def open_base(base_dir: Path, stack: ExitStack, trust_remote_code: bool = False) -> DenseBase:
    """Opens a base through the door (models/checkpoints/door.py); its files stay open until `stack` closes.

    trust_remote_code: whether to run code in the base's directory. Raises CheckpointError for missing or damaged files,
    UnsupportedModelError for a model that cannot be upcycled.
    """
    checked = check_checkpoint(base_dir, to_upcycle=True, trust_remote_code=trust_remote_code)
    if checked.path.is_file():
        base = DenseBase.from_gguf(checked.path)
    else:
        reader = stack.enter_context(CheckpointReader(checked.path))
        if checked.config.get("auto_map"):
            base = DenseBase.with_own_code(checked.path, checked.config, reader)
        else:
            config = read_transformers_config(checked.path)
            # Asked again with the defaults resolved: layer types follow from other keys.
            base = DenseBase(config, family_of(config.to_dict(), checked.path), reader, checked.path)
            base.reference = reference_of(checked.config, base.config_dict, reader, checked.path)
    if base.tied:
        # The door has compared it with the embeddings.
        base.tensors.specs.pop(HEAD, None)
    check_tokenizer(checked.path, base.config.vocab_size)
    check_finite(((name, base.tensors.tensor(name)) for name in base.tensors.specs), checked.path)
    return base
