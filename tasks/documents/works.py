"""Works: which documents are pieces of one book, page or file, and so are no independent evidence of each other.

    the record's own field   `work_field`; equal values are one work, whatever source they come from
    id `book#12`             a piece of `book`, of this source: two sources do not share a work by accident
    neither                  the document is a work of its own

The column `work` of a documents table is null in the file where a document is its own work, and is read as its id
(tasks/documents/table.py), so that it costs nothing there.
"""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

PIECE = re.compile(r"(.*\S)#\d+", re.DOTALL)
# Shards of one data set: train-00003-of-00008, part-00012. Four digits may be a year.
SHARD = re.compile(r"[-_.](\d+[-_]of[-_]\d+|\d{5,})(?=(\.[A-Za-z]\w*)*$)")


def work_of_name(name: str | None, source: str | None) -> str | None:
    """The work of which a record of this name is a piece: `lohelp:a.html#3` of source `lohelp` -> `lohelp:a.html`.

    The source is put in front unless the name begins with it. None if the name gives no piece's number.
    """
    piece = PIECE.fullmatch(name or "")
    if piece is None:
        return None
    scope = SHARD.sub("", source or "")
    return piece[1] if re.match(re.escape(scope) + r"([:/]|$)", piece[1]) else f"{scope}:{piece[1]}"


def works_of(documents: pa.Table) -> pa.ChunkedArray:
    """The work of each document, never null [N]. documents: columns document and work; without the latter (artifacts
    made before it) name and source."""
    if "work" in documents.column_names:
        return pc.coalesce(documents["work"], documents["document"])
    pairs = zip(documents["name"].to_pylist(), documents["source"].to_pylist(), strict=True)
    works = pa.chunked_array([pa.array([work_of_name(*pair) for pair in pairs], pa.string())])
    return pc.coalesce(works, documents["document"])
