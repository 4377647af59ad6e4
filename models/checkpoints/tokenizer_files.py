"""The one door for tokenizers: the tokenizer in a directory, opened and checked, or one line that names what is wrong.

    files       every JSON file is parsed and its fields are checked (models/checkpoints/tokenizer_json.py)
    Rust        tokenizer.json is read by `tokenizers` itself, which must give every added token the id in the file
    class       transformers opens the directory; where the class that tokenizer_config.json names rebuilds the
                tokenizer so that PROBES get other ids than tokenizer.json gives them, tokenizer.json counts
    use         what precedes and follows a text by the tokenizer's own rule (`text_frame`), the largest id, and which
                tokens never come out of a text (`control_ids`)

No code from the directory is run. Cost: a second for a large tokenizer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from eclectus.models.checkpoints.side_files import TOKENIZER_CONFIG, VOCABULARIES
from eclectus.models.checkpoints.tokenizer_json import TokenizerError, check_config, check_tokenizer_json, read_json

TOKENIZER_JSON = VOCABULARIES[0]
GENERIC = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# Where scripts, spaces, digits, case, contractions and symbols differ, tokenizers differ.
PROBES = (
    "Hello, world! It's 3.14159 o'clock; DON'T don't we'll.",
    "  two spaces,   three\n\n\ttabs and\r\nlines ",
    "naïve café ÀÉÎ ﬁ ½ … “quoted” — dash",
    "Ελληνικά русский 中文 日本語 한국어 العربية हिन्दी ไทย",
    "def f(x):\n    return x**2  # 1234567890",
    "🙂👩‍👩‍👧",
    "a",
)
_log = logging.getLogger("eclectus")


def open_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer in a directory. Raises TokenizerError naming file, field and remedy."""
    folder = Path(folder)
    source, raw, config = _check_files(folder)
    if source is None:
        raise TokenizerError(
            f"{folder} holds no tokenizer: expected {TOKENIZER_JSON}, tokenizer.model or vocab.json; copy the "
            "tokenizer of the model there"
        )
    if (code := _own_code(config)) is not None:
        raise TokenizerError(
            f"{folder / TOKENIZER_CONFIG} needs code of its own (auto_map names {code}), which Eclectus does not run; "
            f"give a tokenizer with {TOKENIZER_JSON} and without auto_map"
        )
    tokenizer = _open_as_named(folder, source, raw)
    with _limits_kept(tokenizer):
        _check_opened(folder, source, raw, tokenizer)
        if not text_frame(tokenizer)[0] and config.get("add_bos_token") is True and tokenizer.bos_token_id is not None:
            # transformers ignores the setting where there is a tokenizer.json.
            tokenizer.add_bos_token = True
    return tokenizer


def check_tokenizer(base_dir: Path, vocabulary: int) -> None:
    """Checks that the tokenizer in a directory, if there is one, can be read and fits the model.

    vocabulary: rows of the model's embeddings. Tokens beyond them that no text yields (a [PAD] that was added later)
    are reported only. Raises TokenizerError.
    """
    if not base_dir.is_dir():
        return
    source, raw, config = _check_files(base_dir)
    if source is None:
        return
    if _own_code(config) is not None:
        if raw is not None:
            _check_ids(source, raw.get_vocab(with_added_tokens=True), frozenset(), vocabulary)
        return
    tokenizer = open_tokenizer(base_dir)
    never = control_ids(tokenizer, {tokenizer.unk_token_id}) - {tokenizer.eos_token_id, *text_frame(tokenizer)[0]}
    _check_ids(source, tokenizer.get_vocab(), never, vocabulary)


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id + 1. The number of tokens is less where ids have gaps."""
    return 1 + max([-1, *tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])


def usable_size(tokenizer: Any) -> int:
    """The largest id + 1 of tokens that are used: those that texts yield, the end of a document, what precedes one."""
    unknown = {tokenizer.unk_token_id} - {None}
    used = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder} - control_ids(tokenizer, unknown)
    return 1 + max([-1, *used, *text_frame(tokenizer)[0], *({tokenizer.eos_token_id} - {None})])


def control_ids(tokenizer: Any, unknown: Set[int]) -> frozenset[int]:
    """Ids of the tokens that stand for something else than text. unknown: ids of unknown text, which is text."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    borders = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "sep", "cls")}
    return frozenset((marked | set(tokenizer.all_special_ids)) - (unknown - borders))


def text_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer itself puts before and after every text, by its template or its class."""
    for text in PROBES[::-1]:
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        framed = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(framed) - len(plain) + 1) if plain else ():
            if framed[start : start + len(plain)] == plain:
                return framed[:start], framed[start + len(plain) :]
    return [], []


def _check_files(folder: Path) -> tuple[Path | None, Any, dict[str, Any]]:
    """(the file with the vocabulary or None, the Rust tokenizer of tokenizer.json or None, tokenizer_config.json)."""
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is no folder; expected one with {TOKENIZER_JSON} or tokenizer.model")
    source = next((path for name in VOCABULARIES for path in sorted(folder.glob(name)) if path.is_file()), None)
    if source is None:
        return None, None, {}
    for name in ("special_tokens_map.json", "added_tokens.json", "config.json"):
        if (folder / name).is_file():
            check_config(folder / name, read_json(folder / name))
    path = folder / TOKENIZER_CONFIG
    config = check_config(path, read_json(path)) if path.is_file() else {}
    raw = None
    if source.name == TOKENIZER_JSON:
        raw = _read_rust(source)
    elif source.suffix in (".model", ".tiktoken") or source.name.startswith("tokenizer.model"):
        _check_model_file(source)
    elif source.suffix == ".json":
        read_json(source)
    if raw is None:
        _check_class(folder, source, config)
    return source, raw, config


def _check_class(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """Raises TokenizerError where nothing says how a vocabulary without tokenizer.json cuts text."""
    name = config.get("tokenizer_class")
    if name is not None and _own_code(config) is None and not _known_class(name):
        raise TokenizerError(
            f"{folder / TOKENIZER_CONFIG} names tokenizer_class {name}, which transformers does not have, and there is "
            f"no {TOKENIZER_JSON}; correct the class, or give a {TOKENIZER_JSON}"
        )
    if (name is None or name in GENERIC) and source.name in ("vocab.json", "vocab.txt"):
        model = folder / "config.json"
        if not (model.is_file() and read_json(model).get("model_type")):
            raise TokenizerError(
                f"{source} is a vocabulary, but nothing says how text is cut: there is no {TOKENIZER_JSON}, and no "
                f"tokenizer_class in {TOKENIZER_CONFIG}; give a {TOKENIZER_JSON}"
            )


def _known_class(name: Any) -> bool:
    if name is None:
        return True
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return any(tokenizer_class_from_name(each) is not None for each in (name, name.removesuffix("Fast"), f"{name}Fast"))


def _own_code(config: dict[str, Any]) -> str | None:
    """The class in the directory's own code that is needed, None if transformers has the tokenizer's class."""
    named = config.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    if not named or (config.get("tokenizer_class") and _known_class(config["tokenizer_class"])):
        return None
    return str(next((each for each in named if each), named)) if isinstance(named, list | tuple) else str(named)


def _read_rust(path: Path) -> Any:
    """The Rust tokenizer of a tokenizer.json. Raises TokenizerError."""
    from tokenizers import Tokenizer

    added = check_tokenizer_json(path, read_json(path))
    try:
        raw = Tokenizer.from_file(str(path))
        raw.no_truncation()
        raw.no_padding()
        for text in PROBES:
            raw.encode(text)
    # The library raises plain Exception, and PanicException, which is not one.
    except BaseException as error:
        raise _unreadable(path, error) from error
    for token, number in added.items():
        if raw.token_to_id(token) != number:
            raise TokenizerError(
                f"{path} gives added token '{token}' id {number}, but `tokenizers` reads it as "
                f"{raw.token_to_id(token)}, since the ids before it are not all taken; add it to model.vocab"
            )
    return raw


def _check_model_file(path: Path) -> None:
    """Raises TokenizerError if a SentencePiece or tiktoken file cannot be read, or the library for it is missing."""
    missing = [name for name in ("sentencepiece", "tiktoken") if importlib.util.find_spec(name) is None]
    if missing:
        raise TokenizerError(
            f"{path} needs {' and '.join(missing)} to be read: pip install 'eclectus[sentencepiece]', or give a "
            f"{TOKENIZER_JSON}"
        )
    import sentencepiece

    if path.suffix == ".tiktoken" or path.name == "tiktoken.model":
        return
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        if not _is_tiktoken(path):
            raise _unreadable(path, error) from error


def _is_tiktoken(path: Path) -> bool:
    """Whether every line of the file is a token in base64 and its rank."""
    import base64

    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return bool(lines) and all(base64.b64decode(token, validate=True) and int(rank) >= 0 for token, rank in lines)
    except ValueError:
        return False


def _open_as_named(folder: Path, source: Path, raw: Any) -> Any:
    """The tokenizer by the class that the directory names, or by tokenizer.json alone where that class changes ids."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fault: BaseException | None = None
    kinds: list[Any] = [AutoTokenizer] if raw is None else [AutoTokenizer, PreTrainedTokenizerFast]
    for kind in kinds:
        try:
            tokenizer = kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            if raw is None or _same_ids(raw, tokenizer):
                return tokenizer
            _log.warning("%s: its class %s cuts text otherwise; the file counts", source, type(tokenizer).__name__)
        except BaseException as error:
            fault = error
    config = folder / TOKENIZER_CONFIG
    if fault is not None:
        raise _unreadable(config if raw is not None and config.is_file() else source, fault) from fault
    raise TokenizerError(
        f"{config} makes transformers read {source.name} as another tokenizer; correct tokenizer_class and its "
        "settings, or remove the file"
    )


def _same_ids(raw: Any, tokenizer: Any) -> bool:
    """Whether PROBES get the ids that tokenizer.json gives them, special tokens aside."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    with _limits_kept(tokenizer):
        backend.no_truncation()
        backend.no_padding()
        read = [backend.encode(text, add_special_tokens=False).ids for text in PROBES]
    return read == [raw.encode(text, add_special_tokens=False).ids for text in PROBES]


@contextlib.contextmanager
def _limits_kept(tokenizer: Any) -> Iterator[None]:
    """Restores truncation and padding, which encoding with transformers switches off."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (None, None) if backend is None else (backend.truncation, backend.padding)
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _check_opened(folder: Path, source: Path, raw: Any, tokenizer: Any) -> None:
    """Raises TokenizerError where transformers moved or added tokens that texts yield or documents need."""
    try:
        token_ids, decoder = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        for text in PROBES:
            tokenizer(text, verbose=False)
    except BaseException as error:
        raise _unreadable(source, error) from error
    _check_templates(folder, tokenizer)
    if raw is None:
        return
    file_ids = raw.get_vocab(with_added_tokens=True)
    config = folder / TOKENIZER_CONFIG
    for token, number in file_ids.items():
        if token_ids.get(token) != number:
            raise TokenizerError(
                f"{config} moves token '{token}' from id {number} to {token_ids.get(token)}; correct it as "
                f"{source.name} has it"
            )
    for token in token_ids.keys() - file_ids.keys():
        name = next((each for each in ("eos", "bos") if getattr(tokenizer, f"{each}_token") == token), None)
        if name is not None:
            raise TokenizerError(
                f"{config} names {name}_token '{token}', which {source} does not hold; name one of its tokens"
            )
        added = decoder.get(token_ids[token])
        if added is not None and not added.special and token_ids[token] not in tokenizer.all_special_ids:
            raise TokenizerError(
                f"{config} adds token '{token}', which {source} does not hold, with id {token_ids[token]}; add it to "
                f"{source.name}, or remove it"
            )


def _check_templates(folder: Path, tokenizer: Any) -> None:
    """Raises TokenizerError for a chat template that transformers cannot compile."""
    templates = tokenizer.chat_template
    if not templates:
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for name, text in (templates if isinstance(templates, dict) else {"": templates}).items():
        files = [folder / "chat_template.jinja", folder / "additional_chat_templates" / f"{name}.jinja"]
        path = next((each for each in files[:: -1 if name else 1] if each.is_file()), folder / TOKENIZER_CONFIG)
        try:
            _compile_jinja_template(text)
        except Exception as error:
            raise TokenizerError(
                f"{path} holds a chat template{f' {name!r}' if name else ''} that is not Jinja ({_first(error)}); "
                "repair it, or remove it"
            ) from error


def _check_ids(source: Path, token_ids: dict[str, int], never: Set[int], vocabulary: int) -> None:
    """Raises TokenizerError for a token beyond the model's embeddings, unless it is one of `never`, for no text."""
    beyond = sorted((number, token) for token, number in token_ids.items() if number >= vocabulary)
    wrong = [(number, token) for number, token in beyond if number not in never]
    if wrong:
        number, token = wrong[-1]
        raise TokenizerError(
            f"{source} has token id {number} ('{token}'), but the model's vocabulary has {vocabulary} (vocab_size in "
            "config.json): this tokenizer is not the model's, or tokens were added without resizing its embeddings; "
            "give the model's own tokenizer"
        )
    if beyond:
        shown = ", ".join(f"'{token}' ({number})" for number, token in beyond[:3])
        _log.warning("%s: the model has no embedding for %s; no text yields it, so it is left", source, shown)


def _unreadable(path: Path, error: BaseException) -> BaseException:
    """The error to raise instead: TokenizerError, or the error itself if it is no fault of the file."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | GeneratorExit | TokenizerError):
        return error
    return TokenizerError(
        f"{path} cannot be read as a tokenizer ({_first(error)}); fetch it again, or give another tokenizer"
    )


def _first(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: {text}"
