"""Tokenizer: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer by name or path.

Byte-level BPE covers every text from 256 bytes up, so no token is ever unknown. It is trained on training documents
only, on an equal number of bytes of every language, so that no language takes all merges. Price: about 1 second per
megabyte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.table import TRAINING, read_batches
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.step import step

END_OF_DOCUMENT = "<|endoftext|>"
TRAINED_HERE = "train"


class TokenizerSettings(Settings):
    tokenizer: str = Field(
        TRAINED_HERE,
        description="'train' trains a byte-level BPE on the corpus; anything else is the name or path of a "
        "Hugging Face tokenizer.",
        json_schema_extra=BASIC,
    )
    tokenizer_vocabulary: int = Field(
        4096,
        ge=300,
        le=1_000_000,
        description="Vocabulary size of a tokenizer that is trained here.",
        json_schema_extra=BASIC,
    )
    tokenizer_sample_megabytes: float = Field(
        8.0, gt=0, description="Text to train the tokenizer on, in MB over all languages, in equal parts."
    )


@step(makes="tokenizer", version=1)
def tokenizer(documents: Artifact, settings: TokenizerSettings, out: Draft) -> None:
    """Trains or downloads the tokenizer: a directory that `AutoTokenizer.from_pretrained` opens."""
    tokens = _train(documents, settings) if settings.tokenizer == TRAINED_HERE else _fetch(settings.tokenizer)
    tokens.save_pretrained(str(out.path))
    out.rows = len(tokens)
    out.statistics = {"vocabulary": len(tokens), "end_of_document": tokens.eos_token, "origin": settings.tokenizer}


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder, with an end-of-document token. Runs no code from the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _train(documents: Artifact, settings: TokenizerSettings) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.tokenizer_vocabulary,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(documents, int(settings.tokenizer_sample_megabytes * 1e6)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_DOCUMENT, bos_token=END_OF_DOCUMENT)


def _sample(documents: Artifact, budget: int) -> Iterator[str]:
    """Texts of the training split, up to an equal number of bytes per language."""
    languages = {
        language
        for batch in read_batches(documents, ["language"], TRAINING)
        for language in batch["language"].unique().to_pylist()
    }
    left: dict[str, int] = defaultdict(lambda: budget // max(1, len(languages)))
    for batch in read_batches(documents, ["text", "language", "bytes"], TRAINING):
        for text, language, size in zip(*(batch[name].to_pylist() for name in batch.schema.names), strict=True):
            if left[language] > 0:
                left[language] -= size
                yield text


def _fetch(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokens = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EclectusError(
            f"setting 'tokenizer' is '{name}', which is no tokenizer here or on the hub: {first}"
        ) from error
    if tokens.eos_token_id is None:
        raise EclectusError(
            f"tokenizer '{name}' has no end-of-sequence token, which separates documents; choose another"
        )
    return tokens
