"""Tokenizer: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer by name or path.

Byte-level BPE covers every text from 256 bytes up, so no token is ever unknown. It is trained on training documents
only, on an equal number of bytes of every language, so that no language takes all merges
(tasks/packing/tokenizer_training.py). Price: half a second to 2.5 seconds per megabyte, whatever the text.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_tree, hash_allowed
from eclectus.tasks.packing.tokenizer_training import sample, train_bpe
from eclectus.tasks.run import current_run
from eclectus.tasks.settings import BASIC, LaterSetting, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.fetch_model import listing
from eclectus.tasks.training.without_torch import without_torch

END_OF_DOCUMENT = "<|endoftext|>"
TRAINED_HERE = "train"
# Only in the artifact of a tokenizer that puts tokens before every text.
BEGIN_FILE = "begin_of_document.json"


class TokenizerSettings(Settings):
    tokenizer: str = Field(
        TRAINED_HERE,
        description="'train' trains a byte-level BPE on the corpus; anything else is the name or path of a "
        "Hugging Face tokenizer. Models are evaluated with their own; this one serves those that bring none.",
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

    def check_together(self) -> None:
        super().check_together()
        # Within a run it is checked already, or that of an artifact.
        if self.tokenizer != TRAINED_HERE and current_run() is None:
            check_given(self.tokenizer)


class BeginSettings(Settings):
    """Whether documents begin with a token of their own, in training and in evaluation."""

    # With auto the tokenizer decides, whose digest is in the key.
    begin_of_document: Literal["auto", "always", "never"] = LaterSetting(
        "auto",
        description="Whether the beginning-of-sequence token precedes every document, in packing and evaluation: auto "
        "follows the tokenizer's own rule for a text, always puts it, never leaves it out.",
    )

    def begin(self, tokenizer: Any) -> list[int]:
        """The token ids that precede every document. Raises EclectusError where there must be one and is none."""
        from eclectus.models.checkpoints.tokenizer_files import text_frame

        if self.begin_of_document == "never":
            return []
        own = text_frame(tokenizer)[0]
        if own or self.begin_of_document == "auto":
            return own
        if tokenizer.bos_token_id is None:
            raise EclectusError(
                "begin_of_document is always, but the tokenizer has no beginning-of-sequence token; name a bos_token "
                "in its tokenizer_config.json, or set begin_of_document to auto"
            )
        return [tokenizer.bos_token_id]


def fingerprint(settings: TokenizerSettings) -> dict[str, str]:
    """Digests of the files of a tokenizer in a folder, or the commit of one on the hub; nothing if it is trained."""
    if settings.tokenizer == TRAINED_HERE:
        return {}
    folder = Path(settings.tokenizer).expanduser()
    if _is_path(settings.tokenizer):
        what = f"setting 'tokenizer' of '{settings.tokenizer}'"
        check_tree(folder, what, depth=2)
        return {f"tokenizer {path.relative_to(folder)}": hash_allowed(path, what) for path in _files(folder)}
    return {"tokenizer": f"commit-{_commit(settings.tokenizer)}"}


@step(makes="tokenizer", version=2, fingerprint=fingerprint)
def tokenizer(documents: Artifact | None, settings: TokenizerSettings, out: Draft) -> None:
    """Trains, copies or downloads the tokenizer: a directory that `AutoTokenizer.from_pretrained` opens.

    documents: to train on; None for one that exists.
    """
    from eclectus.models.checkpoints.tokenizer_files import text_frame, vocabulary_size

    if settings.tokenizer != TRAINED_HERE:
        tokens = _fetch(settings)
    elif documents is not None:
        tokens = _train(documents, settings)
    else:
        raise EclectusError("a tokenizer is trained on documents, and none were given")
    tokens.save_pretrained(str(out.path))
    begin, _ = text_frame(tokens)
    if begin:
        # In the digest, so that what was packed without it is packed again.
        names = tokens.convert_ids_to_tokens(begin)
        out.file(BEGIN_FILE).write_text(json.dumps({"ids": begin, "tokens": names}, ensure_ascii=False) + "\n", "utf-8")
    out.rows = len(tokens)
    out.statistics = {
        "vocabulary": vocabulary_size(tokens),
        "end_of_document": tokens.eos_token,
        "origin": settings.tokenizer,
    }


def check_given(name: str) -> None:
    """Raises EclectusError for what is no tokenizer, as far as its files tell without transformers, or is out of reach.

    name: the setting `tokenizer`. One on the hub must be there now, or have been downloaded.
    """
    remedy = f"give '{TRAINED_HERE}', a folder with tokenizer.json or tokenizer.model, or a name on the hub"
    wrong = ""
    try:
        folder = Path(name).expanduser()
        if "://" in name:
            wrong = "which is a URL"
        elif not _is_path(name):
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                _commit(name)
            else:
                wrong = "which is neither a folder nor a name on the hub"
        elif not folder.exists():
            wrong = "which does not exist"
        elif not folder.is_dir():
            wrong = "which is a file"
        else:
            check_tree(folder, f"setting 'tokenizer' of '{name}'", depth=2)
            if not os.listdir(folder):
                wrong = "which is an empty folder"
            elif not listing().has_tokenizer(folder):
                wrong = "a folder without a tokenizer"
            else:
                _check_files(_files(folder))
    except (OSError, RuntimeError) as error:
        wrong = f"which cannot be read ({getattr(error, 'strerror', None) or error})"
    except ValueError as error:
        raise EclectusError(f"setting 'tokenizer' is '{name}': {error}") from error
    if wrong:
        raise EclectusError(f"setting 'tokenizer' is '{name}', {wrong}; {remedy}")


def _check_files(files: list[Path]) -> None:
    """Raises ValueError for a file of JSON that is damaged. Their times are remembered: flows call this again."""
    stats = [each.stat() for each in files]
    _check_json(tuple(files), tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in stats))


@functools.lru_cache(maxsize=4)
def _check_json(files: tuple[Path, ...], _: tuple[Any, ...]) -> None:
    check = without_torch("checkpoints/tokenizer_json.py")
    for path in files:
        if path.suffix != ".json":
            continue
        value = check.read_json(path)
        if path.name == "tokenizer.json":
            check.check_tokenizer_json(path, value)
        elif path.name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"):
            check.check_config(path, value)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder, with an end-of-document token. Runs no code from the folder. Raises EclectusError."""
    from eclectus.models.checkpoints.tokenizer_files import open_tokenizer

    try:
        tokens = open_tokenizer(folder)
    except ValueError as error:
        raise EclectusError(str(error)) from error
    if tokens.eos_token_id is None:
        raise EclectusError(
            f"the tokenizer in {folder} has no end-of-sequence token, which separates documents; name one of its "
            "tokens as eos_token in tokenizer_config.json"
        )
    return tokens


def tokenizer_of(checkpoint: Artifact, given: Artifact | None) -> str:
    """The folder of a model's tokenizer: its own if the checkpoint brings one, else the given one.

    Raises EclectusError if there is neither.
    """
    if listing().has_tokenizer(Path(checkpoint.path)):
        return checkpoint.path
    if given is None:
        raise EclectusError(no_tokenizer(checkpoint.name))
    return given.path


def no_tokenizer(name: str) -> str:
    """The message for a model that brings no tokenizer while none is given."""
    return (
        f"{name} brings no tokenizer (tokenizer.json or tokenizer.model); copy that of the model into its folder, or "
        "name it with --tokenizer FOLDER"
    )


def _train(documents: Artifact, settings: TokenizerSettings) -> Any:
    from transformers import PreTrainedTokenizerFast

    texts = sample(documents, int(settings.tokenizer_sample_megabytes * 1e6))
    bpe = train_bpe(texts, settings.tokenizer_vocabulary, END_OF_DOCUMENT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_DOCUMENT, bos_token=END_OF_DOCUMENT)


def _fetch(settings: TokenizerSettings) -> Any:
    """The tokenizer of a folder or of the hub. Raises EclectusError naming what is wrong with it."""
    name, before = settings.tokenizer, fingerprint(settings)
    folder = Path(name).expanduser() if _is_path(name) else _download(name, before["tokenizer"].removeprefix("commit-"))
    try:
        tokens = load_tokenizer(folder)
    except EclectusError as error:
        raise EclectusError(f"setting 'tokenizer' is '{name}': {error}") from error
    if fingerprint(settings) != before:
        raise EclectusError(f"the tokenizer in {name} changed while it was read; run again when it is complete")
    return tokens


def model_rows(settings: TokenizerSettings) -> int:
    """Rows of the embeddings of the model that the tokenizer stands beside; 0 if there is none."""
    name = settings.tokenizer
    if name == TRAINED_HERE:
        return 0
    folder = Path(name).expanduser() if _is_path(name) else _download(name, _commit(name))
    path = folder / "config.json"
    rows = json.loads(path.read_text("utf-8")).get("vocab_size") if path.is_file() else None
    return rows if isinstance(rows, int) else 0


def _is_path(name: str) -> bool:
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _files(folder: Path) -> list[Path]:
    """The files that decide what the tokenizer in a folder does."""
    # transformers chooses the tokenizer's class by the model's config.json, too.
    return [
        path for path in (folder / "config.json", *map(folder.joinpath, listing().side_files(folder))) if path.is_file()
    ]


def _commit(name: str) -> str:
    """The commit that the name on the hub points to now, or without a connection the one downloaded last."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(name).sha)
    except Exception as error:
        try:
            return _download(name, None).name
        except EclectusError:
            raise EclectusError(_not_found(name, error)) from error


def _download(name: str, commit: str | None) -> Path:
    """The folder of these files in the local cache. commit: None takes what was downloaded last."""
    from huggingface_hub import snapshot_download

    try:
        given: dict[str, Any] = {"local_files_only": True} if commit is None else {"revision": commit}
        return Path(snapshot_download(name, allow_patterns=["config.json", *listing().SIDE_FILES], **given))
    except Exception as error:
        raise EclectusError(_not_found(name, error)) from error


def _not_found(name: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"setting 'tokenizer' is '{name}', which is no tokenizer here or on the hub: {first}"
