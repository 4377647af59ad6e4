"""The one door into a model: every way in checks the checkpoint here first, and opens it here.

    check_checkpoint    headers alone: config.json, the index, names, shapes and types of all tensors; below a second
    open_model          the same, and the model in memory, in fp32, every weight of it read from the files and finite
    dense_base.open_base    the same for upcycling, which streams the tensors

Nothing is left to chance: a tensor that is missing would be initialised at random, another one in every run; one that
is not used, or a config that says other things than the weights, is another model. Messages are one line: file, field
or tensor, remedy. Nothing but safetensors (and GGUF) is read, no code of a checkpoint is run, and an adapter that lies
in the same directory is not loaded. Our readers decide which files count, not the searching of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from eclectus.models.checkpoints.config_file import CONFIG, CheckpointError, check_config, read_config
from eclectus.models.checkpoints.expected_tensors import EMBEDDINGS, HEAD, Expected, expected_tensors
from eclectus.models.checkpoints.families import (
    FAMILIES,
    LAYERED,
    MOE_FAMILIES,
    UnsupportedModelError,
    family_of,
    moe_family_of,
)
from eclectus.models.checkpoints.gguf.reader import read_gguf_config
from eclectus.models.checkpoints.side_files import gguf_shards
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.checkpoints.tokenizer_files import check_tokenizer

Kind = Literal["dense", "mixture", "lory", "other"]
# Their config.json names code beside it, for users without this package; it is not run.
OUR_OWN = ("lory", "expert_choice", "document_pool", *(name for name in MOE_FAMILIES if name.startswith(LAYERED)))
# How a program was run or where a file lay, not what the model is.
NOT_OF_THE_MODEL = ("auto_map", "attn_implementation", "_attn_implementation", "_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Checked:
    """A checkpoint that passed the door.

    path: the directory, or the .gguf file. kind: `dense` (Llama, Mistral, Qwen2, Qwen3), `mixture` (upcycled here),
    `lory`, or `other`: any causal language model of transformers, which can be evaluated only. config: config.json,
    of a .gguf file as it would be.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model is made for, None if it does not say."""
        return self.config.get("max_position_embeddings")


def locate(path: Path) -> Path:
    """The directory with safetensors, or the .gguf file, that a user means by `path`.

    Raises CheckpointError for what is neither, and for a directory that holds several .gguf files and nothing else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint directory or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; expected a checkpoint directory or a .gguf file")
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors*")):
        if len(ggufs) > 1 and gguf_shards(ggufs[0]) != ggufs:
            raise CheckpointError(f"{path} holds {len(ggufs)} .gguf files; name one of them, such as {ggufs[0]}")
        return ggufs[0]
    return path


def check_checkpoint(path: Path, *, to_upcycle: bool = False, trust_remote_code: bool = False) -> Checked:
    """Checks a checkpoint by its headers.

    to_upcycle: whether it must be a dense model that a mixture can be made of. trust_remote_code: whether config.json
    may name code in the directory. Raises CheckpointError for what is damaged or contradicts itself,
    UnsupportedModelError for what cannot be read or, if that is asked for, not be upcycled.
    """
    where = locate(path)
    if where.is_file():
        config = read_gguf_config(where)
        family_of(config, where)
        return Checked(where, "dense", config)
    config = read_config(where)
    kind = _kind(config, where, trust_remote_code)
    if kind != "other":
        check_config(config, where / CONFIG)
    if to_upcycle:
        family_of(config, where, trust_remote_code)
    with CheckpointReader(where) as reader:
        if kind != "other":
            _check_tensors(config, kind, reader)
        _check_types(reader)
        _check_head(config, reader)
    return Checked(where, kind, config)


def _kind(config: dict[str, Any], where: Path, trust_remote_code: bool) -> Kind:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(f"{where / CONFIG}: model_type is {model_type!r}; expected one such as 'llama'")
    if config.get("auto_map") and not trust_remote_code and model_type not in OUR_OWN:
        raise UnsupportedModelError(
            f"{where} brings its own code (auto_map in config.json), which is not run by default: read it, then use "
            "eclectus upcycle --trust-remote-code, or save it from a stock class first (supported: "
            f"{', '.join(FAMILIES)})"
        )
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else "unknown method"
        raise UnsupportedModelError(
            f"{where} is quantised ({method}): give the unquantised checkpoint (without quantization_config)"
        )
    if model_type not in CONFIG_MAPPING and model_type not in OUR_OWN and model_type not in MOE_FAMILIES:
        hint = " (a multimodal one, by its text_config)" if "text_config" in config else ""
        raise UnsupportedModelError(
            f"{where / CONFIG}: model_type {model_type!r} is no model that transformers knows{hint}; bases that can be "
            f"extended: {', '.join(FAMILIES)}"
        )
    architectures = config.get("architectures")
    names = [] if architectures is None else architectures
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise CheckpointError(f"{where / CONFIG}: architectures is {architectures!r}; expected a list of class names")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{where} has is_encoder_decoder in config.json; expected a decoder alone")
    # What else can be evaluated, transformers decides: some of its language models have other endings.
    if model_type in FAMILIES and names and not any(each.endswith("ForCausalLM") for each in names):
        raise UnsupportedModelError(
            f"{where} is a {names[0]!r} (architectures in config.json), expected a causal language model"
        )
    if model_type in FAMILIES:
        return "dense"
    if not isinstance(config.get("upcycled_from"), dict | None):
        raise CheckpointError(f"{where / CONFIG}: upcycled_from is {config['upcycled_from']!r}; expected an object")
    if model_type in MOE_FAMILIES and config.get("upcycled_from"):
        return "mixture"
    return "lory" if model_type == "lory" else "other"


def _check_tensors(config: dict[str, Any], kind: Kind, reader: CheckpointReader) -> None:
    """Raises unless the files hold exactly the tensors that config.json asks for, naming the first that is wrong."""
    where, present = reader.directory, reader.specs
    layers = _layers(list(present))
    if layers != config["num_hidden_layers"]:
        raise CheckpointError(
            f"{where / CONFIG}: num_hidden_layers is {config['num_hidden_layers']}, but the weights have {layers} "
            "layers; correct the one, or fetch the checkpoint again"
        )
    expected = _expected(config, kind, where)
    optional = {HEAD} if config.get("tie_word_embeddings") else set()
    if missing := sorted(expected.keys() - present.keys()):
        hint = _missing_hint(missing, config)
        raise CheckpointError(f"{where} lacks {len(missing)} tensors that its class has, first {missing[0]}; {hint}")
    if extra := sorted(present.keys() - expected.keys() - optional):
        bias = " (attention_bias, mlp_bias)" if extra[0].endswith(".bias") else ""
        raise CheckpointError(
            f"{where} holds {len(extra)} tensors that its class does not know, first {extra[0]}; correct config.json"
            f"{bias}, or give the checkpoint as its own class saved it"
        )
    for name, (shape, fields) in expected.items():
        if present[name].shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {present[name].shape}, its config says {shape} ({fields}); correct "
                "config.json or fetch the weights again"
            )


def _expected(config: dict[str, Any], kind: Kind, where: Path) -> dict[str, Expected]:
    needed = {"mixture": ("num_local_experts", "num_experts_per_tok"), "lory": ("num_experts",)}.get(kind, ())
    if lacking := [name for name in needed if name not in config]:
        raise CheckpointError(f"{where / CONFIG} lacks {lacking[0]}; take it from the original config.json")
    if kind == "mixture":
        family = moe_family_of(config, where)
        return expected_tensors(config, family.dense, family)
    return expected_tensors(config, "llama" if kind == "lory" else config["model_type"], None)


def _layers(names: list[str]) -> int:
    """One more than the largest layer number of any tensor."""
    parts = [name.split(".") for name in names if name.startswith("model.layers.")]
    return max((int(part[2]) + 1 for part in parts if part[2].isdigit()), default=0)


def _missing_hint(missing: list[str], config: dict[str, Any]) -> str:
    if missing[0] == HEAD:
        return (
            "without it the output layer would be random: set tie_word_embeddings to true in config.json if the model "
            "uses its embeddings, else fetch the weights again"
        )
    if missing[0].endswith(".bias"):
        return "correct attention_bias or mlp_bias in config.json, or fetch the weights again"
    return "fetch the checkpoint again, or correct config.json"


def _check_types(reader: CheckpointReader) -> None:
    for name, spec in reader.specs.items():
        if name.endswith(".weight") and not spec.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{reader.directory}: {name} is {str(spec.dtype).removeprefix('torch.')}, quantised: give the float "
                "checkpoint"
            )


def _check_head(config: dict[str, Any], reader: CheckpointReader) -> None:
    """Raises if config.json ties the output layer to the embeddings while the files hold another one."""
    if not config.get("tie_word_embeddings") or not {HEAD, EMBEDDINGS} <= reader.specs.keys():
        return
    head, table = reader.tensor(HEAD), reader.tensor(EMBEDDINGS)
    # Compared as bytes: NaN, which is refused elsewhere by its own name, differs from itself.
    if head.shape != table.shape or not torch.equal(head.view(torch.uint8), table.view(torch.uint8)):
        raise UnsupportedModelError(
            f"{reader.directory} says tie_word_embeddings: true, but holds a {HEAD} that differs from its embeddings: "
            "correct config.json or the weights"
        )


def read_transformers_config(directory: Path) -> PretrainedConfig:
    """The config of transformers, with every default resolved. Raises CheckpointError for what transformers refuses."""
    values = read_config(directory)
    try:
        return AutoConfig.for_model(**{key: value for key, value in values.items() if key not in NOT_OF_THE_MODEL})
    except Exception as error:  # what a class raises is its own affair, and there are hundreds of classes
        raise CheckpointError(f"{directory / CONFIG} is refused by transformers: {_one_line(error)}") from error


def open_model(directory: str | Path, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """The checked causal language model in a checkpoint directory, in eval mode.

    dtype: of its parameters; None: the one that config.json names. Every parameter comes from the files. Raises
    CheckpointError naming a tensor that is missing, unknown, of another shape or not finite, UnsupportedModelError for
    a model that cannot be read.
    """
    import eclectus.models  # noqa: F401  (registers our classes with transformers)

    checked = check_checkpoint(Path(directory))
    if checked.path.is_file():
        raise CheckpointError(f"{checked.path} is a GGUF file, which fetch makes a checkpoint directory of")
    config = read_transformers_config(checked.path)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{directory}: model_type {config.model_type} in config.json is no causal language model of transformers"
        )
    own = str(config.dtype or torch.float32).removeprefix("torch.")
    model = _load(checked.path, config, dtype or getattr(torch, own))
    check_finite(model.state_dict().items(), directory)
    model.name_or_path = model.config._name_or_path = str(directory)
    # A generation config from the world may be one that save_pretrained refuses, after the training; the file itself is
    # a side file, which is copied as it is.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _load(directory: Path, config: PretrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with all its weights, as transformers loads them from the tensors that our reader found."""
    model_class = cast(type[PreTrainedModel], AutoModelForCausalLM._model_mapping[type(config)])
    with CheckpointReader(directory) as reader, ExitStack() as stack:
        state = _lazily(reader, stack)
        try:
            loaded: Any = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        except Exception as error:
            raise CheckpointError(
                f"{directory} cannot be loaded as a {model_class.__name__}: {_one_line(error)}"
            ) from error
    model, info = loaded
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, info[f"{what}_keys"])):
            raise CheckpointError(
                f"{directory}: the weights do not fit config.json: {len(names)} {what} tensors, first {names[0]}; both "
                "must come from one save_pretrained"
            )
    return model


def _lazily(reader: CheckpointReader, stack: ExitStack) -> dict[str, Any]:
    """The tensors as slices that transformers reads one at a time. Raises CheckpointError naming a damaged file."""
    files: dict[Path, Any] = {}
    state = {}
    for name in reader.specs:
        path = reader.file_of(name)
        if path not in files:
            try:
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {_one_line(error)}; fetch it again") from error
        state[name] = files[path].get_slice(name)
    return state


def check_contents(checked: Checked) -> None:
    """The rest of the check, which reads all weights and the tokenizer, at the speed of the disk.

    Raises CheckpointError, UnsupportedModelError. A .gguf file is checked when it is read.
    """
    if checked.path.is_file():
        return
    if checked.kind != "other":
        check_tokenizer(checked.path, checked.config["vocab_size"])
    with CheckpointReader(checked.path) as reader:
        check_finite(((name, reader.tensor(name)) for name in reader.specs), checked.path)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str | Path, first: int = 0) -> None:
    """Raises CheckpointError naming the first tensor, and the row of it, that holds NaN or an infinity.

    tensors: pairs of name and tensor, which may be read one at a time. first: the row of the whole tensor at which they
    begin.
    """
    for name, value in tensors:
        # The sum of finite numbers is finite unless it overflows, and costs a tenth of looking at each.
        if not value.is_floating_point() or value.sum(dtype=torch.float64).isfinite():
            continue
        rows = (~value.isfinite()).reshape(len(value) if value.dim() else 1, -1).any(1).nonzero().flatten().tolist()
        if rows:
            what = "NaN" if value.isnan().any() else "an infinity"
            more = f" and {len(rows) - 1} others" if len(rows) > 1 else ""
            raise CheckpointError(
                f"{where}: {name} holds {what} in row {first + rows[0]}{more}; fetch the weights again, train them "
                "again with a lower learning rate, or set rows that no token uses to 0"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
