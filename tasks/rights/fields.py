"""Documents by a field of their records that the lineage does not keep, such as a licence.

The sources of a job are read once more by the code of `ingest`, with the field in the place of the language's, which
has no value where a record has none. A text that several records hold counts with the field of the first. Cost: that
of `ingest`; nothing is kept.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds

from eclectus.storage.artifact import Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.ingest import ingest
from eclectus.tasks.documents.intake.settings import IngestSettings

SHOWN = 5


def documents_with_field(settings: IngestSettings, field: str, value: str) -> set[str]:
    """The ids of the documents whose records hold this value in a field.

    Raises EclectusError where no record does, with values that some hold, and for sources that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="fields-") as scratch:
        draft = Draft("documents", Path(scratch))
        ingest.function(settings.model_copy(update={"language_field": field}), draft)
        folder = draft.path / "documents"
        if not folder.is_dir():
            raise EclectusError("the sources change while they are read; try again when they keep still")
        rows = ds.dataset(folder, format="parquet")
        held = rows.to_table(columns=["document"], filter=pc.field("language") == value)["document"].to_pylist()
        if held:
            return set(held)
        others: Counter[str | None] = Counter()
        for batch in rows.to_batches(columns=["language"]):
            others.update(batch["language"].to_pylist())
    del others[None]
    if not others:
        raise EclectusError(f"no record of the sources has a field '{field}'; name the field with --licence-field")
    shown = ", ".join(f"'{each}' ({count})" for each, count in others.most_common(SHOWN))
    raise EclectusError(f"no record of the sources has '{value}' in field '{field}'; there are {shown}")
