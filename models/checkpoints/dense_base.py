"""Opening a dense checkpoint for upcycling, with checks that name whatever is wrong.

A base is a directory with safetensors (one file or shards) or a GGUF file, which transformers dequantises into memory.
A directory with its own code is refused unless that code is trusted; then the upcycled model is compared with the
logits of that code, for which the model is held in memory. Before anything is written the tensors are compared with
those of the class: none missing, none unknown, shapes as in the config.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from eclectus.models.checkpoints.families import Family, UnsupportedModelError, family_of
from eclectus.models.checkpoints.gguf import read_gguf
from eclectus.models.checkpoints.side_files import TOKENIZER_CONFIG, copy_side_files, name_tokenizer_for_both
from eclectus.models.checkpoints.streaming import streamed_logits
from eclectus.models.checkpoints.tensor_files import (
    CheckpointError,
    CheckpointReader,
    TensorSource,
    read_config,
)
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
        self._gguf_tokenizer: Any = None
        self._own_model: PreTrainedModel | None = None

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The base's logits in fp32 on tokens `[n, length]`: by its own code if that is trusted, else streamed."""
        if self._own_model is not None:
            return self._own_model(input_ids=tokens).logits
        return streamed_logits(self.tensors, self.config, self.family, tokens)

    @classmethod
    def from_gguf(cls, path: Path) -> "DenseBase":
        """The base in a GGUF file, dequantised. Raises CheckpointError if it cannot be read."""
        model = read_gguf(path)
        base = cls(model.config, family_of(model.config_dict, path), model.tensors, path.parent)
        base.config_dict = model.config_dict
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

    def save(self, out_dir: Path) -> None:
        """Writes the dense checkpoint in safetensors, with tokenizer and generation config."""
        write_checkpoint(out_dir, self.config_dict, self.tensors.specs.values(), self.tensors.tensor)
        self.copy_side_files(out_dir)

    def copy_side_files(self, out_dir: Path) -> None:
        """Copies tokenizer and generation config."""
        if self._gguf_tokenizer is not None:
            self._gguf_tokenizer.save_pretrained(out_dir)
            name_tokenizer_for_both(out_dir / TOKENIZER_CONFIG)
            return
        copy_side_files(self._side_files, out_dir)


def open_base(base_dir: Path, stack: ExitStack, trust_remote_code: bool = False) -> DenseBase:
    """Opens and checks a base; its files stay open until `stack` closes.

    trust_remote_code: whether to run code in the base's directory. Raises CheckpointError for missing or damaged files,
    UnsupportedModelError for a model that cannot be upcycled.
    """
    base = _open(base_dir, stack, trust_remote_code)
    check_tokenizer(base_dir, base.config.vocab_size)
    _check_tensors(base, base_dir)
    return base


def _open(base_dir: Path, stack: ExitStack, trust_remote_code: bool) -> DenseBase:
    if not base_dir.exists():
        raise CheckpointError(f"{base_dir} does not exist; expected a checkpoint directory or a .gguf file")
    if base_dir.is_file():
        if base_dir.suffix != ".gguf":
            raise CheckpointError(f"{base_dir} is a file; expected a checkpoint directory or a .gguf file")
        return DenseBase.from_gguf(base_dir)
    ggufs = sorted(base_dir.glob("*.gguf"))
    if ggufs and not any(base_dir.glob("*.safetensors*")):
        if len(ggufs) > 1:
            raise CheckpointError(f"{base_dir} holds {len(ggufs)} .gguf files; name one of them, such as {ggufs[0]}")
        return DenseBase.from_gguf(ggufs[0])
    raw = read_config(base_dir)
    family_of(raw, base_dir, trust_remote_code)
    if raw.get("auto_map"):
        return DenseBase.with_own_code(base_dir, raw, stack.enter_context(CheckpointReader(base_dir)))
    config = AutoConfig.from_pretrained(base_dir)
    # Checked again with the defaults resolved: layer types follow from other keys.
    family = family_of(config.to_dict(), base_dir)
    reader = stack.enter_context(CheckpointReader(base_dir))
    return DenseBase(config, family, reader, base_dir)


def _check_tensors(base: DenseBase, where: Path) -> None:
    """Raises unless the base's tensors are exactly those of its class, naming the first that is not."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if base.tied:
        expected.pop("lm_head.weight", None)
    present = base.tensors.specs
    for name in [name for name in present if name.endswith("rotary_emb.inv_freq")]:
        del present[name]
    if base.tied and "lm_head.weight" in present:
        if not torch.equal(base.tensors.tensor("lm_head.weight"), base.tensors.tensor("model.embed_tokens.weight")):
            raise UnsupportedModelError(
                f"{where} says tie_word_embeddings: true, but holds a lm_head.weight that differs from its embeddings: "
                "correct config.json or the weights"
            )
        del present["lm_head.weight"]
    if missing := sorted(set(expected) - set(present)):
        raise CheckpointError(f"{where} lacks {len(missing)} tensors that its class has, first {missing[0]}")
    if extra := sorted(set(present) - set(expected)):
        raise CheckpointError(f"{where} holds {len(extra)} tensors that its class does not know, first {extra[0]}")
    for name, shape in expected.items():
        if present[name].shape != shape:
            raise CheckpointError(f"{where}: {name} has shape {present[name].shape}, its config says {shape}")
        if not present[name].dtype.is_floating_point:
            kind = present[name].dtype
            raise UnsupportedModelError(f"{where}: {name} is {kind}, quantised: upcycle the float checkpoint")
