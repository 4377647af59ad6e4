"""Data sets of the hub and local ones, streamed through `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eclectus.storage.errors import EclectusError
from eclectus.storage.mirror import SCHEME
from eclectus.tasks.allowed_paths import check_path
from eclectus.tasks.documents.readers.parquet import records
from eclectus.tasks.documents.readers.records import Fault, Numbered, Reading, Record, first_line, not_utf8
from eclectus.tasks.documents.sources import DATASET_FILES, Source, parse_dataset

ROWS_AT_ONCE = 256


def read_dataset(source: Source, reading: Reading, commit: str | None) -> Iterator[Numbered]:
    """commit: that of a data set on the hub.

    Raises EclectusError when a data set on the hub breaks off, so that half of it is not taken for the whole.
    """
    row = 0
    try:
        for row, record in enumerate(_records(source, reading, commit), 1):
            yield row, record
    except EclectusError:
        raise
    except Exception as error:
        # `datasets` and its file systems raise any exception; only a damaged local folder is no reason to stop.
        if commit:
            name = parse_dataset(source.path)[0]
            raise EclectusError(
                f"data set '{name}' broke off after {row:,} records ({first_line(error)}); "
                "run again, or download it first"
            ) from error
        yield row + 1, Fault("unreadable", f"the data set breaks off after record {row} ({first_line(error)})")


def _records(source: Source, reading: Reading, commit: str | None) -> Iterator[Record | Fault]:
    import datasets

    name, revision, config, split = parse_dataset(source.path)
    folder = Path(name)
    if any((folder / file).is_file() for file in DATASET_FILES):
        _check_names(folder)
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise EclectusError(f"data set '{name}' has no split '{split}'; it has {', '.join(saved)}")
            saved = saved[split]
        names = [column for column in reading.columns if column in saved.column_names]
        arrow = (saved.select_columns(names) if names else saved).with_format("arrow")
        for table in arrow.iter(ROWS_AT_ONCE):
            for batch in table.to_batches():
                yield from records(batch, reading.text_field)
        return
    try:
        if commit:
            stream = datasets.load_dataset(name, config, split=split, revision=commit, streaming=True)
        else:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
            _check_files(folder, builder.config.data_files or {})
            stream = builder.as_streaming_dataset(split=split)
    except EclectusError:
        raise
    except Exception as error:
        raise EclectusError(f"data set '{name}' cannot be opened: {first_line(error)}") from error
    names = [column for column in reading.columns if column in (stream.column_names or reading.columns)]
    for record in stream.select_columns(names) if stream.column_names and names else stream:
        yield _as_record(record, reading.text_field)


def _check_names(folder: Path) -> None:
    """Raises EclectusError for a saved data set that names a file or a split outside its own folder."""
    for path in sorted(folder.rglob("*.json")):
        if path.name not in DATASET_FILES:
            continue
        try:
            about = json.loads(path.read_text("utf-8"))
            names = [*about.get("splits", []), *(each["filename"] for each in about.get("_data_files", []))]
        except (ValueError, LookupError, TypeError, AttributeError):
            # `datasets` says what is damaged.
            continue
        for each in names:
            if not isinstance(each, str) or each in ("", ".", "..") or Path(each).name != each:
                raise EclectusError(f"{path} names {each!r}; expected a name in the same folder")


def _check_files(folder: Path, files: dict[str, list[str]]) -> None:
    """Raises EclectusError for a folder whose README.md names data outside it. files: by split, as `datasets` finds."""
    for each in (file for found in files.values() for file in found):
        path = os.path.abspath(each.removeprefix("file://"))
        if SCHEME in each.removeprefix("file://") or not Path(path).is_relative_to(os.path.abspath(folder)):
            raise EclectusError(f"data set '{folder}' names {each} in its README.md; expected files below the folder")
        check_path(path, f"data set '{folder}'")


def _as_record(record: dict[str, Any], text_field: str) -> Record | Fault:
    text = record.get(text_field)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as fault:
            return not_utf8("the record", fault)
    return {name: text if name == text_field else value for name, value in record.items()}
