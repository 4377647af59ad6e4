"""A damaged or older file never keeps users from the rest of the lineage."""

import os
import shutil
from pathlib import Path

import duckdb
import pytest

from eclectus.storage.artifact import hash_file
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import LAYOUT, Home
from eclectus.storage.lineage.compact import compact, faults
from eclectus.storage.lineage.connection import connect, query, write_database
from tests.support.history import RUNS, digest, everything, write_chain, write_history

CUT = {
    "cut off": lambda whole: whole[:-10],
    "emptied": lambda whole: b"",
    "overwritten": lambda whole: b"\0" * len(whole),
}


@pytest.mark.parametrize("folder", ["edges", "nodes", "contents"])
def test_a_damaged_index_is_made_again_and_every_answer_stays(home, folder):
    write_chain(home, "r1", range(3))
    compact(home)
    before, up = everything(home), query(f"from upstream('{digest(2)}')", home)[1]
    for how, damaged in CUT.items():
        for part in (home.journal / folder).glob("*.parquet"):
            part.write_bytes(damaged(part.read_bytes()))
        assert everything(home) == before, how
        assert query(f"from upstream('{digest(2)}')", home)[1] == up and len(up) == 4, how
        assert faults(home) == [], how


@pytest.mark.parametrize("stream", ["events", "metrics"])
def test_a_damaged_part_of_the_journal_is_quarantined_with_a_warning_and_the_rest_answers(home, stream):
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
    (fault,) = faults(home)
    assert part.name in fault and "put it back from a copy" in fault
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


def test_a_home_with_an_earlier_versions_columns_answers_and_is_repaired(home):
    """Empty files and parts that an earlier version wrote, which lack columns of today."""
    write_chain(home, "r1", range(3))
    compact(home)
    before, up = everything(home), query(f"from upstream('{digest(2)}')", home)[1]
    lacking = {"nodes": "exclude (digits, placed)", "events": "exclude (peak_memory)"}
    for folder, columns in lacking.items():
        for part in (home.journal / folder).glob("*.parquet"):
            duckdb.sql(f"copy (select * {columns} from '{part}') to '{part}.old' (format parquet)")
            part.unlink()
            name = f"{part.stem.rpartition('-')[0]}-{hash_file(f'{part}.old')[:16]}"
            name = "none" if part.stem.startswith("none") else name
            os.replace(f"{part}.old", part.with_name(f"{name}.parquet"))
    for contents in (home.journal / "contents").glob("1-*"):
        contents.unlink()
    for views in (home.journal / "views").glob("*"):
        views.unlink()
    assert everything(home) == before
    compact(home)
    assert everything(home) == before and query(f"from upstream('{digest(2)}')", home)[1] == up
    assert faults(home) == []


def test_a_changed_byte_in_a_compacted_journal_is_found(home):
    write_chain(home, "r1", range(3))
    compact(home)
    for folder in ("events", "metrics", "edges", "nodes", "contents"):
        part = next(path for path in (home.journal / folder).glob("1-*.parquet"))
        whole = part.read_bytes()
        part.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
        assert any(part.name in fault for fault in faults(home))
        part.write_bytes(whole)
    assert faults(home) == []


def test_a_part_without_contents_gets_them_and_nothing_is_lost(home):
    write_chain(home, "r1", range(3))
    before = everything(home)
    compact(home)
    for contents in (home.journal / "contents").glob("1-*.parquet"):
        contents.unlink()
    assert everything(home) == before and faults(home) == []


def test_a_home_of_an_older_layout_is_migrated_and_a_newer_one_refused(tmp_path):
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parent / "layout1", old)
    home = Home.open(old)
    assert (old / "layout").read_text().strip() == str(LAYOUT)
    before = everything(home)
    assert len(before["steps"]) == 2 and len(before["metrics"]) == 1
    compact(home)
    assert everything(home) == before
    (old / "layout").write_text("99")
    with pytest.raises(EclectusError, match="layout 99, newer"):
        Home.open(old)


def test_a_part_with_fewer_columns_answers_with_nulls(home):
    write_chain(home, "r1", [1])
    compact(home)
    part = next(path for path in (home.journal / "events").glob("1-*.parquet"))
    duckdb.sql(f"copy (select * exclude (peak_memory, error) from '{part}') to '{part}.old' (format parquet)")
    os.replace(f"{part}.old", part)
    assert query("select label, peak_memory from steps", home)[1] == [("label s1", None)]
    assert query("select run, error from runs", home)[1] == [("r1", None)]


def test_damaged_copies_of_the_views_are_made_again(home):
    write_chain(home, "r1", [1])
    before = everything(home)
    for damage in (b"", b"no database", None):
        write_database(home)
        for path in [home.database, *home.journal.glob("views/*.duckdb")]:
            whole = path.read_bytes()
            path.write_bytes(whole[:5000] + b"\xff" * 5000 + whole[10000:] if damage is None else damage)
        assert everything(home) == before, damage
        with duckdb.connect(str(write_database(home)), read_only=True) as shell:
            assert shell.execute("select label from steps").fetchall() == [("label s1",)], damage
