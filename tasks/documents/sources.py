"""Sources: the entries of the setting `sources`, resolved to files and data sets, each with a name.

An entry is a file, a folder (read recursively), a glob, or `dataset:NAME[@REVISION][:CONFIG[:SPLIT]]`, where NAME is
a Hugging Face data set id or a local folder that `datasets` can open (a saved one included). A path is always a path:
only the prefix `dataset:` accesses the hub. Files are recognised by suffix, in upper or lower case: .jsonl, .ndjson and
.json, .csv and .tsv, .parquet and the text suffixes, all but Parquet also compressed (.gz, .zst, .zstd, .bz2, .xz).
What is passed over in folders and globs (hidden, of other suffixes, no regular file) is listed with the reason; linked
folders are followed, each once (tasks/documents/folders.py). Price: one walk.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path, check_tree
from eclectus.tasks.documents.folders import LINKED, PassedOver, files_below, name_of, readable, why_no_file
from eclectus.tasks.documents.language_codes import is_language

DATASET = "dataset:"
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": "csv", ".tsv": "tsv"}
COMPRESSIONS = (".gz", ".zst", ".zstd", ".bz2", ".xz")
OTHER_COMPRESSIONS = (".lz4", ".br", ".z", ".lzma", ".lzo", ".snappy", ".sz")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
DATASET_FILES = ("dataset_dict.json", "state.json")

# Words in file names that say nothing about the content: the usual names of shards and splits.
_NO_DOMAIN = re.compile(
    r"(train|test|valid|validation|data|part|shard|chunk|default|documents|dump|output|split)?", re.I
)
_SHARD = re.compile(r"([-_.]?\d+)?([-_]of[-_]\d+)?$")


Kind = Literal["json lines", "parquet", "text", "csv", "tsv", "dataset"]


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
    """The sources, in the order of reading, and what folders and globs hold besides.

    passed_over: name -> why, with empty and unreadable sources. ignored: how many of the others are not hidden, by
    suffix.
    """

    sources: list[Source]
    passed_over: PassedOver = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)


def find_sources(entries: list[str], text_suffixes: list[str]) -> Found:
    """Resolves the entries. A file that several entries name is read once.

    Raises EclectusError for an empty list, a missing path, an empty glob or folder, and an unknown suffix.
    """
    if not entries:
        raise EclectusError("no sources are set; set 'sources' to files, folders, globs or dataset:OWNER/NAME")
    found: dict[object, Source] = {}
    others = Found([])
    for origin, entry in enumerate(entries):
        for source in _resolve(entry, origin, text_suffixes, others):
            if source.kind != "dataset":
                check_path(source.path, f"source '{entry}'")
            elif folder := _local_dataset(source.path)[0]:
                check_tree(folder, f"source '{entry}'")
            found.setdefault(_identity(source), source)
    sources = _with_unique_names(list(found.values()))
    others.passed_over.update((each.name, why) for each in sources if (why := _why_nothing(each)))
    return Found(sources, others.passed_over, dict(sorted(others.ignored.items())))


def _why_nothing(source: Source) -> str:
    """Why a source gives nothing, as far as that is known without reading it."""
    if source.kind == "dataset":
        return ""
    try:
        return "" if os.stat(source.path).st_size else "is empty"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def split_entries(text: str) -> list[str]:
    """The entries in one text, separated by commas; a path that exists may hold commas itself."""
    parts, entries = text.split(","), []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if _exists(",".join(parts[:n]))), 1)
        entries.append(",".join(parts[:count]))
        parts = parts[count:]
    return [entry for entry in entries if entry.strip()]


def parse_dataset(entry: str) -> tuple[str, str | None, str | None, str]:
    """`dataset:NAME[@REVISION][:CONFIG[:SPLIT]]` -> (name, revision, config, split); the split defaults to train.

    The name of a local folder may hold `:` and `@`, and begin with `~`.
    """
    name, parts = _local_dataset(entry)
    revision = ""
    if not name:
        first, *parts = entry.removeprefix(DATASET).split(":")
        name, _, revision = first.partition("@")
    if not name or len(parts) > 2 or "://" in entry:
        raise EclectusError(f"source '{entry}' is no data set; expected dataset:NAME[@REVISION][:CONFIG[:SPLIT]]")
    config = parts[0] if parts else ""
    return name, revision or None, config or None, parts[1] if len(parts) > 1 and parts[1] else "train"


def _local_dataset(entry: str) -> tuple[str, list[str]]:
    """The folder that a data set's entry names, or "", and what follows it."""
    rest = entry.removeprefix(DATASET)
    parts: list[str] = []
    while not (folder := _folder(rest)) and ":" in rest:
        rest, _, last = rest.rpartition(":")
        parts.insert(0, last)
    return folder, parts


def _folder(name: str) -> str:
    """The folder of this name, or "" if there is none."""
    path = os.path.expanduser(name)
    return next((each for each in (name, path, path.partition("@")[0]) if each and os.path.isdir(each)), "")


def _exists(entry: str) -> bool:
    if entry.startswith(DATASET):
        return bool(_local_dataset(entry)[0])
    path = os.path.expanduser(entry)
    return any(map(os.path.lexists, (entry, path, path.strip()))) or (glob.has_magic(path) and bool(glob.glob(path)))


def _path(entry: str) -> Path:
    """The path of an entry: as it stands, if there is one, else without blanks around it and with `~` expanded."""
    for each in (entry, entry.strip()):
        if os.path.lexists(each):
            return Path(each)
    return Path(os.path.expanduser(entry.strip()))


def _resolve(entry: str, origin: int, text_suffixes: list[str], others: Found) -> list[Source]:
    if not entry.strip() and not os.path.lexists(entry):
        raise EclectusError(f"entry {origin + 1} of 'sources' is empty; name a file or folder ('.' for this one)")
    if entry.strip().startswith(DATASET):
        entry = entry.strip()
        name = parse_dataset(entry)[0]
        return [Source("dataset", entry, _dataset_name(entry), origin, PurePosixPath(name).name)]
    path = _path(entry)
    here: PassedOver = {}
    if path.is_dir():
        if any((path / name).is_file() for name in DATASET_FILES):
            return _resolve(f"{DATASET}{path}", origin, text_suffixes, others)
        files, top = files_below(path, here), path
        nothing = f"folder '{entry}' holds no file that can be read"
    elif path.exists():
        source = _as_source(path, path.parent, origin, text_suffixes)
        if isinstance(source, str):
            raise EclectusError(f"'{entry}' {source.partition(';')[0]}; {_readable(text_suffixes)}")
        return [source]
    elif glob.has_magic(str(path)):
        top = _fixed_part(path)
        matching = _matching(path, top, f"source '{entry}'")
        files = [file for file in matching if not file.is_dir()]
        if "**" not in path.parts:
            folders = [file for file in matching if file not in files and not file.name.startswith(".")]
            here.update(
                (f"{name_of(folder, top)}/", "is a folder; name it, or end the glob in /**") for folder in folders
            )
        nothing = f"glob '{entry}' matches no file that can be read"
    else:
        raise EclectusError(_missing(entry.strip()))
    sources = []
    for file in files:
        source = _as_source(file, top, origin, text_suffixes)
        if isinstance(source, str):
            name = name_of(file, top)
            here[name] = source
            suffix = PurePosixPath(name).suffix or PurePosixPath(name).name
            others.ignored[suffix] = others.ignored.get(suffix, 0) + 1
        else:
            sources.append(source)
    if not sources:
        raise EclectusError(f"{nothing}{_first_reason(here)}; {_readable(text_suffixes)}")
    others.passed_over.update(here)
    return sources


def _as_source(path: Path, top: Path, origin: int, text_suffixes: list[str]) -> Source | str:
    """The file as a source, or why it is none, as what follows its name: "has ..." """
    why = why_no_file(path)
    if why:
        return why
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
    elif suffix in TABLES:
        kind = "csv" if suffix == ".csv" else "tsv"
    else:
        return _why_unknown(path.suffix, suffix)
    folder = _meaningful(path.absolute().parent.name)
    domain = folder if kind == "text" else _meaningful(bare.stem) or (folder if path.parent != top else None)
    return Source(kind, str(path), name_of(path, top), origin, domain, compression)


def _why_unknown(last: str, suffix: str) -> str:
    """Why a file is not read, and what to do. last: its last suffix; suffix: the one before a compression's."""
    if last.lower() in ARCHIVES or suffix in ARCHIVES:
        return "is an archive of files; unpack it"
    if last.lower() in OTHER_COMPRESSIONS:
        return f"is compressed as {last}; decompress it, or compress it as one of {', '.join(COMPRESSIONS)}"
    if suffix == ".parquet":
        return "is compressed Parquet; decompress it, for Parquet is compressed inside"
    if not suffix:
        return "has no suffix that can be read; rename it by what it holds, such as .jsonl"
    return f"has a suffix that cannot be read; if it is plain text, add {suffix} to 'text_suffixes'"


def _first_reason(passed: PassedOver) -> str:
    return "".join(f" ('{name}' {why.partition(';')[0]})" for name, why in list(passed.items())[:1])


def _meaningful(name: str) -> str | None:
    """`en.code-00001-of-00010` -> `code`; None for a name that only gives a shard, a split or a language."""
    words = [_SHARD.sub("", word) for word in readable(name).split(".")]
    if is_language(words[0]):
        words = words[1:]
    words = [word for word in words if not _NO_DOMAIN.fullmatch(word)]
    return ".".join(words).lower() or None


def _fixed_part(path: Path) -> Path:
    parts = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _matching(pattern: Path, top: Path, what: str) -> list[Path]:
    """The files and folders that a glob matches. Raises EclectusError for one outside the allowed folders."""
    found = _glob(pattern, top)
    for each in found:
        check_path(each, what)
    return found


def _glob(pattern: Path, top: Path) -> list[Path]:
    """As Python's own, which follows links into loops, of which two take forever."""
    if "**" in pattern.parts:
        passed: PassedOver = {}
        files = files_below(top, passed)
        if any(why in LINKED for why in passed.values()):
            wanted = pattern.parts[len(top.parts) :]
            return sorted(file for file in files if _fits(file.parts[len(top.parts) :], wanted))
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if pattern[:1] == ("**",):
        return any(_fits(parts[begin:], pattern[1:]) for begin in range(len(parts) + 1))
    if not parts or not pattern:
        return not parts and not pattern
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _missing(entry: str) -> str:
    if "://" in entry:
        return f"source '{entry}' is a URL; expected a local path, a glob or dataset:OWNER/NAME"
    hint = f", or dataset:{entry} if it is on the hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", entry) else ""
    return f"source '{entry}' does not exist; check the path (relative to {os.getcwd()}){hint}"


def _readable(text_suffixes: list[str]) -> str:
    known = ", ".join([*JSON_LINES, ".parquet", *TABLES, *text_suffixes])
    return f"these can: {known} ({', '.join(COMPRESSIONS)} too, except .parquet); add others to 'text_suffixes'"


def _dataset_name(entry: str) -> str:
    name = parse_dataset(entry)[0]
    return entry.replace(name, Path(name).name, 1) if Path(name).is_dir() else entry


def _identity(source: Source) -> object:
    """What two entries that name the same file have in common, also where names may differ by case."""
    if source.kind == "dataset":
        return source.path
    real = os.path.realpath(source.path)
    try:
        status = os.stat(real)
    except OSError:
        return real
    return real.casefold(), status.st_dev, status.st_ino


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Two entries may hold files of the same name: later ones get the index of their entry as a prefix."""
    seen: set[str] = set()
    unique = []
    for source in sources:
        name = source.name if source.name not in seen else f"{source.origin}/{source.name}"
        seen.add(name)
        unique.append(replace(source, name=name))
    return unique
