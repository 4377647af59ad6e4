"""A damaged or older file never keeps people from the rest of the books."""

import os

import duckdb
import pytest
from history import RUNS, write_history
from test_books import digest, everything, write_chain

from storage.artifact import hash_file
from storage.compact import compact, faults
from storage.lineage import connect, query

CUT = {
    "cut off": lambda whole: whole[:-10],
    "emptied": lambda whole: b"",
    "overwritten": lambda whole: b"\0" * len(whole),
}


@pytest.mark.parametrize("how", CUT)
@pytest.mark.parametrize("folder", ["edges", "nodes", "contents"])
def test_a_damaged_index_is_made_again_and_every_answer_stays(home, folder, how):
    write_chain(home, "r1", range(3))
    compact(home)
    before, up = everything(home), query(f"from upstream('{digest(2)}')", home)[1]
    for part in (home.journal / folder).glob("*.parquet"):
        part.write_bytes(CUT[how](part.read_bytes()))
    assert everything(home) == before and query(f"from upstream('{digest(2)}')", home)[1] == up and len(up) == 4
    assert faults(home) == []


@pytest.mark.parametrize("stream", ["events", "metrics"])
def test_a_damaged_part_of_the_journal_is_set_aside_and_told_and_the_rest_answers(home, stream):
    for run in ("r1", "r2"):
        write_chain(home, run, range(3))
        compact(home)
    part = min((home.journal / stream).glob("1-*.parquet"), key=lambda path: path.stat().st_mtime)
    for journal in home.journal.glob("*/r*.ndjson"):
        journal.unlink()
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with connect(home) as connection:
        left = connection.execute(f"select distinct run from {stream}").fetchall()
    assert left == [("r2",)]
    (told,) = faults(home)
    assert part.name in told and "put it back from a copy" in told
    part.write_bytes(whole)
    next((home.journal / "damaged").iterdir()).unlink()
    assert len(everything(home)["runs"]) == 2
    compact(home)
    assert faults(home) == []


def test_a_damaged_table_of_an_artifact_sets_that_artifact_aside(home):
    write_history(home)
    table = next(home.store.root.glob("instances/[0-9a-f]*/documents.parquet"))
    table.write_bytes(b"PAR1 half")
    assert {instances[:32] for (instances,) in query("select distinct instances from documents", home)[1]} == {
        place.name for place in home.store.root.glob("instances/[0-9a-f]*") if place != table.parent
    }
    assert len(query("from runs", home)[1]) == len(RUNS)
    assert len(list(home.store.root.glob(".damaged/instances-*"))) == 1


def test_a_home_of_yesterdays_columns_answers_and_is_mended(home):
    """Empty files and parts that an earlier version wrote, which lack columns of today."""
    write_chain(home, "r1", range(3))
    compact(home)
    before, up = everything(home), query(f"from upstream('{digest(2)}')", home)[1]
    lacking = {"nodes": "exclude (digits, placed)", "events": "exclude (peak_memory)"}
    for folder, columns in lacking.items():
        for part in (home.journal / folder).glob("*.parquet"):
            duckdb.sql(f"copy (select * {columns} from '{part}') to '{part}.old' (format parquet)")
            part.unlink()
            name = "none" if part.stem.startswith("none") else f"{part.stem.rpartition('-')[0]}-{hash_file(f'{part}.old')[:16]}"  # fmt: skip
            os.replace(f"{part}.old", part.with_name(f"{name}.parquet"))
    for contents in (home.journal / "contents").glob("1-*"):
        contents.unlink()
    for views in (home.journal / "views").glob("*"):
        views.unlink()
    assert everything(home) == before
    compact(home)
    assert everything(home) == before and query(f"from upstream('{digest(2)}')", home)[1] == up
    assert faults(home) == []
