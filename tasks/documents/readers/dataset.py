"""Data sets of the hub and local ones, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eclectus.storage.errors import EclectusError
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
        stream = datasets.load_dataset(name, config, split=split, revision=commit or revision, streaming=True)
    except Exception as error:
        raise EclectusError(f"data set '{name}' cannot be opened: {first_line(error)}") from error
    names = [column for column in reading.columns if column in (stream.column_names or reading.columns)]
    for record in stream.select_columns(names) if stream.column_names and names else stream:
        yield _as_record(record, reading.text_field)


def _as_record(record: dict[str, Any], text_field: str) -> Record | Fault:
    text = record.get(text_field)
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as fault:
            return not_utf8("the record", fault)
    return {name: text if name == text_field else value for name, value in record.items()}
