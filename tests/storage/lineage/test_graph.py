"""The kept graph beside the recursive query of the `duckdb` shell, which knows nothing of it."""

import json
import random
import shutil

import duckdb
import numpy as np
import pytest

from eclectus.storage.journal import Journal
from eclectus.storage.lineage import compact as compaction
from eclectus.storage.lineage import graph
from eclectus.storage.lineage.compact import compact, faults
from eclectus.storage.lineage.connection import connect, query, walk, write_database
from tests.support.history import digest

STEPS = 120


def write_steps(home, run, numbers, draw):
    """Steps that read up to three artifacts from before, sometimes a source, sometimes what another step has made too."""
    with Journal(home.journal, run) as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        for number in numbers:
            inputs = {
                f"in{i}": f"documents-{digest(draw.randrange(number))}" for i in range(draw.randrange(4)) if number
            }
            if draw.random() < 0.2:
                inputs["source"] = f"file-{draw.randrange(3):064x}"
            made = number - 1 if number and draw.random() < 0.1 else number
            about = {"step": f"s{number}", "name": "work", "label": f"work {number}", "flow": "main", "key": "k"}
            journal.event(
                "step_ended", **about, version=1, state="completed", reason="first time", seconds=0.5, settings={}, inputs=inputs,
                output={"kind": "documents", "artifact": digest(made), "rows": 1, "bytes": 9, "created": "2026-01-01T00:00:00Z",
                        "path": "somewhere", "statistics": {}},
            )  # fmt: skip
        journal.event("run_ended", state="completed", seconds=1.0)


@pytest.fixture
def history(home, monkeypatch):
    """Three runs in the kept graph, one in a part that is newer than it, one that is not compacted."""
    monkeypatch.setattr(graph, "FEW", 0)
    draw, each = random.Random(3), STEPS // 5
    for run in range(3):
        write_steps(home, f"r{run}", range(run * each, (run + 1) * each), draw)
    compact(home)
    monkeypatch.setattr(graph, "FEW", 10**6)
    write_steps(home, "r3", range(3 * each, 4 * each), draw)
    compact(home)
    write_steps(home, "r4", range(4 * each, STEPS), draw)
    (kept,) = graph._kept(home)
    assert len(json.loads((kept / "graph.json").read_text())["parts"]) == 1 and len(graph._parts(home)) == 2
    return home


def in_the_shell(home, question):
    with duckdb.connect(write_database(home), read_only=True) as connection:
        return connection.sql(question).fetchall()


def everything(home, ask):
    asked = [f"from {macro}('{digest(n)}')" for n in range(0, STEPS, 17) for macro in ("upstream", "downstream")]
    return [sorted(ask(question), key=str) for question in asked]


def test_answers_are_those_of_the_recursive_query(history):
    with connect(history) as connection:
        given = everything(history, lambda question: connection.sql(question).fetchall())
    assert given == everything(history, lambda question: in_the_shell(history, question))
    assert max(map(len, given)) > STEPS / 2


def test_distances_are_the_fewest_steps(history):
    edges = query("select output, input from edges", history)[1]
    node = {a: n for a, n in query("select artifact, any_value(node) from nodes group by artifact", history)[1]}
    for number in (0, 50, STEPS - 1):
        rows = walk(f"documents-{digest(number)}", history)
        if not rows:
            continue
        for direction, at in (("up", 0), ("down", 1)):
            away, level = {node[digest(number)]: 0}, {node[digest(number)]}
            while level:
                level = {edge[1 - at] for edge in edges if edge[at] in level} - away.keys()
                away |= dict.fromkeys(level, max(away.values()) + 1)
            del away[node[digest(number)]]
            assert {node[row["artifact"]]: row["steps_away"] for row in rows if row["direction"] == direction} == away


@pytest.mark.parametrize("harm", ["no graph", "a part of it gone", "an array cut off", "no arrays"])
def test_a_graph_that_is_not_whole_changes_no_answer(history, harm):
    before = everything(history, lambda question: in_the_shell(history, question))
    (kept,) = graph._kept(history)
    if harm == "no graph":
        shutil.rmtree(kept)
    elif harm == "a part of it gone":
        about = json.loads((kept / "graph.json").read_text())
        (kept / "graph.json").write_text(json.dumps({**about, "parts": [*about["parts"], "1-20200101000000-gone"]}))
    elif harm == "an array cut off":
        (kept / "up.npy").write_bytes((kept / "up.npy").read_bytes()[:200])
    else:
        (kept / "node.npy").unlink()
    assert everything(history, lambda question: query(question, history)[1]) == before


def test_a_changed_byte_of_it_is_found(history):
    (kept,) = graph._kept(history)
    whole = (kept / "up.npy").read_bytes()
    (kept / "up.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [str(kept) in fault for fault in faults(history)] == [True]
    shutil.rmtree(kept)
    assert faults(history) == []


def test_it_is_made_again_when_much_is_new_and_the_old_one_goes(history, monkeypatch):
    monkeypatch.setattr(graph, "FEW", 0)
    monkeypatch.setattr(compaction, "GRACE", -1.0)
    compact(history)
    (kept,) = graph._kept(history)
    assert set(json.loads((kept / "graph.json").read_text())["parts"]) == set(graph._parts(history))
    compact(history)
    assert graph._kept(history) == [kept], "nothing was new"


def test_a_graph_in_two_pieces_is_walked_as_one_whatever_its_width(monkeypatch):
    draw = np.random.default_rng(0)
    names = draw.integers(0, 2**63, 300, dtype=np.uint64)
    pairs, placed = names[np.sort(draw.integers(0, 300, (500, 2)), axis=1)[:, ::-1]], np.arange(300)

    def answer(cut, start):
        first = graph.Graph.of(pairs[:cut], names[: cut // 2], placed[: cut // 2])
        node, when, away = graph.walk(first, graph.Graph.of(pairs[cut:], names, placed), np.array([start]), up=True)
        order = np.argsort(node)
        return [each[order].tolist() for each in (node, when, away)]

    for start in names[::20]:
        monkeypatch.setattr(graph, "WIDE", 10**6)
        whole = answer(0, start)
        assert whole == answer(250, start) == answer(500, start)
        monkeypatch.setattr(graph, "WIDE", 0)
        assert whole == answer(0, start) == answer(250, start) == answer(500, start)
