"""Files that `lm_eval` wrote elsewhere become an evaluation of a checkpoint, or are refused with a reason."""

import json
import math
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.connection import query
from eclectus.storage.lineage.garbage import plan
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings, benchmark
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate
from eclectus.tasks.evaluation.lm_eval_files.export import export_results
from eclectus.tasks.evaluation.lm_eval_files.import_results import (
    ImportResultsSettings,
    check_model,
    import_results,
)
from eclectus.tasks.evaluation.lm_eval_files.imported import imported_for, read_imports
from eclectus.tasks.evaluation.lm_eval_files.read import ResultFile, find_result_file
from eclectus.tasks.evaluation.task_scores import Answers, compare_answers, incomparable, scores_by_task
from eclectus.tasks.promotion.gate import Gate
from eclectus.tasks.promotion.promote import Candidate, decide, find_candidate
from eclectus.tasks.report.forgetting import tasks_table
from tests.support.lm_eval_runs import ITEMS, run_lm_eval, write_tasks
from tests.support.small_world import SEGMENT

DENSE, MIXTURE = "dense", "stage 2"


@pytest.fixture(scope="module")
def others(world, tasks, tmp_path_factory):
    """Of another checkpoint: the same tasks, and one of them with examples."""
    out = tmp_path_factory.mktemp("others")
    same = run_lm_eval(world.models[MIXTURE].path, tasks, out / "same")
    shots = run_lm_eval(world.models[MIXTURE].path, tasks, out / "shots", "capitals", "--num_fewshot", "2")
    return same, shots


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy of the files that a test may change."""
    return shutil.copytree(theirs, tmp_path / "model")


def take(world, folder, model=DENSE):
    """Imports a folder outside a run."""
    path, _ = find_result_file(folder)
    with world.store.draft("evaluation") as draft:
        import_results.function(world.models[model], ImportResultsSettings(imported_results=str(path)), draft)
        return world.store.commit(draft)


def take_in_run(world, folder, model):
    path, _ = find_result_file(folder)
    settings = ImportResultsSettings(imported_results=str(path), imported_by="ana")
    return import_results(label=f"import of {model}", checkpoint=world.models[model], settings=settings)


def ask(world, tasks, model=DENSE, names=("geo", "generated", "whole")):
    settings = BenchmarkSettings(training_workers=0, benchmark_tasks=[str(tasks / f"{name}.yaml") for name in names])
    with world.store.draft("evaluation") as draft:
        benchmark.function(world.models[model], world.tokenizer, settings, draft)
        return world.store.commit(draft)


def rows(artifact, name):
    return pq.read_table(artifact.file(f"{name}.parquet")).to_pylist()


def change(folder, pattern, edit):
    """Rewrites the JSON of the one file with this pattern: lines for samples."""
    (path,) = folder.glob(pattern)
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(edit(content) or content))
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in edit(lines) or lines))


def test_it_has_the_tables_of_a_benchmark_of_the_same_checkpoint(world, tasks, theirs):
    made, ours = take(world, theirs), ask(world, tasks)
    for name in ("scores", "items"):
        assert pq.read_schema(made.file(f"{name}.parquet")) == pq.read_schema(ours.file(f"{name}.parquet"))
    scores = [{(row["task"], row["metric"]): row for row in rows(each, "scores")} for each in (made, ours)]
    # Of a group the harness has the metrics that its file names.
    assert scores[1].keys() - scores[0].keys() == {("geo", "acc_norm")}
    for key, row in scores[0].items():
        own = scores[1][key] | {"standard_error": None} if row["standard_error"] is None else scores[1][key]
        own |= {"standard_error": row["standard_error"]} if key == ("geo", "acc") else {}
        assert row == {name: pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
                       for name, value in own.items()}, key  # fmt: skip
    items = [{(row["task"], row["item"], row["metric"]): row for row in rows(each, "items")} for each in (made, ours)]
    assert items[0].keys() == items[1].keys()
    for key, row in items[0].items():
        own = items[1][key]
        assert row["value"] == (own["value"] if own["value"] is None else pytest.approx(own["value"], abs=2e-4))
        for name in ("answers", "target", "language", "cut", "missing", *(["question"] * (key[0] != "whole"))):
            assert row[name] == own[name]
        assert json.loads(row["responses"]) == [
            pytest.approx(each, abs=2e-4) if isinstance(each, float) else each for each in json.loads(own["responses"])
        ]
    assert made.statistics["imported"]["files"].keys() == {path.name for path in theirs.iterdir()}
    assert made.manifest()["rows"] == ours.manifest()["rows"]


def test_it_is_exported_again_with_the_same_bytes(home, world, theirs, tmp_path):
    done = export_results(home, take(world, theirs), tmp_path)
    for path in done.results.parent.iterdir():
        name, _, suffix = path.name.rpartition("_")
        (before,) = theirs.glob(f"{name}_*.{suffix.rpartition('.')[2]}")
        assert path.read_bytes() == before.read_bytes(), name


def test_what_another_home_exported_is_imported_and_comparable(home, world, tasks, tmp_path):
    ours = ask(world, tasks)
    done = export_results(home, ours, tmp_path, world.models[DENSE].name)
    file = ResultFile.read(done.results)
    check_model(world.store, world.models[DENSE], file, None)
    here, there = Answers("here", ours), Answers("there", None, (take(world, done.results.parent),))
    for task in ("capitals", "towns", "generated", "whole"):
        metric = here.scores[task]["metric"]
        assert not incomparable(here, there, task, metric)
        if task != "whole":
            # Of a whole text the harness has two numbers for an item, not one.
            assert compare_answers(here, there, task).change == pytest.approx(0, abs=1e-6)


def test_results_without_samples_are_scores_only(world, folder):
    for path in folder.glob("samples_*.jsonl"):
        path.unlink()
    made = take(world, folder)
    assert not rows(made, "items") and len(rows(made, "scores")) == 9
    assert made.statistics["imported"]["without_samples"] == ["capitals", "generated", "towns", "whole"]
    assert Answers(DENSE, None, (made,)).notes == [
        "capitals, generated, towns, whole of dense was imported without samples: scores only, no intervals"
    ]


def test_a_score_that_is_no_number_is_none_and_one_missing_file_of_samples_leaves_the_rest(world, folder):
    def edit(content):
        content["results"]["whole"]["bits_per_byte,none"] = math.nan

    change(folder, "results_*.json", edit)
    (path,) = folder.glob("samples_towns_*")
    path.unlink()
    made = take(world, folder)
    scores = {(row["task"], row["metric"]): row["score"] for row in rows(made, "scores")}
    assert scores["whole", "bits_per_byte"] is None and scores["whole", "byte_perplexity"] > 1
    assert scores["towns", "acc"] is not None
    assert {row["task"] for row in rows(made, "items")} == {"capitals", "generated", "whole"}


def cut_off(folder):
    (path,) = folder.glob("results_*.json")
    path.write_text(path.read_text()[:500])


def of_another_run(folder):
    change(folder, "samples_capitals_*", lambda lines: [line | {"prompt_hash": "0" * 64} for line in lines])


def half(folder):
    change(folder, "samples_capitals_*", lambda lines: lines[:3])


def half_of_an_old_run(folder):
    half(folder)
    change(folder, "results_*.json", lambda content: content | {"task_hashes": {}})


def broken_line(folder):
    (path,) = folder.glob("samples_towns_*")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:50]]))


def better(folder):
    def edit(content):
        content["results"]["capitals"]["acc,none"] = 1.0

    change(folder, "results_*.json", edit)


def better_group(folder):
    def edit(content):
        content["results"]["geo"]["acc,none"] = 1.0

    change(folder, "results_*.json", edit)


def outside(folder):
    def edit(content):
        content["configs"]["../../secret"] = {}

    change(folder, "results_*.json", edit)


def something_else(folder):
    change(folder, "results_*.json", lambda _: {"results": []})


def not_answered(folder):
    change(folder, "samples_capitals_*", lambda lines: [{**line, "resps": None} for line in lines])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist; give a results_DATE.json of lm_eval, or its folder"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no results_DATE.json of lm_eval; run it"),
        (cut_off, r"is not whole JSON \(.*line .*\); copy it again"),
        (of_another_run, r"samples_capitals_.* is of another run than results_.*, or not whole: the hash of its"),
        (half, r"samples_capitals_.* is of another run than results_.*, or not whole: it has 3 items, of 7: the hash"),
        (half_of_an_old_run, r"samples_capitals_.* has 3 items of task 'capitals', but results_.* says 7"),
        (broken_line, r"samples_towns_.* cannot be read from line 3 on \(JSONDecodeError"),
        (not_answered, r"samples_capitals_.* cannot be read from line 1 on \(TypeError"),
        (better, r"says 1 for acc of task 'capitals' \(filter 'none'\), but the items in samples_capitals_.* give 0.4"),
        (better_group, r"says 1 for acc of group 'geo', but its tasks give 0.4"),
        (outside, r"names the task '../../secret', which can be no name of a file"),
        (something_else, r"is no result file of lm_eval 0.4.3 or later: it has no 'results'"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_files_that_cannot_be_used_are_named_with_the_reason(world, folder, damage, message):
    damage(folder)
    with pytest.raises(EclectusError, match=message):
        take(world, folder)


def test_nothing_of_a_file_is_called_or_rendered(world, folder, tmp_path):
    """What the harness would call in a configuration of a task is only text here."""
    bad = f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}!function os.mkdir {tmp_path / 'made'}"

    def edit(content):
        for config in content["configs"].values():
            config |= dict.fromkeys(("doc_to_text", "process_results", "process_docs", "doc_to_target"), bad)
            config["metric_list"] = [{"metric": "acc", "aggregation": f"def f(items):\n    open('{tmp_path}/made')"}]

    change(folder, "results_*.json", edit)
    assert rows(take(world, folder), "scores")
    assert not (tmp_path / "made").exists()


def test_of_several_results_in_a_folder_the_latest_is_taken_and_of_several_models_none(folder, others, tmp_path):
    (path,) = folder.glob("results_*.json")
    later = path.with_name("results_2999-01-01T00-00-00.000001.json")
    shutil.copy(path, later)
    assert find_result_file(folder.parent)[0] == later
    assert find_result_file(folder) == (
        later, [f"of 2 result files in {folder} the latest is taken: {later.name}"]
    )  # fmt: skip
    assert find_result_file(path) == (path, [])
    shutil.copytree(others[0], folder.parent / "another")
    with pytest.raises(EclectusError, match=r"has results of several models, in .*another, .*model; give one of them"):
        find_result_file(folder.parent)


def named(folder, name):
    path, _ = find_result_file(folder)
    file = ResultFile.read(path)
    return replace(file, content=file.content | {"model_name": name})


def test_the_model_in_the_file_must_be_the_checkpoint_or_be_said_to_be(world, theirs, tmp_path):
    dense, mixture = world.models[DENSE], world.models[MIXTURE]
    export = tmp_path / "export"
    export.mkdir()
    shutil.copy(mixture.file("config.json"), export)
    (export / "export.json").write_text(json.dumps({"exported_from": mixture.name, "files": {}}))
    world.store.tags.add("greek@1", f"checkpoint-{mixture.digest}")
    for name in (mixture.name, mixture.digest, f"/elsewhere/checkpoint/{mixture.digest[:32]}", str(export), "greek@1"):
        check_model(world.store, mixture, named(theirs, name), None)
        with pytest.raises(
            EclectusError, match=f"is of model '{name}', which is not known to be {dense.name}; if it is"
        ):
            check_model(world.store, dense, named(theirs, name), None)
    check_model(world.store, dense, named(theirs, "gpt2"), "gpt2")
    with pytest.raises(EclectusError, match="is of model 'gpt2', not 'gpt3'"):
        check_model(world.store, dense, named(theirs, "gpt2"), "gpt3")


def test_what_came_from_a_hub_is_known_by_its_name_there(world, theirs):
    with world.store.draft("checkpoint") as draft:
        draft.file("config.json").write_text("{}")
        draft.statistics = {"pulled_from": f"anna/greek@{'a' * 40}"}
        pulled = world.store.commit(draft)
    check_model(world.store, pulled, named(theirs, "anna/greek"), None)
    with pytest.raises(EclectusError, match="say so with --model 'ben/greek'"):
        check_model(world.store, pulled, named(theirs, "ben/greek"), None)


def test_the_command_imports_once_and_lineage_says_who_and_from_which_files(home, world, theirs, capsys):
    words = ["--home", str(home.root), "import-results", str(theirs), "--checkpoint", world.models[DENSE].name]
    main([*words, "--by", "ana"])
    first = capsys.readouterr().out.splitlines()[-1]
    main([*words, "--by", "ana"])
    again = capsys.readouterr().out.splitlines()[-1]
    assert "5 tasks and groups, by ana" in first and "was imported before, nothing is new" in again
    assert first.partition(":")[0] == again.partition(":")[0]
    (digest,) = set(read_imports(home)[world.models[DENSE].digest])
    of_it = f"join step_outputs o using (step) where o.artifact = '{digest}'"
    _, asked = query(f"select distinct s.name, value from settings s {of_it} order by all", home)
    assert asked == [("imported_by", '"ana"'), ("imported_model", f'"{world.models[DENSE].path}"')]
    _, inputs = query(f"select distinct i.name, i.kind from step_inputs i {of_it}", home)
    assert {*inputs} == {("checkpoint", "checkpoint"), *((path.name, "source") for path in theirs.iterdir())}
    with pytest.raises(SystemExit):
        main([*words[:4], "--checkpoint", world.models[MIXTURE].name])
    assert "say so with --model" in capsys.readouterr().err
    assert digest[:32] not in [each.place.name for each in plan(home, 0).unneeded]


def test_imported_results_count_in_gates_like_those_that_were_measured_here(world, theirs, others, run):
    mixture = world.models[MIXTURE]
    settings = EvaluateSettings(evaluation_context=SEGMENT, evaluation_samples=0, training_workers=0)
    given = {"documents": world.documents, "tokenizer": world.tokenizer, "settings": settings}
    for name in (DENSE, MIXTURE):
        evaluate(label=f"evaluate {name}", checkpoint=world.models[name], **given)
    base = take_in_run(world, theirs, DENSE)
    same, shots = (take_in_run(world, each, MIXTURE) for each in others)
    found, _, _ = find_candidate(run.home, mixture)
    start, _, _ = find_candidate(run.home, world.models[DENSE])
    assert start.evaluations["imported"] == base
    # The later one first; both are of the same model.
    assert [found.evaluations["imported"], found.evaluations["imported 2"]] == [shots, same]
    rules = [
        "acc.towns >= base - 1",
        "exact_match,strict.generated >= 0",
        "acc.capitals >= base - 1",
        "acc.nowhere >= 0",
    ]
    decision = decide(Gate("g", MIXTURE, DENSE, rules), found, start)
    towns, generated, capitals, nowhere = decision.rules
    assert towns["passed"] and generated["passed"]
    assert capitals["reason"] == (
        "acc on capitals cannot be compared with the base's: 2 few-shot examples and 0"
    ) and not capitals["passed"]  # fmt: skip
    assert "there is no measure 'acc.nowhere'" in nowhere["reason"] and "acc_norm.towns" in nowhere["reason"]
    assert decision.evaluations["imported"] == shots.digest


def test_models_are_compared_on_imported_questions_where_they_were_asked_the_same(world, tasks, theirs, others):
    dense = Answers(DENSE, ask(world, tasks))
    same, shots = (Answers(MIXTURE, None, (take(world, each, MIXTURE),)) for each in others)
    found = compare_answers(dense, same, "capitals")
    assert found.items == ITEMS and found.after == pytest.approx(same.scores["capitals"]["score"], abs=1e-6)
    assert compare_answers(dense, shots, "capitals") is None
    assert incomparable(dense, shots, "capitals", "acc") == "0 few-shot examples and 2"
    assert not incomparable(dense, shots, "towns", "acc")
    table = tasks_table({DENSE: dense, "shots": shots, MIXTURE: same}, {})
    cells = {row[0].text: [cell.small for cell in row[1:-2]] for row in table.rows}
    assert "imported" not in cells["capitals"][0]
    assert cells["capitals"][1].endswith("imported, not comparable: 0 few-shot examples and 2")
    assert cells["capitals"][2].endswith("imported")
    assert "Imported: lm-evaluation-harness was run elsewhere" in table.note


def test_other_questions_under_the_same_numbers_are_not_compared(world, tasks, theirs, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    lines = (folder / "cities.json").read_text().replace("Land", "Country").splitlines()
    (folder / "cities.json").write_text("\n".join(lines))
    dense = Answers(DENSE, ask(world, folder, names=("capitals",)))
    other = Answers("other", None, (take(world, theirs),))
    assert incomparable(dense, other, "capitals", "acc") == f"{ITEMS} questions differ"
    assert compare_answers(dense, other, "capitals") is None


def test_what_was_measured_here_counts_before_what_was_imported(world, tasks, theirs):
    here, imported = ask(world, tasks, names=("capitals",)), take(world, theirs)
    answers = Answers.of(DENSE, {"tasks": here, "imported": imported})
    assert answers.sources["capitals"] == here and answers.sources["towns"] == imported
    assert answers.rows["towns", "acc"]["imported"] and not answers.rows["capitals", "acc"]["imported"]
    assert len(answers.values["capitals", "acc"]) == len(answers.values["towns", "acc"]) == ITEMS
    assert answers.notes == [
        f"capitals of dense in {imported.name} (imported) does not count: it was measured here, or imported later"
    ]
    both = scores_by_task({DENSE: here}, {DENSE: {"imported": imported}})[DENSE]
    assert both["capitals acc"] == here.statistics["scores"]["capitals acc"] and "towns acc" in both
    assert Answers.of(DENSE, {"text": here}) is None


def test_imports_that_were_deleted_are_left_out(home, world):
    imports = {world.models[DENSE].digest: ["0" * 64]}
    assert imported_for(home.store, imports, world.models[DENSE]) == {}
    assert imported_for(home.store, {}, Artifact("checkpoint", "1" * 64, "")) == {}
    assert isinstance(Candidate(world.models[DENSE]).evaluations, dict)
