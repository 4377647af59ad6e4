"""`eclectus adopt`: somebody accepts an artifact as a step's result; runs reuse it, and say who and why."""

import shutil

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query, walk
from eclectus.storage.lineage.garbage import plan as plan_gc
from eclectus.tasks.adoption import tag
from eclectus.tasks.training.upcycle import upcycle
from tests.support.command_line import run_command
from tests.support.dense_bases import write_base
from tests.support.made_up_steps import run, settings_of, words_of, write_inputs

WHY = ("--reason", "a comment changed", "--by", "ana")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("adopt"))


@pytest.fixture
def eclectus(tmp_path, capsys):
    """Calls a command: (exit code, what it printed, its error)."""

    return lambda *words: run_command(capsys, "--home", tmp_path / "home", *words)


@pytest.fixture
def changed(world, steps, tmp_path, monkeypatch):
    """A run, after which the code of a step changed: (home, settings, its artifact by the older code)."""
    home, given = Home.open(tmp_path / "home"), settings_of(world, "extend", {"base_model": "BASE"})
    run(home, "extend", given)
    ((made,),) = query("select artifact from step_outputs o join steps using (step) where label = 'upcycle'", home)[1]
    monkeypatch.setattr(upcycle, "version", upcycle.version + 1)
    return home, given, made


def test_after_an_adoption_nothing_runs_again_and_the_reason_says_who_and_why(changed, steps, eclectus):
    home, given, made = changed
    steps.clear()
    words = ["adopt", "extend", "--step", "upcycle", "--artifact", f"checkpoint-{made[:12]}", *WHY, *words_of(given)]
    code, said, _ = eclectus(*words)
    assert code == 0 and f"checkpoint-{made[:12]} is now the result of step 'upcycle', adopted by ana on" in said
    done = run(home, "extend", given)
    assert set(done.states.values()) == {"reused"} and steps == []
    ((reason,),) = query(f"select reason from steps where run = '{done.id}' and label = 'upcycle'", home)[1]
    assert reason.startswith("adopted by ana on 20") and reason.endswith(": a comment changed")
    code, said, _ = eclectus("why", "last", "upcycle")
    assert "adopted by ana" in said
    (this,) = [row for row in walk(f"checkpoint-{made[:12]}", home) if row["direction"] == "this"]
    assert this["note"].startswith('adopted as "upcycle" by ana on 20') and this["label"] == "upcycle"
    rows = query('select label, step_name, artifact, "by", reason from adoptions', home)[1]
    assert rows == [("upcycle", "upcycle", made, "ana", "a comment changed")]


def test_an_adoption_that_is_taken_back_lets_the_step_run(changed, steps, eclectus):
    home, given, made = changed
    words = ["adopt", "extend", "--step", "upcycle", "--artifact", made, *WHY, *words_of(given)]
    assert eclectus(*words)[0] == 0
    assert eclectus(*words)[0] == 0, "the same once more"
    steps.clear()
    code, said, _ = eclectus("unadopt", f"checkpoint-{made[:12]}", "--by", "ben")
    assert code == 0 and "step 'upcycle' runs again when it is needed; it was adopted by ana" in said
    assert run(home, "extend", given).states["upcycle"] == "completed"
    assert query("from adoptions", home)[1] == []
    code, _, error = eclectus("unadopt", f"checkpoint-{made[:12]}")
    assert code == 2 and "is not adopted by any step" in error


def test_an_adopted_artifact_stays_in_gc(changed, eclectus):
    home, given, made = changed

    def places():
        return {each.place.name for each in plan_gc(home, 0).unneeded}

    assert made[:32] in places()
    eclectus("adopt", "extend", "--step", "upcycle", "--artifact", made, *WHY, *words_of(given))
    assert made[:32] not in places()


def test_a_damaged_adopted_artifact_is_named_and_made_again(changed, eclectus):
    home, given, made = changed
    eclectus("adopt", "extend", "--step", "upcycle", "--artifact", made, *WHY, *words_of(given))
    home.store.find(made).file("content").write_text("changed")
    done = run(home, "extend", given)
    assert done.states["upcycle"] == "completed"
    ((reason,),) = query(f"select reason from steps where run = '{done.id}' and label = 'upcycle'", home)[1]
    assert "is damaged: content changed, which was adopted by ana" in reason


def test_a_checkpoint_from_elsewhere_is_copied_in(world, steps, eclectus, tmp_path):
    home, given = Home.open(tmp_path / "home"), settings_of(world, "pretrain", {})
    run(home, "curate", settings_of(world, "curate", {}))
    write_base(tmp_path / "mine", "llama")
    words = ["--step", "train dense warm-up", "--artifact", str(tmp_path / "mine"), *WHY]
    code, _, error = eclectus("adopt", "pretrain", *words, *words_of(given))
    assert code == 0, error
    steps.clear()
    done = run(home, "pretrain", given)
    assert done.states["train dense warm-up"] == "reused" and "train lory" in steps
    ((artifact,),) = query("select artifact from adoptions", home)[1]
    assert home.store.find(artifact).statistics["made_outside"]


@pytest.mark.parametrize(
    ("step", "artifact", "message"),
    [
        ("upcycled", "MADE", "this flow has no step 'upcycled'; its steps are fetch, "),
        ("train stage 1", "MADE", "step 'train stage 1' cannot adopt yet: its input of step 'upcycle' is not made yet"),
        ("ingest", "MADE", "step 'ingest' has its artifact already"),
        ("upcycle", "feedfeedfeed", "no artifact under"),
        ("upcycle", "TOKENIZER", "but step 'upcycle' makes an artifact of kind checkpoint"),
        ("upcycle", "nowhere/at/all", "names no artifact"),
    ],
)
def test_what_cannot_be_adopted_is_one_line(changed, eclectus, step, artifact, message):
    home, given, made = changed
    ((tokens,),) = query("select distinct artifact from step_outputs where kind = 'tokenizer'", home)[1]
    named = {"MADE": made, "TOKENIZER": tokens}.get(artifact, artifact)
    code, _, error = eclectus("adopt", "extend", "--step", step, "--artifact", named, *WHY, *words_of(given))
    assert code == 2 and message in error and error.count("\n") == 1
    assert query("from adoptions", home)[1] == []


def test_an_adoption_needs_a_reason(changed, eclectus):
    _, given, made = changed
    words = ["adopt", "extend", "--step", "upcycle", "--artifact", made, "--reason", " ", *words_of(given)]
    code, _, error = eclectus(*words)
    assert code == 2 and "an adoption needs a reason" in error


def test_a_tag_is_accepted_where_a_model_is(world, steps, eclectus, tmp_path):
    home, given = Home.open(tmp_path / "home"), settings_of(world, "extend", {})
    with home.store.draft("checkpoint") as draft:
        shutil.copytree(world / "base", draft.path, dirs_exist_ok=True)
        base = home.store.commit(draft)
    assert eclectus("tag", base.name, "base")[:2] == (0, f"base@1 is {base.name}\n")
    for name in ("base@1", "base@latest", base.name):
        done = run(home, "extend", {**given, "base_model": name})
        sql = "select value from settings t join steps s using (step) where s.run = '{}' and s.name = 'fetch'"
        assert query(sql.format(done.id), home)[1] == [(f'"{base.path}"',)], name
    with pytest.raises(EclectusError, match="no tag 'base@2'; known tags: base@1"):
        run(home, "extend", {**given, "base_model": "base@2"})
    given = settings_of(world, "evaluate", {"evaluate_checkpoints": ["base@1"], "gate": ""})
    evaluated = run(home, "evaluate", given)
    assert "fetch" not in " ".join(evaluated.states), "it is here already"
    assert eclectus("untag", "base@1")[:2] == (0, f"base@1 no longer names {base.name}\n")


def test_the_api_of_tags_takes_a_damaged_artifact_for_what_it_is(changed):
    home, _, made = changed
    home.store.find(made).file("content").write_text("changed")
    with pytest.raises(EclectusError, match="is damaged: content changed"):
        tag(home, made, "broken")
