"""Several trainings in one run (`seeds`): data once, every model once a seed, compared in pairs, and resumed."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

import eclectus.flows.main
import eclectus.flows.parameters
from eclectus.flows.cli.champions import promote
from eclectus.flows.cli.summary import summarize
from eclectus.flows.cli.terminal import Terminal
from eclectus.flows.parameters import EvaluateParameters, MainParameters, PretrainParameters
from eclectus.flows.run import open_run
from eclectus.models.training.instances import Instances
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.report.compare_runs import compare_runs
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings
from tests.support.tiny_training import write_instances

WORDS = {
    "en": "the ship left harbour court heard owner rain fell village letter engine market bread coast dawn",
    "tr": "gemi liman sabah mahkeme dinledi sahibi yagmur koy mektup motor pazar ekmek kiyi ayrildi okudu",
}
SMALL = {
    "language_detector": "field", "original_languages": ["en"], "expanded_languages": ["tr"], "embedding_steps": 2,
    "embedding_dimension": 16, "tokenizer_vocabulary": 300, "instance_tokens": 32, "lory_segment": 16,
    "lory_experts": 2, "model_width": 16, "model_layers": 1, "model_heads": 2, "model_key_value_heads": 2,
    "model_feed_forward": 24, "pretrain_steps": 4, "pretrain_warmup_steps": 1, "dense_warmup": 0.3,
    "heldout_minimum": 4, "extension_experts": 2, "post_pretrain_steps": 3, "post_pretrain_warmup_steps": 1,
    "review_steps": 2, "review_warmup_steps": 1, "training_workers": 0, "evaluation_samples": 0,
}  # fmt: skip
TRAINED = ("pretrain", "upcycle", "extend")
MODELS = ("dense", "lory", "stage 1", "stage 2")


def write_documents(path):
    draw = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(draw.choices(WORDS[language].split(), k=25)), "language": language})
        for language in WORDS
        for _ in range(60)
    ]
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with one training, one with two, the same again, and one with the second training alone: 30 CPU seconds."""
    folder = tmp_path_factory.mktemp("seeds")
    write_documents(folder / "documents.jsonl")
    gate = folder / "gate.yaml"
    rules = ["retention.original >= 0.1"]
    gate.write_text(json.dumps({"lines": {"extended": {"model": "stage 2", "base": "dense", "rules": rules}}}))
    home = Home.open(folder / "home")
    found = SimpleNamespace(home=home, folder=folder, gate=gate)

    def run_main(name, **changes):
        parameters = MainParameters(
            **SMALL, sources=[str(folder / "documents.jsonl")], seed=5, gate=str(gate), **changes
        )
        with open_run("main", parameters, home) as run:
            result = eclectus.flows.main.main.whole(parameters)
        steps = query(f"select name, label, key, seed, state from steps where run = '{run.id}' order by started", home)[
            1
        ]
        setattr(found, name, SimpleNamespace(result=result, run=run, steps=steps))

    run_main("one")
    run_main("two", seeds=2)
    run_main("again", seeds=2)
    run_main("alone", training_seed=6)
    return found


@pytest.mark.slow
def test_the_first_training_has_the_keys_and_labels_of_a_run_without_seeds(runs):
    decided = ("report", "gate extended")
    one = {(label, key) for _, label, key, _, _ in runs.one.steps if label not in decided}
    assert len(one) > 20 and one < {(label, key) for _, label, key, _, _ in runs.two.steps}
    reused = {(label, key) for _, label, key, _, state in runs.two.steps if state == "reused"}
    assert one <= reused


@pytest.mark.slow
def test_data_is_made_once_and_every_model_once_a_seed(runs):
    made = [(label, seed) for _, label, _, seed, state in runs.two.steps if state == "completed"]
    trained = [(label, seed) for name, label, _, seed, state in runs.two.steps if name in TRAINED and state != "reused"]
    assert trained == [
        (f"{label} seed 6", 6)
        for label in ("train dense warm-up", "train dense", "train lory", "upcycle", "train stage 1", "train stage 2")
    ]
    others = {label for label, _ in made} - {label for label, _ in trained}
    assert others == {f"evaluate {model} seed 6" for model in MODELS} | {"gate extended", "report", "report seed 5"}
    data = [label for name, label, *_ in runs.two.steps if name in ("ingest", "split", "group", "tokenizer", "replay")]
    assert len(data) == len(set(data)) == 5


@pytest.mark.slow
def test_a_training_of_one_seed_is_a_full_pair_that_shares_warm_up_and_base(runs):
    inputs = dict(
        query(
            "select s.label, list(i.artifact order by i.artifact) from steps s join step_inputs i using (step) "
            f"where s.run = '{runs.two.run.id}' and i.kind = 'checkpoint' group by s.label",
            runs.home,
        )[1]
    )
    made = dict(
        query(
            "select s.label, o.artifact from steps s join step_outputs o using (step) "
            f"where s.run = '{runs.two.run.id}'",
            runs.home,
        )[1]
    )
    for seed in ("", " seed 6"):
        assert inputs[f"train dense{seed}"] == inputs[f"train lory{seed}"] == [made[f"train dense warm-up{seed}"]]
        assert inputs[f"upcycle{seed}"] == [made[f"train dense{seed}"]]
        assert inputs[f"train stage 2{seed}"] == [made[f"train stage 1{seed}"]]
    trained = [label for label in made if label.startswith("train ")]
    assert len({made[label] for label in trained}) == len(trained) == 10


@pytest.mark.slow
def test_the_first_report_is_there_before_the_second_training_and_the_last_one_has_both(runs):
    order = [label for _, label, *_ in runs.two.steps]
    assert order.index("report seed 5") < order.index("train dense warm-up seed 6") < order.index("gate extended")
    result = runs.two.result
    assert list(result.evaluations) == list(MODELS)
    assert set(result.repeats) == set(result.repeated) == {f"{model} seed 6" for model in MODELS}
    (inputs,) = query(
        "select list(i.name) from steps s join step_inputs i using (step) "
        f"where s.run = '{runs.two.run.id}' and s.label = 'report'",
        runs.home,
    )[1][0]
    assert {f"repeats.{model} seed 6" for model in MODELS} < set(inputs)
    assert "2 trainings" in result.report.statistics["verdict"][0]
    asked = (
        "select i.name from steps s join step_inputs i using (step) "
        f"where s.run = '{runs.two.run.id}' and s.label = 'gate extended'"
    )
    names = {name for (name,) in query(asked, runs.home)[1]}
    assert {"repeats.candidate seed 6", "repeats.base seed 6"} < names


@pytest.mark.slow
def test_the_same_run_again_reuses_everything(runs):
    assert {state for *_, state in runs.again.steps} == {"reused"}


@pytest.mark.slow
def test_one_more_training_on_the_same_data_is_that_of_its_seed(runs):
    made = {label for _, label, _, _, state in runs.alone.steps if state == "completed"}
    assert made == {"gate extended", "report seed 6"} | {f"contamination {model} seed 6" for model in MODELS}
    assert runs.alone.result.evaluations["lory"] == runs.two.result.repeats["lory seed 6"]


@pytest.mark.slow
def test_the_comparison_of_runs_counts_each_training_once(runs):
    names = [getattr(runs, name).run.id for name in ("one", "two", "again", "alone")]
    (group,) = compare_runs(runs.home, names).groups
    measured = [each.statistics["bits_per_byte"]["language"]["en"]
                for each in (runs.two.result.evaluations["lory"], runs.two.result.repeats["lory seed 6"])]  # fmt: skip
    mean, spread, count = group.value(("evaluate lory", "bits_per_byte", "language en"))
    assert (mean, count) == (pytest.approx(sum(measured) / 2, abs=1e-4), 2)
    assert spread == pytest.approx(abs(measured[0] - measured[1]) / 2**0.5, abs=1e-4)
    assert [run.seed for run in group.runs] == ["5", "5 (trainings 5 to 6)", "5 (trainings 5 to 6)", "5 (training 6)"]


@pytest.mark.slow
def test_the_summary_gives_the_mean_over_trainings_with_its_spread(runs, capsys):
    summarize(runs.two.run, runs.two.result, Terminal())
    printed = capsys.readouterr().out
    values = [
        each.statistics["bits_per_byte"]["language"]["tr"]
        for each in (runs.two.result.evaluations["lory"], runs.two.result.repeats["lory seed 6"])
    ]
    assert f"{sum(values) / 2:.3f} ± {abs(values[0] - values[1]) / 2**0.5:.3f}" in printed
    for words in ("mean ± standard deviation over the trainings", "checkpoint stage 2 seed 6", "gate 'extended'"):
        assert words in printed
    assert all(sentence in printed for sentence in runs.two.result.report.statistics["verdict"])


@pytest.mark.slow
def test_a_further_training_can_be_promoted_against_its_own_base(runs, monkeypatch):
    monkeypatch.setenv("ECLECTUS_HOME", str(runs.home.root))
    decision = promote(runs.two.result.repeated["stage 2 seed 6"].name, str(runs.gate), None, None)
    assert (decision.line, decision.verdict) == ("extended", "promoted")
    (base,) = query(
        "select i.artifact from steps s join step_inputs i using (step) where i.name = 'base.text' "
        "and s.label = 'gate extended' order by s.started desc limit 1",
        runs.home,
    )[1][0]
    assert base == runs.two.result.repeats["dense seed 6"].digest


def test_trainings_have_the_seeds_that_follow_and_labels_name_all_but_that_of_the_data():
    parameters = PretrainParameters(seed=3, seeds=3)
    assert [each.seed_of_training for each in parameters.trainings()] == [3, 4, 5]
    assert [each.seed_label for each in parameters.trainings()] == ["", " seed 4", " seed 5"]
    assert {(each.seed, each.seeds) for each in parameters.trainings()} == {(3, 1)}
    alone = PretrainParameters(seed=3)
    assert alone.trainings() == [alone] and alone.seed_label == ""


def test_a_further_training_reads_its_first_epoch_in_an_order_of_its_own_and_the_first_one_keeps_its_key(tmp_path):
    of = {"pretrain_stage": "dense"}
    parameters = PretrainParameters(seed=5, seeds=2)
    first, second = (PretrainStageSettings.of(each, **each.training, **of) for each in parameters.trainings())
    assert first.key_values() == PretrainStageSettings.of(PretrainParameters(seed=5), **of).key_values()
    assert "reordered" not in first.key_values() and second.key_values()["reordered"] is True
    write_instances(tmp_path, count=20)
    read = [Instances(tmp_path, each.reordered) for each in (first, second)]
    orders = [
        [each.rows_of_step(step, 4, seed).tolist() for step in range(5)]
        for each, seed in zip((*read, read[1]), (5, 6, 7), strict=True)
    ]
    flat = [[row for step in order for row in step] for order in orders]
    assert flat[0] == list(range(20)) and all(sorted(each) == flat[0] for each in flat)
    assert len({tuple(each) for each in flat}) == 3


def test_trained_checkpoints_are_not_evaluated_over_seeds(tmp_path):
    write_documents(tmp_path / "documents.jsonl")
    given = EvaluateParameters(sources=[str(tmp_path)], evaluate_checkpoints=["checkpoint-1"], seeds=3)
    with pytest.raises(EclectusError, match=r"seeds is 3, but evaluate_checkpoints names .* \(--seeds 1\)"):
        given.check_together()
