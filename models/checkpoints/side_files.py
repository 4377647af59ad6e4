"""The one list of side files: what belongs to a checkpoint beside its weights and config.json."""

import json
import shutil
from pathlib import Path

REPORT = "upcycle.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def copy_side_files(source: Path, out_dir: Path) -> None:
    """Copies the small files that are neither weights nor config: tokenizer, chat template, generation config.

    An artifact's manifest and a Lory model's routing profiles describe the source alone and are not copied.
    """
    skipped = {"config.json", REPORT, "manifest.json", "routing_weights.json"}
    for path in sorted(source.iterdir()):
        is_side = path.suffix in (".json", ".model", ".txt", ".jinja", ".tiktoken") and ".safetensors" not in path.name
        if path.is_file() and is_side and path.name not in skipped and not path.name.endswith(".bin.index.json"):
            shutil.copyfile(path, out_dir / path.name)
    name_tokenizer_for_both(out_dir / TOKENIZER_CONFIG)


def name_tokenizer_for_both(path: Path) -> None:
    """Replaces names in a tokenizer_config.json that only transformers 5 knows by those that 4.57 and 5 read."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    config = dict(before)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 4.57 expects extra_special_tokens to be a mapping and fails on a list.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config != before:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
