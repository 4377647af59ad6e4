"""Scheduled retraining, six runs on a real tiny model: which train, which do not, who is champion, rollback."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from eclectus.flows.cli.main import main
from eclectus.flows.parameters import RetrainParameters
from eclectus.flows.retrain import retrain
from eclectus.flows.run import open_run
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.champions import champion
from eclectus.storage.lineage.connection import query
from tests.support.dense_bases import write_base
from tests.support.displays import NullDisplay
from tests.support.retraining import PASSES, SMALL, WORDS


def written(folder, name, counts, seed):
    draw = random.Random(seed)
    lines = [
        json.dumps({"text": " ".join(draw.choices(WORDS[language].split(), k=20)), "language": language})
        for language, count in counts.items()
        for _ in range(count)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six scheduled runs: by name, the flow's result, the states of its steps by label, and what it reported."""
    folder = tmp_path_factory.mktemp("retrain")
    sources = folder / "sources"
    sources.mkdir()
    home = Home.open(folder / "home")
    write_base(folder / "base", "llama")
    found = SimpleNamespace(home=home, folder=folder)

    def scheduled_run(name, rules=PASSES, **changes):
        gate = folder / f"{name}.yaml"
        gate.write_text(json.dumps({"lines": {"extended": {"model": "stage 2", "base": "dense", "rules": rules}}}))
        given = {**SMALL, "sources": [str(sources)], "base_model": str(folder / "base"), "gate": str(gate), **changes}
        display = NullDisplay()
        with pytest.MonkeyPatch.context() as patch:
            # The home is not among the allowed folders: what a run puts into settings itself is not subject to them.
            patch.setenv("ECLECTUS_ROOTS", f"{sources}:{folder / 'base'}:{gate}")
            # Flows called as functions: what is tested here needs no Prefect server.
            with open_run("retrain", RetrainParameters(**given), home, [display]) as run:
                given = retrain.whole(RetrainParameters(**given))
        said = [text for text in display.texts if not text.startswith("Held-out shares")]
        done = SimpleNamespace(result=given, states=run.states, said=said, champion=champion(home, "extended"))
        setattr(found, name, done)

    written(sources, "first", {"en": 60, "tr": 60}, 1)
    scheduled_run("first")
    scheduled_run("idle")
    written(sources, "few", {"tr": 6}, 2)
    scheduled_run("few")
    written(sources, "more", {"tr": 40, "en": 10}, 3)
    scheduled_run("refused", [*PASSES, "bits_per_byte.expanded <= 0.001"])
    scheduled_run("after", [*PASSES, "bits_per_byte.expanded <= 0.001"])
    written(sources, "greek", {"el": 12}, 4)
    scheduled_run("promoted", expanded_languages=["tr", "el"])
    return found


@pytest.mark.slow
def test_the_first_run_trains_and_its_model_becomes_champion(runs):
    stage_2 = runs.first.result.evaluated.checkpoints["stage 2"]
    assert runs.first.champion.checkpoint == stage_2.digest
    assert runs.first.said[0] == "Training: nothing was trained for this line yet."
    assert "promoted: all 2 rules hold" in runs.first.said[-1]


@pytest.mark.slow
def test_a_run_without_new_documents_says_why_it_does_not_train(runs):
    assert runs.idle.result.evaluated is None
    assert runs.idle.states == {"ingest": "reused", "languages": "reused", "split": "reused", "news": "completed"}
    assert runs.idle.said == [
        "Not trained: nothing is new. The last evaluated model of line 'extended', "
        f"checkpoint-{runs.first.champion.checkpoint[:12]}, was promoted (all 2 rules hold)."
    ]


@pytest.mark.slow
def test_a_few_new_documents_are_counted_and_wait_for_more(runs):
    assert runs.few.result.evaluated is None
    told = runs.few.result.news.statistics
    assert told["new_documents"] == told["by_language"]["tr"] <= 6 and told["new_tokens"] > told["new_documents"]
    assert f"not enough is new: {told['new_documents']} of 20 documents" in runs.few.said[0]


@pytest.mark.slow
def test_enough_new_documents_train_on_from_the_champion_and_a_failing_gate_keeps_the_old_one(runs):
    run, first = runs.refused, runs.first.champion.checkpoint
    assert 30 < run.result.news.statistics["new_documents"] <= 56
    asked = query(
        "select i.artifact from steps s join step_inputs i using (step)"
        " where label = 'train stage 1' and i.kind = 'checkpoint'"
        " order by s.started desc limit 1",
        runs.home,
    )
    assert asked[1] == [(first,)]
    assert list(run.result.evaluated.evaluations) == ["dense", "champion", "stage 1", "stage 2"]
    assert run.champion.checkpoint == first
    assert "refused: " in run.said[-1] and "(rule 'bits_per_byte.expanded <= 0.001')" in run.said[-1]


@pytest.mark.slow
def test_a_run_trains_on_new_documents_and_as_many_tokens_of_old_ones(runs):
    told = next(
        json.loads(statistics)
        for (statistics,) in query(
            "select a.statistics from steps s join step_outputs o using (step)"
            " join artifacts a using (artifact) where s.label = 'refresh' order by s.started",
            runs.home,
        )[1]
    )
    tokens = runs.refused.result.news.statistics["by_language"]
    assert told["new"] == told["read_again"] == tokens["tr"] and told["set_apart"] > 0


@pytest.mark.slow
def test_what_was_refused_is_not_trained_again(runs):
    assert runs.after.result.evaluated is None
    assert "nothing is new" in runs.after.said[0] and "was refused" in runs.after.said[0]


@pytest.mark.slow
def test_a_new_language_trains_however_few_its_documents_and_is_promoted(runs):
    assert "Training: languages never trained on: el." in runs.promoted.said
    assert runs.promoted.champion.checkpoint != runs.first.champion.checkpoint
    # What the refused model was trained on is new to the champion.
    seen = {
        label: json.loads(statistics)["new"]
        for label, statistics in query(
            "select s.label, a.statistics from steps s join step_outputs o using (step)"
            " join artifacts a using (artifact) where s.label = 'refresh' order by s.started",
            runs.home,
        )[1]
    }
    assert seen["refresh"] > runs.promoted.result.news.statistics["new_documents"]


@pytest.mark.slow
def test_rolling_back_takes_the_old_champion_and_says_where_there_is_none(runs, capsys):
    command = ["--home", str(runs.home.root), "rollback"]
    main(command)
    first, now = runs.first.champion.checkpoint, runs.promoted.champion.checkpoint
    assert f"checkpoint-{first[:12]} is champion of line 'extended' again" in capsys.readouterr().out
    back = champion(runs.home, "extended")
    assert back.checkpoint == first and back.reason == f"rolled back from checkpoint-{now[:12]}"
    assert back.evaluations == runs.first.champion.evaluations
    with pytest.raises(SystemExit):
        main(command)
    assert "never had another champion" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--line", "lory"])
    assert "line 'lory' has no champion; lines with a champion are extended" in capsys.readouterr().err


@pytest.mark.slow
def test_a_line_that_retraining_makes_no_model_for_is_refused_before_any_work(runs):
    gate = runs.folder / "other.yaml"
    gate.write_text(json.dumps({"lines": {"lory": {"model": "lory", "rules": PASSES}}}))
    for line, complaint in (("lory", "evaluates 'lory', and retraining"), ("extended", "its lines are lory")):
        given = {**SMALL, "sources": [str(runs.folder / "sources")], "gate": str(gate), "retrain_line": line}
        with pytest.raises(EclectusError, match=complaint):
            retrain.whole(RetrainParameters(**given))
