"""The one list of side files: what belongs to a checkpoint beside its weights and config.json.

Every stage and every export copies these files and no others: tokenizer, chat templates, generation config, terms of
use. An allow-list by name, because a folder holds other things too: an adapter's config or the original release's
`consolidated.safetensors` would make the copy open as something else.

Only the standard library is imported here, so that a run that reuses everything can list files without PyTorch.
"""

import glob
import json
import shutil
from pathlib import Path

INDEX = "model.safetensors.index.json"
REPORT = "upcycle.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
# Each is enough for a tokenizer; the names are those of transformers' tokenizer classes.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tiktoken.model",
)
SIDE_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    TOKENIZER_CONFIG,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    GENERATION_CONFIG,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Records about the very weights beside them: copied only together with the weights, unchanged.
RECORDS = (REPORT, "routing_weights.json")
# What a model on the hub is downloaded as: patterns to allow, and weights of another format to leave out.
WANTED = ("config.json", INDEX, "*.safetensors", *SIDE_FILES, *RECORDS)
UNWANTED = ("*/*.safetensors", "consolidated*", "adapter_*")


def side_files(folder: Path) -> list[Path]:
    """Paths, relative to the folder, of its side files, sorted."""
    return _matching(folder, SIDE_FILES)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer."""
    return bool(_matching(folder, VOCABULARIES))


def is_file_name(name: object) -> bool:
    """Whether it names a file in the directory of the file that names it, and nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def checkpoint_files(folder: Path) -> list[Path]:
    """Paths, relative to the folder, of all that makes a checkpoint: weights, config, side files and records.

    Weights are model.safetensors or the files of its index. Code, pickled weights and optimizer states are not listed.
    Raises ValueError for an index that names a file outside the folder.
    """
    weights = ["model.safetensors"]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        weights = [INDEX, *set(index["weight_map"].values())]
        if wrong := [name for name in weights if not is_file_name(name)]:
            raise ValueError(f"{folder / INDEX}: weight_map names {wrong[0]!r}; expected a file in the same directory")
    held = [Path(name) for name in ("config.json", *RECORDS, *weights) if (folder / name).is_file()]
    return sorted({*held, *side_files(folder)})


def gguf_shards(gguf: Path) -> list[Path]:
    """The files of a model in one or several .gguf files (NAME-00001-of-00003.gguf), by any of them, sorted."""
    stem, _, count = gguf.stem.rpartition("-of-")
    if not (count.isdigit() and stem[-6:-5] == "-" and stem[-5:].isdigit()):
        return [gguf]
    pattern = f"{glob.escape(stem[:-5])}[0-9][0-9][0-9][0-9][0-9]-of-{count}.gguf"
    return sorted(gguf.parent.glob(pattern))


def copy_side_files(source: Path, out_dir: Path) -> None:
    """Copies the side files, with names in the tokenizer's config that transformers 4.57 and 5 know.

    Raises ValueError naming a tokenizer_config.json that cannot be read.
    """
    for path in side_files(source):
        (out_dir / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, out_dir / path)
    try:
        name_tokenizer_for_both(out_dir / TOKENIZER_CONFIG)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source / TOKENIZER_CONFIG} is not a JSON object ({error}); fetch it again") from error


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def name_tokenizer_for_both(path: Path) -> None:
    """Replaces names in a tokenizer_config.json that only transformers 5 knows by those that 4.57 and 5 read."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(before, dict):
        raise ValueError(f"it is a {type(before).__name__}")
    config = dict(before)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 4.57 expects extra_special_tokens to be a mapping and fails on a list.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config != before:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
