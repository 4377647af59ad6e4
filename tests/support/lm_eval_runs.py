"""Runs of the command `lm_eval` on tiny checkpoints, with tasks in local YAML files."""

import functools
import json
import sys
from unittest import mock

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{country}}:"
doc_to_target: "{{label}}"
doc_to_choice: "{{cities}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}]
metadata: {version: 3}
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{country}}:"
doc_to_target: "{{cities[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - name: flexible
    filter: [{function: regex, regex_pattern: "([a-z]+)", fallback: Oslo}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
WHOLE = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{country}} and {{cities[0]}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1}
"""
GROUP = """
group: geo
task: [capitals, towns]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 2}
"""
ITEMS = 7


def write_tasks(folder):
    """YAML files of the group geo (capitals, towns), of generated answers with two filters, and of a whole text."""
    folder.mkdir(exist_ok=True)
    rows = [{"country": f"Land {n}", "cities": [f"Athens {n}", "Oslo"], "label": n % 2} for n in range(ITEMS)]
    (folder / "cities.json").write_text("\n".join(map(json.dumps, rows)))
    for name, rest in {"capitals": CHOICE, "towns": CHOICE, "generated": GENERATED, "whole": WHOLE}.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / "cities.json") + rest)
    (folder / "geo.yaml").write_text(GROUP)
    return folder


def run_lm_eval(model, tasks, out, names="geo,generated,whole", *words):
    """Runs `lm_eval run --log_samples` on a checkpoint's folder in this process; returns the folder of its files.

    The harness's own tasks are not listed, which takes half a minute.
    """
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    few = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks", names]
    command += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "3", "--seed", "0,0,0,0"]
    before = {*out.glob("*")}
    with (
        mock.patch.object(TaskManager, "__init__", few),
        mock.patch("lm_eval.evaluator.get_git_commit_hash", lambda: None),
        mock.patch("lm_eval.loggers.utils.get_commit_from_path", lambda _: None),
        mock.patch.object(sys, "argv", [*command, "--output_path", str(out), "--log_samples", *words]),
    ):
        cli_evaluate()
    (made,) = {*out.glob("*")} - before or before
    return made
