"""Plain text: a file is one document."""

from __future__ import annotations

import io
from collections.abc import Iterator

from eclectus.tasks.documents.readers.records import Fault, Numbered, Reading, not_utf8, start_of


def read_text(handle: io.BufferedReader, reading: Reading) -> Iterator[Numbered]:
    most = 4 * reading.longest_text + 4
    content = handle.read(most)
    if len(content) == most:
        detail = f"the text is longer than {reading.longest_text:,} characters"
        yield None, Fault("too long", detail, start_of(content))
        return
    try:
        yield None, {reading.text_field: content.decode("utf-8-sig")}
    except UnicodeDecodeError as fault:
        yield None, not_utf8("the file", fault)
