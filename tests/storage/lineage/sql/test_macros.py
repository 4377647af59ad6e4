"""Upstream and downstream by one recursive macro, against a breadth-first search in plain Python."""

import random

import duckdb
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.compact import compact, faults
from eclectus.storage.lineage.connection import connect, walk, write_database
from tests.support.history import digest, write_chain, write_step

STEPS = 60
SOURCES = [f"file-{number:064x}" for number in range(10**6, 10**6 + 3)]


def name(number):
    return f"documents-{digest(number)}"


def drawn_steps():
    """[(output, inputs)] of steps: up to three earlier outputs or a source; some make what another one made."""
    draw = random.Random(3)
    steps = []
    for number in range(STEPS):
        read = {draw.choice(steps)[0] for _ in range(draw.randrange(4)) if steps}
        if draw.random() < 0.2:
            read.add(draw.choice(SOURCES))
        made = number - 1 if number and draw.random() < 0.1 else number
        steps.append((name(made), sorted(read)))
    return steps


def steps_away(steps, start, up):
    """{artifact: fewest steps from `start`}, itself included."""
    onward = {}
    for made, read in steps:
        for each in read:
            here, there = (made, each) if up else (each, made)
            onward.setdefault(here, set()).add(there)
    away, level = {start: 0}, {start}
    while level:
        level = {there for here in level for there in onward.get(here, ())} - away.keys()
        away |= dict.fromkeys(level, max(away.values()) + 1)
    return away


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """(a home with two compacted runs and one live one, what its steps made and read)."""
    home, steps = Home.open(tmp_path_factory.mktemp("lineage") / "home"), drawn_steps()
    for run, first in enumerate(range(0, STEPS, STEPS // 3)):
        with Journal(home.journal, f"r{run}") as journal:
            journal.event("run_started", flow="main", parameters={}, packages={})
            for number in range(first, first + STEPS // 3):
                made, read = steps[number]
                write_step(journal, f"s{number}", made.partition("-")[2], read)
            journal.event("run_ended", state="completed", seconds=1.0)
        if run < 2:
            compact(home)
    return home, steps


@pytest.mark.parametrize("where", ["connection", "shell"])
@pytest.mark.parametrize("macro", ["upstream", "downstream"])
def test_every_answer_and_its_distances_are_those_of_a_search_over_what_was_written(history, where, macro):
    home, steps = history
    opened = connect(home) if where == "connection" else duckdb.connect(write_database(home), read_only=True)
    longest = 0
    with opened as connection:
        for start in [*(made for made, _ in steps[::9]), SOURCES[0]]:
            sql = f"select kind || '-' || artifact, steps_away from {macro}('{start}')"
            given = connection.execute(sql).fetchall()
            assert len(given) == len(dict(given)), "each artifact once"
            assert dict(given) == steps_away(steps, start, macro == "upstream")
            longest = max(longest, len(given))
    assert longest > STEPS / 4


def test_a_walk_gives_both_directions_nearest_first(history):
    home, steps = history
    start = steps[STEPS // 2][0]
    rows = walk(start, home)
    assert list(rows[0])[:2] == ["direction", "steps_away"] and rows[0]["direction"] == "this"
    assert [(row["direction"] == "down", row["steps_away"]) for row in rows] == sorted(
        (row["direction"] == "down", row["steps_away"]) for row in rows
    )
    for direction, up in (("up", True), ("down", False)):
        found = {f"{row['kind']}-{row['artifact']}": row["steps_away"] for row in rows if row["direction"] == direction}
        expected = steps_away(steps, start, up)
        del expected[start]
        assert found == expected


def test_a_diamond_gives_each_artifact_once_by_its_shortest_way(home):
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1", digest(1), [SOURCES[0]])
        write_step(journal, "s2", digest(2), [name(1)])
        write_step(journal, "s3", digest(3), [name(1)])
        write_step(journal, "s4", digest(4), [name(2), name(3), SOURCES[0]])
    away = {row["artifact"]: row["steps_away"] for row in walk(name(4), home)}
    assert len(away) == 5 and sorted(away.values()) == [0, 1, 1, 1, 2]
    assert [row["steps_away"] for row in walk(SOURCES[0], home)] == [0, 1, 1, 2, 2]


def test_a_step_that_makes_what_it_reads_and_a_cycle_end(home):
    """Content has one name, so a step without effect reads its own output, and two steps may undo each other."""
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1", digest(1), [name(1)])
        write_step(journal, "s2", digest(2), [name(1)])
        write_step(journal, "s3", digest(1), [name(2)])
    rows = walk(name(1), home)
    assert [(row["direction"], row["steps_away"]) for row in rows] == [("this", 0), ("up", 1), ("down", 1)]


def test_a_chain_of_a_thousand_steps_is_walked_whole(home):
    write_chain(home, "r1", range(1000))
    rows = walk(name(0), home)
    assert len(rows) == 1001 and rows[-1]["steps_away"] == 999
    compact(home)
    assert walk(name(0), home) == rows


def test_a_damaged_index_and_a_damaged_journal_leave_what_is_known(home):
    write_chain(home, "r1", range(3))
    compact(home)
    write_chain(home, "r2", range(3, 6), start=name(2))
    before = walk(name(5), home)
    for folder in ("edges", "nodes"):
        (part,) = (home.journal / folder).glob("1-*.parquet")
        part.write_bytes(part.read_bytes()[:200])
        assert walk(name(5), home) == before and faults(home) == []
    (live,) = home.journal.glob("events/r2*.ndjson")
    lines = live.read_text().splitlines(keepends=True)
    live.write_text("".join(["\0garbage\n" if f'"{digest(3)}"' in line else line for line in lines]))
    # The lost line said what 3 was made from, and its kind.
    assert [(row["direction"], row["steps_away"]) for row in walk(name(5), home)] == [("this", 0), ("up", 1)]
    assert len(walk(name(2), home)) == 4


def test_unknown_names_give_nothing_and_the_start_of_several_is_refused(home):
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1", "ab" + "0" * 62)
        write_step(journal, "s2", "ab" + "1" * 62, ["documents-ab" + "0" * 62])
    for unknown in ("documents-ffff", "checkpoint-ab0", "nonsense", "", "documents-", "'; drop table runs; --"):
        assert walk(unknown, home) == [], unknown
    with pytest.raises(EclectusError, match="'ab' is the start of 2 artifacts, such as documents-ab"):
        walk("ab", home)
    assert [row["steps_away"] for row in walk("ab0", home)] == [0, 1]
    assert len(walk("documents-ab1", home)) == 2


def test_arrays_that_an_earlier_version_kept_are_ignored_and_removed_by_compaction(home):
    write_chain(home, "r1", range(3))
    old = home.journal / "graph" / "99c56024a6d08c27"
    old.mkdir(parents=True)
    (old / "graph.json").write_text('{"parts": ["1-20260101000000-gone"], "arrays": {"node": "00"}}')
    (old / "node.npy").write_bytes(b"\x93NUMPY")
    assert len(walk(name(2), home)) == 4 and faults(home) == []
    compact(home)
    assert not (home.journal / "graph").exists() and len(walk(name(2), home)) == 4
