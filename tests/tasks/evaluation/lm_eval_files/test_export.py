"""Exported results are the files that the command `lm_eval` writes for the same checkpoint and tasks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings, benchmark
from eclectus.tasks.evaluation.lm_eval_files.export import export_results
from eclectus.tasks.evaluation.lm_eval_files.kept import read_hashes, read_samples
from tests.support.lm_eval_runs import ITEMS, run_lm_eval, write_tasks

# How the run was made, where, and when: of a run of lm_eval, and of ours.
OF_THE_RUN = {
    "config", "date", "pretty_env_info", "total_evaluation_time_seconds", "model_source", "model_name",
    "model_name_sanitized", "transformers_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(world, tasks):
    return ask(world, tasks, "geo", "generated", "whole")


def ask(world, tasks, *names, model="dense", **settings):
    paths = [f"{tasks / name.partition(':')[0]}.yaml{''.join(name.partition(':')[1:])}" for name in names]
    given = BenchmarkSettings(training_workers=0, benchmark_tasks=paths, **settings)
    with world.store.draft("evaluation") as draft:
        benchmark.function(world.models[model], world.tokenizer, given, draft)
        return world.store.commit(draft)


def result_of(folder):
    (path,) = folder.glob("results_*.json")
    return json.loads(path.read_text())


def samples_of(folder, task):
    (path,) = folder.glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(value):
    """The value with numbers, also those in texts, as pytest compares them."""
    if isinstance(value, dict):
        return {name: close(each) for name, each in value.items()}
    if isinstance(value, list):
        return [close(each) for each in value]
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return pytest.approx(value, abs=2e-4, rel=1e-5) if isinstance(value, float) else value


def numbers(value):
    """The same with texts of numbers as numbers."""
    if isinstance(value, dict):
        return {name: numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [numbers(each) for each in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_equal(ours, theirs):
    """Field by field: all that is not of the run itself."""
    one, two = result_of(ours), result_of(theirs)
    assert one.keys() == two.keys()
    assert one["config"].keys() == two["config"].keys()
    for task, config in two["configs"].items():
        for name in ("pretrained", "dtype"):
            config["metadata"].pop(name)
        # The command names the folder of its tasks as it was given.
        config["metadata"]["config_source"] = one["configs"][task]["metadata"]["config_source"]
    for name in one.keys() - OF_THE_RUN:
        assert numbers(one[name]) == close(two[name]), name
    assert one["results"].keys() == {"capitals", "towns", "geo", "generated", "whole"}
    for task in two["configs"]:
        lines = samples_of(ours, task), samples_of(theirs, task)
        assert len(lines[0]) == len(lines[1]) >= ITEMS
        for left, right in zip(*lines, strict=True):
            assert list(left) == list(right)
            assert numbers(left) == close(right)


def test_every_field_is_the_one_that_the_command_writes(home, ours, theirs, tmp_path):
    done = export_results(home, ours, tmp_path)
    check_equal(done.results.parent, theirs)
    names = [{path.name.rpartition("_")[0] for path in each.iterdir()} for each in (done.results.parent, theirs)]
    assert (
        names[0]
        == names[1]
        == {"results", *(f"samples_{each}" for each in ("capitals", "towns", "generated", "whole"))}
    )


@pytest.mark.slow
def test_the_command_itself_in_a_process_of_its_own_writes_the_same_fields(home, world, tasks, ours, tmp_path):
    words = ["--model_args", f"pretrained={world.models['dense'].path},dtype=float32", "--tasks", "geo,generated,whole"]
    words += ["--include_path", tasks, "--output_path", tmp_path / "theirs", "--log_samples", "--seed", "0,0,0,0"]
    command = [Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--device", "cpu", *words]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*map(str, command)], check=True, env=environment, cwd=tmp_path, capture_output=True)
    (theirs,) = (tmp_path / "theirs").iterdir()
    check_equal(export_results(home, ours, tmp_path / "ours").results.parent, theirs)


def test_the_tools_of_the_harness_read_them(home, ours, theirs, tmp_path):
    from datasets import load_dataset
    from lm_eval.utils import (
        get_file_datetime,
        get_file_task_name,
        get_latest_filename,
        get_results_filenames,
        get_sample_results_filenames,
        make_table,
    )

    done = export_results(home, ours, tmp_path)
    names = [str(path) for path in tmp_path.rglob("*")]
    assert get_results_filenames(names) == [str(done.results)]
    assert sorted(get_sample_results_filenames(names)) == sorted(map(str, done.samples))
    assert get_latest_filename([*map(str, done.samples)]) in map(str, done.samples)
    for task, path in zip(("capitals", "generated", "towns", "whole"), sorted(done.samples), strict=True):
        assert get_file_task_name(path.name) == task
        assert path.name.startswith(f"samples_{task}_") and get_file_datetime(path.name) in done.results.name
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(rows) == ITEMS * (2 if task == "generated" else 1)
    one, two = result_of(done.results.parent), result_of(theirs)
    assert make_table(one, "groups") == make_table(two, "groups")
    for each in (one, two):
        # The last of its four digits may differ with the batch.
        del each["results"]["whole"]
    assert make_table(one) == make_table(two)


def test_the_date_is_that_of_the_artifact_and_the_same_artifact_gives_the_same_bytes(home, ours, tmp_path):
    done = export_results(home, ours, tmp_path / "one")
    created = ours.manifest()["created"].removesuffix("Z").replace(":", "-")
    assert done.results.name == f"results_{created}.json"
    again = export_results(home, ours, tmp_path / "two")
    for path in done.results.parent.iterdir():
        assert path.read_bytes() == (again.results.parent / path.name).read_bytes()
    with pytest.raises(EclectusError, match=r"is there already; remove it, or choose another folder with --out"):
        export_results(home, ours, tmp_path / "one")
    assert not [path for path in (tmp_path / "one").iterdir() if path.name.startswith(".")]


def test_examples_and_limits_are_in_the_files_as_the_command_has_them(home, world, tasks, tmp_path):
    ours = ask(world, tasks, "capitals:2", benchmark_limit=3)
    done = export_results(home, ours, tmp_path / "ours", model="my/model")
    theirs = run_lm_eval(world.models["dense"].path, tasks, tmp_path, "capitals", "--num_fewshot", "2", "--limit", "3")
    one, two = result_of(done.results.parent), result_of(theirs)
    assert done.results.parent.name == "my__model" and one["model_name"] == "my/model"
    assert one["n-shot"] == two["n-shot"] == {"capitals": 2}
    assert one["n-samples"] == two["n-samples"] == {"capitals": {"original": ITEMS, "effective": 3}}
    assert one["config"]["limit"] == two["config"]["limit"] == 3
    assert one["task_hashes"] == two["task_hashes"]


def test_numbers_are_rounded_so_that_no_batch_shows_in_the_bytes(ours):
    for task in ("capitals", "whole"):
        for sample in read_samples(ours, task):
            logs = [answer[0] if isinstance(answer, list) else answer for (answer,) in sample["resps"]]
            assert logs and all(log == round(log, 4) for log in logs)


def test_items_that_could_not_be_answered_are_in_neither_scores_nor_samples(home, world, tasks, tmp_path):
    rows = [json.loads(line) for line in (tasks / "cities.json").read_text().splitlines()]
    rows[1]["cities"][0] = "far " * 80
    folder = write_tasks(tmp_path / "tasks")
    (folder / "cities.json").write_text("\n".join(map(json.dumps, rows)))
    done = export_results(home, ask(world, folder, "capitals"), tmp_path / "out")
    content = result_of(done.results.parent)
    assert content["n-samples"]["capitals"] == {"original": ITEMS, "effective": ITEMS - 1}
    samples = samples_of(done.results.parent, "capitals")
    assert [sample["doc_id"] for sample in samples] == [0, *range(2, ITEMS)]
    mean = sum(sample["acc"] for sample in samples) / len(samples)
    assert content["results"]["capitals"]["acc,none"] == pytest.approx(mean, abs=1e-6)


def test_an_evaluation_without_samples_is_one_clear_line(home, world, ours, tmp_path):
    with world.store.draft("evaluation") as draft:
        for name in ("items.parquet", "scores.parquet", "about.json"):
            draft.file(name).write_bytes(ours.file(name).read_bytes())
        old = world.store.commit(draft)
    with pytest.raises(
        EclectusError, match="was made before samples were kept for lm_eval's files; ask its tasks again"
    ):
        export_results(home, old, tmp_path)
    with pytest.raises(EclectusError, match="holds no results of tasks; name an evaluation"):
        export_results(home, world.documents, tmp_path)


def test_the_command_takes_evaluations_and_checkpoints(home, world, ours, tmp_path, capsys):
    main(["--home", str(home.root), "export-results", ours.name, "-o", str(tmp_path)])
    assert "with samples of 4 tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--home", str(home.root), "export-results", world.models["lory"].name, "-o", str(tmp_path)])
    assert re.search("was asked no tasks here; ask some with: .*eclectus --home", capsys.readouterr().err)


def test_what_is_kept_is_small_though_prompts_repeat(world, tasks):
    """25 examples in the prompt of each of two answers."""
    rows = [
        {"country": f"Land {n} " + "far away " * 40, "cities": ["Athens", "Oslo"], "label": n % 2} for n in range(60)
    ]
    folder = write_tasks(tasks / "long")
    (folder / "cities.json").write_text("\n".join(map(json.dumps, rows)))
    kept = ask(world, folder, "capitals:25", benchmark_limit=20)
    whole = sum(len(json.dumps(sample)) for sample in read_samples(kept, "capitals"))
    assert kept.file("samples.parquet").stat().st_size < whole / 10
    assert len(read_hashes(kept)["capitals"]) == 20
    assert pq.read_table(kept.file("scores.parquet")).num_rows == 2
