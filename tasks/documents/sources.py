"""Sources: the entries of the setting `sources`, resolved to files and data sets, each with a name and a digest.

An entry is a file, a folder (read recursively), a glob, or `dataset:NAME[@REVISION][:CONFIG[:SPLIT]]`, where NAME is
a Hugging Face data set id or a local folder that `datasets` can open (a saved one included). A path is always a path:
only the prefix `dataset:` accesses the hub. Files are recognised by suffix: .jsonl, .ndjson, .json (JSON lines, or
one array), .parquet and the text suffixes, all but Parquet also as .gz or .zst. In folders and globs, hidden files
are skipped, and files with other suffixes are counted. Price: listing is one walk; `fingerprints` reads every local
byte once (SHA-256, 1 to 2 GB/s per core, all cores).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from eclectus.storage.artifact import hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path
from eclectus.tasks.documents.language_codes import is_language

DATASET = "dataset:"
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst")
DATASET_FILES = ("dataset_dict.json", "state.json")
FINGERPRINTS_PER_ENTRY = 64

# Words in file names that say nothing about the content: the usual names of shards and splits.
_NO_DOMAIN = re.compile(
    r"(train|test|valid|validation|data|part|shard|chunk|default|documents|dump|output|split)?", re.I
)
_SHARD = re.compile(r"([-_.]?\d+)?([-_]of[-_]\d+)?$")


Kind = Literal["json lines", "parquet", "text", "dataset"]


@dataclass(frozen=True)
class Source:
    """One file or data set to read.

    path: of the file, or the entry of the data set. name: as in tables, without folders of this machine.
    origin: index of the entry that named it. domain: taken from its name, or None.
    """

    kind: Kind
    path: str
    name: str
    origin: int
    domain: str | None = None
    compression: str | None = None

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for data sets and for files that cannot be accessed."""
        try:
            return os.stat(self.path).st_size if self.kind != "dataset" else 0
        except OSError:
            return 0


@dataclass(frozen=True)
class Found:
    """The sources, in the order of reading, and how many files of folders and globs were ignored, by suffix."""

    sources: list[Source]
    ignored: dict[str, int]


def find_sources(entries: list[str], text_suffixes: list[str]) -> Found:
    """Resolves the entries. A file that several entries name is read once.

    Raises EclectusError for an empty list, a missing path, an empty glob or folder, and an unknown suffix.
    """
    if not entries:
        raise EclectusError("no sources are set; set 'sources' to files, folders, globs or dataset:OWNER/NAME")
    found: dict[str, Source] = {}
    ignored: dict[str, int] = {}
    for origin, entry in enumerate(entries):
        for source in _resolve(entry.strip(), origin, text_suffixes, ignored):
            if source.kind != "dataset":
                check_path(source.path, f"source '{entry}'")
            found.setdefault(source.path if source.kind == "dataset" else os.path.realpath(source.path), source)
    return Found(_with_unique_names(list(found.values())), dict(sorted(ignored.items())))


def fingerprints(sources: Iterable[Source]) -> dict[str, str]:
    """Name -> digest of everything that is read, for the key of a step; an entry of many files gets one digest.

    Raises EclectusError when a data set on the hub cannot be reached.
    """
    sources = list(sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, sources))
    by_origin: dict[int, dict[str, str]] = {}
    for source, digest in zip(sources, digests, strict=True):
        by_origin.setdefault(source.origin, {})[source.name] = digest
    result = {}
    for origin, named in by_origin.items():
        if len(named) > FINGERPRINTS_PER_ENTRY:
            listing = hashlib.sha256(json.dumps(sorted(named.items())).encode()).hexdigest()
            result[f"source.{origin}.{len(named)}-files"] = f"files-{listing}"
        else:
            result |= {f"source.{origin}.{name}": digest for name, digest in named.items()}
    return result


def parse_dataset(entry: str) -> tuple[str, str | None, str | None, str]:
    """`dataset:NAME[@REVISION][:CONFIG[:SPLIT]]` -> (name, revision, config, split); the split defaults to train."""
    parts = entry.removeprefix(DATASET).split(":")
    name, _, revision = parts[0].partition("@")
    if not name or len(parts) > 3:
        raise EclectusError(f"source '{entry}' is no data set; expected dataset:NAME[@REVISION][:CONFIG[:SPLIT]]")
    config = parts[1] if len(parts) > 1 else ""
    return name, revision or None, config or None, parts[2] if len(parts) > 2 and parts[2] else "train"


def _resolve(entry: str, origin: int, text_suffixes: list[str], ignored: dict[str, int]) -> list[Source]:
    if entry.startswith(DATASET):
        name = parse_dataset(entry)[0]
        return [Source("dataset", entry, _dataset_name(entry), origin, PurePosixPath(name).name)]
    path = Path(entry).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in DATASET_FILES):
            return _resolve(f"{DATASET}{path}", origin, text_suffixes, ignored)
        files, top = _walk(path), path
        nothing = f"folder '{entry}' holds no file that can be read"
    elif path.exists():
        source = _as_source(path, path.parent, origin, text_suffixes)
        if source is None:
            raise EclectusError(f"'{entry}' has a suffix that cannot be read; {_readable(text_suffixes)}")
        return [source]
    elif glob.has_magic(entry):
        top = _fixed_part(path)
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not Path(name).is_dir())
        nothing = f"glob '{entry}' matches no file that can be read"
    else:
        raise EclectusError(_missing(entry))
    sources = []
    for file in files:
        source = _as_source(file, top, origin, text_suffixes)
        if source is None:
            ignored[file.suffix or file.name] = ignored.get(file.suffix or file.name, 0) + 1
        else:
            sources.append(source)
    if not sources:
        raise EclectusError(f"{nothing}; {_readable(text_suffixes)}")
    return sources


def _as_source(path: Path, top: Path, origin: int, text_suffixes: list[str]) -> Source | None:
    """The file as a source, or None if its suffix is unknown."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else None
    bare = path.with_suffix("") if compression else path
    suffix = bare.suffix.lower()
    kind: Kind
    if suffix in JSON_LINES:
        kind = "json lines"
    elif suffix == ".parquet" and compression is None:
        kind = "parquet"
    elif suffix in {each.lower() for each in text_suffixes}:
        kind = "text"
    else:
        return None
    folder = _meaningful(path.absolute().parent.name)
    domain = folder if kind == "text" else _meaningful(bare.stem) or (folder if path.parent != top else None)
    return Source(kind, str(path), path.relative_to(top).as_posix(), origin, domain, compression)


def _meaningful(name: str) -> str | None:
    """`en.code-00001-of-00010` -> `code`; None for a name that only gives a shard, a split or a language."""
    words = [_SHARD.sub("", word) for word in name.split(".")]
    if is_language(words[0]):
        words = words[1:]
    words = [word for word in words if not _NO_DOMAIN.fullmatch(word)]
    return ".".join(words).lower() or None


def _walk(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent) / name for name in sorted(names) if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _fixed_part(path: Path) -> Path:
    parts = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _missing(entry: str) -> str:
    if "://" in entry:
        return f"source '{entry}' is a URL; expected a local path, a glob or dataset:OWNER/NAME"
    hint = f", or dataset:{entry} if it is on the hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", entry) else ""
    return f"source '{entry}' does not exist; check the path (relative to {os.getcwd()}){hint}"


def _readable(text_suffixes: list[str]) -> str:
    known = ", ".join([*JSON_LINES, ".parquet", *text_suffixes])
    return f"these can: {known} ({' and '.join(COMPRESSIONS)} too, except .parquet); add others to 'text_suffixes'"


def _dataset_name(entry: str) -> str:
    name = parse_dataset(entry)[0]
    return entry.replace(name, Path(name).name, 1) if Path(name).is_dir() else entry


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Two entries may hold files of the same name: later ones get the index of their entry as a prefix."""
    seen: set[str] = set()
    unique = []
    for source in sources:
        name = source.name if source.name not in seen else f"{source.origin}/{source.name}"
        seen.add(name)
        unique.append(Source(source.kind, source.path, name, source.origin, source.domain, source.compression))
    return unique


def _digest(source: Source) -> str:
    if source.kind == "dataset":
        return _dataset_digest(source)
    try:
        status = os.stat(source.path)
        return f"file-{_hash_unchanged(source.path, status.st_size, status.st_mtime_ns)}"
    except OSError as error:
        return f"unreadable-{error.strerror}"


@functools.lru_cache(maxsize=100_000)
def _hash_unchanged(path: str, size: int, modified: int) -> str:
    return hash_file(Path(path))


def _dataset_digest(source: Source) -> str:
    name, revision, config, split = parse_dataset(source.path)
    content: str | list[tuple[str, str]]
    if Path(name).is_dir():
        content = [(path.relative_to(name).as_posix(), hash_file(path)) for path in _walk(Path(name))]
    else:
        content = _hub_commit(name, revision)
    return f"dataset-{hashlib.sha256(json.dumps([content, config, split]).encode()).hexdigest()}"


@functools.lru_cache(maxsize=1000)
def _hub_commit(name: str, revision: str | None) -> str:
    """The current commit of a data set on the hub, so that a key changes when the data set does."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=20).sha)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EclectusError(
            f"data set '{name}' cannot be reached on the hub ({reason}); check the name, the network and HF_TOKEN, "
            "or give a local path"
        ) from error
