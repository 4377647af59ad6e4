"""The one door for tokenizers: reading the tokenizer of a directory, with checks that name the file that is wrong."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.tensor_files import CheckpointError


def check_tokenizer(base_dir: Path, vocabulary: int) -> None:
    """Checks that the tokenizer in a directory, if there is one, can be read and belongs to the model.

    vocabulary: tokens of the model's embeddings. Raises CheckpointError, UnsupportedModelError.
    """
    if not base_dir.is_dir():
        return
    path = base_dir / "tokenizer.json"
    if path.is_file():
        largest = _largest_id(json.loads(path.read_text(encoding="utf-8")))
    else:
        others = [base_dir / name for name in ("tokenizer.model", "vocab.json") if (base_dir / name).is_file()]
        if not others:
            return
        path = others[0]
        try:
            largest = max(AutoTokenizer.from_pretrained(base_dir).get_vocab().values())
        except (OSError, ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{path} cannot be read as a tokenizer ({first}); repair it, or move it away"
            ) from error
    if largest >= vocabulary:
        raise UnsupportedModelError(
            f"{path} has token id {largest}, but the model's vocabulary has {vocabulary}: "
            "this tokenizer is not the model's"
        )


def _largest_id(tokenizer: dict[str, Any]) -> int:
    """The largest token id of a tokenizer.json, -1 if it has none."""
    vocab = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    return max([-1, *ids, *(token["id"] for token in tokenizer.get("added_tokens", []))])
