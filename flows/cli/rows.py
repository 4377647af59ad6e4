"""Rows on a terminal or in a pipe: a table, or one JSON object per row. Rows are printed as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

# Rows whose width decides that of the columns; more than a screen shows.
FIRST = 100
GAP = "  "


def print_rows(names: Sequence[str], rows: Iterable[Sequence[Any]], as_json: bool) -> None:
    """Prints a table, or one JSON object per row; a pipe gets every column whole.

    A terminal's table of up to FIRST rows is fitted to its width. Longer ones, and all in a pipe, are streamed: the
    first rows decide how wide the columns are.
    """
    if as_json:
        for row in rows:
            print(json.dumps(dict(zip(names, row, strict=True)), default=str, ensure_ascii=False))
        return
    rows = iter(rows)
    begun = list(islice(rows, FIRST))
    if len(begun) < FIRST and sys.stdout.isatty():
        _print_fitted(names, begun)
        return
    first = [_cells(row) for row in begun]
    widths = [max(len(cell) for cell in column) for column in zip(names, *first, strict=True)]
    for row in chain([names], first, map(_cells, rows)):
        print(GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cells(row: Sequence[Any]) -> list[str]:
    """One line each: a cell with a line break would break the table."""
    return ["" if value is None else str(value).replace("\n", "\\n").replace("\r", "\\r") for value in row]


def _print_fitted(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*names, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    Console(highlight=False, markup=False).print(table)
