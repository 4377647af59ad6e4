"""A static embedding model: a text's embedding is the mean of its tokens' vectors, computed with NumPy and SciPy.

Saved as a sentence-transformers directory, but read without torch and sentence-transformers, which take seconds to
import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np

from eclectus.storage.artifact import Draft
from eclectus.storage.errors import EclectusError

WEIGHTS = "model.safetensors"


class StaticModel:
    """A tokenizer and a vector for each of its tokens [V, D]; a text's embedding is the mean of its tokens' vectors."""

    def __init__(self, tokenizer: Any, weights: np.ndarray) -> None:
        self.tokenizer, self.weights = tokenizer, weights

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads a sentence-transformers directory for which `is_static_model` is true. Raises EclectusError."""
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        # The library raises plain Exception.
        except Exception as error:
            raise EclectusError(f"{path} cannot be read as a tokenizer ({error}); fetch the model again") from error
        tokenizer.no_padding()
        weights = np.asarray(load_file(folder / WEIGHTS)["embedding.weight"], np.float32)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= len(weights):
            raise EclectusError(
                f"{path} has token id {largest}, but {WEIGHTS} holds {len(weights)} vectors: this tokenizer is not the "
                "model's; give the model's own"
            )
        return cls(tokenizer, weights)

    def save(self, out: Draft) -> None:
        """Writes the directory that `SentenceTransformer(path)` opens."""
        from safetensors.numpy import save_file

        save_file({"embedding.weight": self.weights}, out.file(WEIGHTS))
        self.tokenizer.save(str(out.file("tokenizer.json")))
        out.file("1_Normalize/config.json").write_text("{}")
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, (name, path) in enumerate((("StaticEmbedding", ""), ("Normalize", "1_Normalize")))
        ]
        out.file("modules.json").write_text(json.dumps(modules, indent=1))
        out.file("config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "cosine"}))

    def encode(self, texts: list[str]) -> np.ndarray:
        """Means float32 [N, D], not normalised; zeros for a text without tokens. Bits do not depend on the batch."""
        tokens, lengths = flat_tokens(self.tokenizer, texts)
        return _mean_vectors(tokens, lengths, self.weights)


def flat_tokens(tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts end to end, int32, and the number of tokens of each text, int64 [N]."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    parts = [np.array(encoding.ids, np.int32) for encoding in encodings]
    return np.concatenate([np.empty(0, np.int32), *parts]), np.array([len(part) for part in parts], np.int64)


def _mean_vectors(tokens: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean vectors float32 [N, D] of consecutive runs of tokens of these lengths [N]."""
    return averaging_matrix(tokens, lengths, len(weights)) @ weights


def averaging_matrix(tokens: np.ndarray, lengths: np.ndarray, vocabulary: int) -> Any:
    """The sparse matrix float32 [N, V] that averages token vectors over runs of these lengths [N]."""
    import scipy.sparse

    shares = np.repeat((1 / np.maximum(lengths, 1)).astype(np.float32), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return scipy.sparse.csr_matrix((shares, tokens, offsets), shape=(len(lengths), vocabulary))


def is_static_model(folder: Path) -> bool:
    """Whether a sentence-transformers directory holds only a static model, which `StaticModel` can read."""
    if not all((folder / name).is_file() for name in ("modules.json", "tokenizer.json", WEIGHTS)):
        return False
    modules = json.loads((folder / "modules.json").read_text())
    names = [module["type"].rpartition(".")[2] for module in modules]
    plain = names[:1] == ["StaticEmbedding"] and set(names[1:]) <= {"Normalize"} and not modules[0]["path"]
    # Vectors under other names, as other libraries write them, are left to sentence-transformers.
    with open(folder / WEIGHTS, "rb") as file:
        return plain and b'"embedding.weight"' in file.read(4096)
