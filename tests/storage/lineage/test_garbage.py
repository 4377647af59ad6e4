"""gc: what it shows, what it never touches, and what is still known of what it freed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import query
from eclectus.storage.lineage.garbage import free, keep, plan
from eclectus.tasks.over_parts import Part, key_of, over_parts
from tests.support.history import RUNS, write_history
from tests.support.part_functions import square

OLD, NEW = RUNS
DRAFTING = """
import sys, time
from eclectus.storage.home import Home
with Home.open(sys.argv[1]).store.draft("documents") as draft:
    draft.file("half.txt").write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def names(planned, what="artifact"):
    return sorted(each.name.split("-")[0] for each in planned.unneeded if each.what == what)


@pytest.fixture
def history(home):
    write_history(home, promote=NEW)
    return home


def test_what_a_champion_and_the_latest_runs_need_stays(history):
    assert names(plan(history, 2)) == []
    planned = plan(history, 0)
    assert names(planned) == ["checkpoint", "documents", "evaluation", "evaluation", "instances"]
    kept = {each.place for each in planned.unneeded}
    ((champion,),) = query("select checkpoint from champions", history)[1]
    for kind, artifact in query(f"select kind, artifact from upstream('{champion}') where kind <> 'file'", history)[1]:
        assert history.store.root / kind / artifact[:32] not in kept
    assert names(plan(history, 1)) == ["checkpoint", "documents", "evaluation", "instances"], "the newer run is kept"


def test_a_kept_run_stays_until_it_is_released(history):
    keep(history, OLD)
    assert names(plan(history, 1)) == []
    assert query(f"select kept from runs where run = '{OLD}'", history)[1] == [(True,)]
    compact(history)
    assert names(plan(history, 1)) == []
    keep(history, OLD, False)
    assert len(names(plan(history, 1))) == 4


def test_the_documents_of_refused_models_stay_for_retrain(history):
    with Journal(history.journal, "later") as journal:
        ((refused,),) = query(
            f"select artifact from step_outputs where run = '{OLD}' and kind = 'checkpoint'", history
        )[1]
        ((champion,),) = query("select checkpoint from champions", history)[1]
        for verdict, checkpoint in (("refused", refused), ("promoted", champion)):
            about = {"line": "lory", "verdict": verdict, "checkpoint": checkpoint}
            journal.decision(**about, reason="r", evaluations={}, rules=[], by="gate")
    assert names(plan(history, 1)) == ["checkpoint", "evaluation", "instances"]


def test_freed_is_freed_and_the_lineage_answers_as_before(history):
    questions = ["from artifacts order by artifact", "from trace('d1')", "from documents order by instances"]
    before = [query(sql, history)[1] for sql in questions]
    planned = plan(history, 1)
    assert free(history, planned) == sum(each.bytes for each in planned.unneeded) > 0
    assert not any(each.place.exists() for each in planned.unneeded)
    assert len(list(history.store.all())) == 4 and plan(history, 1).unneeded == []
    after = [query(sql, history)[1] for sql in questions]
    assert after == before
    assert not list((history.store.root / ".freed").iterdir())


def test_nothing_is_freed_while_a_run_is_at_work(history):
    planned = plan(history, 0)
    with Journal(history.journal, "busy") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        with pytest.raises(EclectusError, match="run busy is active"):
            free(history, planned)
        assert all(each.place.exists() for each in planned.unneeded)
    free(history, planned)


def test_the_draft_of_a_killed_process_is_freed_and_that_of_a_living_one_is_not(home):
    process = subprocess.Popen([sys.executable, "-c", DRAFTING, str(home.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    assert plan(home, 1).unneeded == []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    planned = plan(home, 1)
    assert names(planned, "draft") == ["documents"] and planned.unneeded[0].bytes == 4
    free(home, planned)
    assert not list((home.store.root / ".drafts").iterdir())


def test_parts_of_steps_are_freed_a_week_after_their_last_use(run, home, tmp_path):
    parts = [Part(key_of("square", number), {"number": number, "calls": str(tmp_path)}) for number in (2, 3)]
    done = over_parts(square, parts, "squaring")
    os.link(done[0].file("square"), tmp_path / "linked")
    begun = done[1].folder.with_name(".begun")
    begun.mkdir()
    for each in (*(path for one in done for path in (*one.folder.iterdir(), one.folder)), begun):
        os.utime(each, (time.time() - 8 * 86_400,) * 2)
    assert len(plan(home, 1).unneeded) == 3
    # Finding it is using it.
    over_parts(square, parts[:1], "squaring")
    planned = plan(home, 1)
    assert names(planned, "part") == sorted([done[1].folder.name, ".begun"])
    os.utime(done[0].folder, (time.time() - 8 * 86_400,) * 2)
    sizes = {each.place: each.bytes for each in plan(home, 1).unneeded}
    assert sizes[done[0].folder] == sizes[done[1].folder] - 1, "what is linked elsewhere is not freed"
    run.journal.event("run_ended", state="completed")
    run.journal.close()
    free(home, planned)
    assert done[0].folder.exists() and not done[1].folder.exists() and not begun.exists()


def test_what_the_lineage_does_not_know_is_left_alone(home):
    with home.store.draft("report") as draft:
        draft.file("page.html").write_text("a page")
        home.store.commit(draft)
    planned = plan(home, 0)
    assert planned.unneeded == [] and planned.unknown == 1


def test_the_command_shows_first_and_frees_with_yes(history, capsys):
    words = ["--home", str(history.root), "gc", "--runs", "1"]
    main([*words, "--json"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 4 and all(os.path.isdir(row["place"]) for row in shown)
    main([*words, "--yes"])
    assert "freed" in capsys.readouterr().out
    assert not any(os.path.exists(row["place"]) for row in shown)
    main(["--home", str(history.root), "keep", OLD])
    assert "is kept" in capsys.readouterr().out
