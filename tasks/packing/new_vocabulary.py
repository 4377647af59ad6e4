"""New words for new languages: tokens appended to a byte-level BPE (docs/methods.md 2.8).

    words       of the expanded languages' training text, an equal number of bytes of each, as the base encodes them
    merges      learned on top of the base's (new_merges.py), where no original text changes (original_text.py)
    proof       every document of the original languages is encoded before and after; a token that still changes one
                is taken out with all that were built on it, until none does

The result is the base's tokenizer with longer lists: ids, merges, special tokens, template and normaliser are as they
were. Where the expanded languages would gain less than LEAST_GAIN, nothing is appended, and the log says so.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.over_parts import Done, Part, forget, key_of, link_or_copy, over_parts
from eclectus.tasks.packing.new_merges import Learned, Merge, learn_merges
from eclectus.tasks.packing.original_text import IN_TEXT, Merges, changed_by, read_originals
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import BEGIN_FILE, TokenizerSettings, fingerprint, load_tokenizer, model_rows
from eclectus.tasks.packing.tokenizer_training import labelled_sample
from eclectus.tasks.run import metric, notify
from eclectus.tasks.settings import CurationWorkerSettings, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.fetch_model import listing
from eclectus.tasks.training.without_torch import without_torch

NEW_TOKENS = "new_tokens.json"
"""In the artifact, for the model's new rows (models/extension/new_rows.py)."""

TOKENIZER_JSON = "tokenizer.json"
# Of GPT-2 and Qwen beside tokenizer.json: the old vocabulary.
OUTDATED = ("vocab.json", "merges.txt")
LEAST_GAIN = 0.05
"""Bytes per token, relative: under this no language gains enough to be worth new rows in the model."""
MEASURED_BYTES = 1_000_000


class NewVocabularySettings(Settings):
    """Whether a base's tokenizer gets tokens for the expanded languages."""

    extension_vocabulary: int = Field(
        0,
        ge=0,
        le=500_000,
        description="Tokens for the expanded languages that are appended to the base's byte-level BPE, with a row each "
        "in embeddings and output layer; for scripts that the base spells in bytes. 0 keeps its tokenizer.",
    )
    extension_vocabulary_merges: Merges = Field(
        "letters",
        description="Where new tokens may stand. letters: only with a letter that the original languages do not use, "
        "so that their text keeps its tokens, whether it is in the corpus or not. corpus: also others, where no "
        "original document of the corpus changes; more for languages of the same script.",
    )


class ExtendTokenizerSettings(NewVocabularySettings, TokenizerSettings, CurationWorkerSettings):
    """Settings of the step `extend_tokenizer`; `tokenizer` is the base, whose config.json says how many rows it has."""


@step(makes="tokenizer", version=1, fingerprint=fingerprint)
def extend_tokenizer(documents: Artifact, base: Artifact, settings: ExtendTokenizerSettings, out: Draft) -> None:
    """Appends tokens for the expanded languages to a tokenizer. base: the one that `settings.tokenizer` names."""
    folder = Path(base.path)
    old = load_tokenizer(folder)
    data = _read(folder, settings.tokenizer)
    first = max(model_rows(settings), max(old.get_vocab().values()) + 1)
    words, encode = _words(documents, old, settings), _encoder(old)
    vocabulary: dict[str, int] = data["model"]["vocab"]
    candidates = sorted({pair for word in words for pair in itertools.pairwise(encode(word))})
    workers = settings.curation_workers
    originals = read_originals(documents, base, candidates, vocabulary, settings.extension_vocabulary_merges, workers)
    learned = learn_merges(words, encode, settings.extension_vocabulary, originals.refused, _taken(data, old))
    made, first_changed = _proven(documents, base, learned, first, workers)
    gains = _gains(documents, old, load_tokenizer(made.folder))
    report = _Report(learned, originals.documents, first_changed, gains)
    if not learned.merges or not report.worth_it:
        shutil.copytree(folder, out.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        learned.merges.clear()
    else:
        for path in made.folder.iterdir():
            if path.name != "part.json":
                link_or_copy(path, out.file(path.name))
    forget([made])
    pieces = [[vocabulary[piece] for piece in encode(left + right)] for left, right in learned.merges]
    out.file(NEW_TOKENS).write_text(json.dumps({"first": first, "pieces": pieces}) + "\n", "utf-8")
    result = load_tokenizer(out.path)
    out.rows = len(result)
    out.statistics = {
        "vocabulary": max(result.get_vocab().values()) + 1,
        "end_of_document": result.eos_token,
        "origin": settings.tokenizer,
        "first_new_id": first,
        **report.statistics(settings.extension_vocabulary),
    }
    report.log(settings.extension_vocabulary)


def check_extendable(folder: str | Path, name: str) -> None:
    """Raises EclectusError, before any work, for a base whose tokenizer cannot be extended. name: for messages."""
    place = Path(folder)
    if (place / TOKENIZER_JSON).is_file():
        _read(place, name)
    elif place.is_dir() and not (place / "merges.txt").is_file():
        found = next((path.name for path in listing().side_files(place) if path.suffix == ".model"), "no merges")
        raise EclectusError(
            f"extension_vocabulary: tokenizer '{name}' is a SentencePiece one ({found}), which cannot be extended: "
            "only byte-level ones are so far; set extension_vocabulary to 0"
        )


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The tokenizer.json of a base. Raises EclectusError, with the reason, if no tokens can be appended to it."""
    path = folder / TOKENIZER_JSON
    try:
        if not path.is_file():
            raise ValueError(f"it has no {TOKENIZER_JSON}, so its merges are not known; set extension_vocabulary to 0")
        data = _read_json(path)
        without_torch("checkpoints/byte_level.py").check_byte_level(Path(TOKENIZER_JSON), data)
    except ValueError as error:
        raise EclectusError(f"extension_vocabulary: tokenizer '{name}': {error}") from error
    return data


def _read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = without_torch("checkpoints/tokenizer_json.py").read_json(path)
    return data


def _words(documents: Artifact, tokens: Any, settings: ExtendTokenizerSettings) -> Counter[str]:
    """Words of the expanded languages, in byte-level letters, as the tokenizer cuts them, with their counts."""
    backend, words = tokens.backend_tokenizer, Counter[str]()
    for _, text in labelled_sample(documents, int(settings.tokenizer_sample_megabytes * 1e6), group="expanded"):
        plain = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(plain))
    if not words:
        raise EclectusError(
            f"extension_vocabulary is {settings.extension_vocabulary}, but {documents.name} has no training document "
            "of an expanded language; name expanded_languages, or set it to 0"
        )
    return words


def _encoder(tokens: Any) -> Any:
    """The tokens of a word, remembered."""
    model, known = tokens.backend_tokenizer.model, dict[str, list[str]]()

    def encode(word: str) -> list[str]:
        if word not in known:
            known[word] = [each.value for each in model.tokenize(word)]
        return known[word]

    return encode


def _taken(data: dict[str, Any], tokens: Any) -> set[str]:
    """What no new token may be: tokens of the vocabulary, and added tokens, as text and in byte-level letters."""
    from tokenizers import pre_tokenizers

    taken = set(tokens.get_vocab()) | set(data["model"]["vocab"])
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for token in data["added_tokens"]:
        taken.update(piece for piece, _ in spelled.pre_tokenize_str(token["content"]))
    return taken


def _proven(documents: Artifact, base: Artifact, learned: Learned, first: int, workers: int) -> tuple[Done, int]:
    """(the tokenizer with the merges, original documents that the first try changed).

    Whatever still changes an original document is taken out of `learned`, with what is built on it.
    """
    at_first = None
    while True:
        key = key_of("extended tokenizer 1", base.digest, first, learned.merges)
        arguments = {"base": Path(base.path), "merges": learned.merges, "first": first}
        made = over_parts(write_extended, [Part(key, arguments, 1, "the extended tokenizer")], "writing", "tokenizers",
                          workers=1)[0]  # fmt: skip
        changed, found = changed_by(documents, base, made, key, workers)
        at_first = changed if at_first is None else at_first
        if not changed:
            return made, at_first
        forget([made])
        before = len(learned.merges)
        learned.merges = _without(learned.merges, {number - first for number in found if number >= first})
        if len(learned.merges) == before:
            raise EclectusError(
                f"{changed} original documents get other tokens, though none of them is new: the tokenizer does not "
                "cut text the same way twice; set extension_vocabulary to 0"
            )
        learned.left_out[IN_TEXT] += before - len(learned.merges)


def _without(merges: list[Merge], gone: set[int]) -> list[Merge]:
    """The merges without these, and without those that need a token that is gone."""
    lost, kept = set[str](), []
    for number, (left, right) in enumerate(merges):
        if number in gone or left in lost or right in lost:
            lost.add(left + right)
        else:
            kept.append((left, right))
    return kept


def write_extended(out: Path, base: Path, merges: list[Merge], first: int) -> dict[str, Any]:
    """Writes the tokenizer in the folder `base` with these merges; the new ids begin at `first`."""
    for path in listing().side_files(base):
        if path.name not in (*OUTDATED, TOKENIZER_JSON):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / path, out / path)
    if (base / BEGIN_FILE).is_file():
        shutil.copyfile(base / BEGIN_FILE, out / BEGIN_FILE)
    data = without_torch("checkpoints/byte_level.py").append_merges(_read_json(base / TOKENIZER_JSON), merges, first)
    (out / TOKENIZER_JSON).write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
    _check_ids(load_tokenizer(out).get_vocab(), data, merges)
    return {}


def _check_ids(found: dict[str, int], data: dict[str, Any], merges: list[Merge]) -> None:
    """Raises EclectusError if the class that transformers opens does not know the new tokens by their ids."""
    for left, right in merges:
        wanted = data["model"]["vocab"][left + right]
        if found.get(left + right) != wanted:
            raise EclectusError(
                f"the base's tokenizer class does not read the new token '{left + right}' (id {wanted}); set "
                "tokenizer_class to PreTrainedTokenizerFast in the base's tokenizer_config.json"
            )


@dataclass(frozen=True)
class _Gain:
    """Of one language: bytes, and tokens before and after."""

    bytes: int
    before: int
    after: int

    @property
    def share(self) -> float:
        return self.before / self.after - 1 if self.after else 0.0


def _gains(documents: Artifact, old: Any, new: Any) -> dict[str, dict[str, _Gain]]:
    """Group -> language -> gain, on held-out text where there is some, else on training text."""
    before, after = TextTokens(old), TextTokens(new)
    gains: dict[str, dict[str, _Gain]] = {}
    for group in ("original", "expanded"):
        sums: dict[str, list[int]] = {}
        for split in ("heldout", "train"):
            seen = set(sums)
            for language, text in labelled_sample(documents, MEASURED_BYTES, split, group):
                if language and language not in seen and text:
                    each = sums.setdefault(language, [0, 0, 0])
                    each[0] += len(text.encode())
                    each[1] += len(before([text])[0])
                    each[2] += len(after([text])[0])
        gains[group] = {language: _Gain(*each) for language, each in sorted(sums.items())}
    return gains


@dataclass(frozen=True)
class _Report:
    learned: Learned
    documents: int
    first_changed: int
    gains: dict[str, dict[str, _Gain]]

    @property
    def worth_it(self) -> bool:
        return any(each.share >= LEAST_GAIN for each in self.gains["expanded"].values())

    @property
    def without_gain(self) -> list[str]:
        return [language for language, each in self.gains["expanded"].items() if each.share < LEAST_GAIN]

    def statistics(self, wanted: int) -> dict[str, Any]:
        """Bytes per token by language, [before, after], and what was left out."""
        kept = bool(self.learned.merges)
        return {
            "new_tokens": len(self.learned.merges),
            "new_tokens_wanted": wanted,
            "merges_left_out": dict(sorted(self.learned.left_out.items())),
            "original_documents": self.documents,
            "original_documents_changed": 0,
            "bytes_per_token": {
                language: [
                    round(each.bytes / each.before, 3),
                    round(each.bytes / (each.after if kept else each.before), 3),
                ]
                for group in self.gains.values()
                for language, each in group.items()
                if each.before
            },
            "nothing_to_gain": self.without_gain,
        }

    def log(self, wanted: int) -> None:
        """One line on the result, and one on each language that gains nothing; metrics by language."""
        made = self.statistics(wanted)
        for language, (before, after) in made["bytes_per_token"].items():
            metric("bytes_per_token_before", before, language=language)
            metric("bytes_per_token", after, language=language)
        if self.without_gain:
            held = ", ".join(self.without_gain)
            what = "no token is appended" if not made["new_tokens"] else "new tokens are for the others"
            notify(
                "nothing to gain",
                f"the base's tokenizer covers {held} already: new tokens would save less than {LEAST_GAIN:.0%} there; "
                f"{what}",
            )
        if made["new_tokens"]:
            shown = ", ".join(
                f"{language} {made['bytes_per_token'][language][0]:.2f} to {made['bytes_per_token'][language][1]:.2f}"
                for language in self.gains["expanded"]
            )
            left = ", ".join(f"{count:,} {reason}" for reason, count in made["merges_left_out"].items()) or "none"
            notify(
                "new vocabulary",
                f"{made['new_tokens']:,} of {wanted:,} tokens appended; bytes per token: {shown}; merges left out: "
                f"{left}; all {self.documents:,} original documents keep their tokens",
            )
