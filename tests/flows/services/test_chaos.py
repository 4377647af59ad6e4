"""Chaos: the plan is seeded, and a sharded job that is killed four ways ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eclectus.flows.services.chaos import VICTIMS, draw_plan
from eclectus.models.training.process import Process
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.training.pretrain import train_stage
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings
from tests.support.processes import run_group

# A worker is killed in the middle of the dense stage; then, in the middle of Lory's, the server and the driver, and the
# node when the next driver has trained on. Lory's stage is long enough for a quick machine not to end it before.
SEED = "36847"
ROOT = Path(__file__).parents[3]
LABELS = ["train dense warm-up", "train dense", "train lory"]
SETTINGS = {
    "language_detector": "field", "expanded_languages": [], "embedding_steps": 2, "embedding_dimension": 16,
    "tokenizer_vocabulary": 300, "instance_tokens": 32, "lory_segment": 16, "model_width": 16, "model_layers": 1,
    "model_heads": 2, "model_key_value_heads": 2, "model_feed_forward": 16,
    "lory_experts": 2, "pretrain_steps": 400, "dense_warmup": 0.2,
    "pretrain_warmup_steps": 4, "lory_rewarm_steps": 4, "training_workers": 2, "training_sharded": True,
    "log_every": 2,
}  # fmt: skip


def test_a_plan_is_the_same_for_a_seed_and_kills_every_victim_before_any_twice():
    plan = draw_plan(3, 6, LABELS)
    assert plan == draw_plan(3, 6, LABELS) != draw_plan(4, 6, LABELS)
    assert {kill.victim for kill in plan} == set(VICTIMS) and len(plan) == 6
    assert [LABELS.index(kill.label) for kill in plan] == sorted(LABELS.index(kill.label) for kill in plan)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sharded_job_killed_four_ways_ends_with_the_bits_of_an_undisturbed_one_and_leaves_no_process(tmp_path):
    rows = ({"text": f"Document {n} is about ship {n % 7} on day {n}.", "language": "en"} for n in range(120))
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(json.dumps(SETTINGS))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    # Ray's own niceness (15) would leave its workers almost no CPU while other tests run.
    environment["RAY_worker_niceness"] = "0"
    done = subprocess.run(
        [sys.executable, "-m", "eclectus", "--home", tmp_path / "home", "chaos", "--flow", "pretrain", "--seed", SEED,
         "--config", tmp_path / "tiny.yaml", "--sources", tmp_path / "documents.jsonl"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "same bits after 4 kills" in done.stdout
    for victim in VICTIMS:
        label = "train dense" if victim == "worker" else "train lory"
        assert f"killed {victim} in '{label}'" in done.stdout, done.stdout
    (work,) = (tmp_path / "home" / "chaos").iterdir()
    undisturbed, disturbed = Home.open(work / "undisturbed"), Home.open(work / "disturbed")
    ended = query("select state, count(*) from runs group by all", disturbed)[1]
    # The run whose driver was killed, the one whose node was, and the last; the other two victims end no run.
    assert dict(ended)["completed"] == 1 and sum(count for _, count in ended) >= 3
    last = query("select label, state from steps where run = (select max(run) from runs) order by started", disturbed)[
        1
    ]
    states = dict(last)
    assert [states[label] for label in LABELS] == ["reused", "reused", "completed"], "what was finished is kept"
    assert first_step("train lory", disturbed) > first_step("train lory", undisturbed), "training went on in its middle"

    run_group(2, pretrain_in_a_group, str(undisturbed.root), str(tmp_path / "group"))
    for label, (_, _, checkpoint) in training_steps(undisturbed).items():
        # A sharded checkpoint is a file of each process and their index.
        weights = [path.name for path in (tmp_path / "group" / label).glob("*.safetensors*")]
        assert len([name for name in weights if name.startswith("model")]) == 3
        for name in [*weights, "config.json"]:
            expected = (tmp_path / "group" / label / name).read_bytes()
            assert (Path(checkpoint) / name).read_bytes() == expected, f"{name} of '{label}' differs under torchrun"


def first_step(label, home):
    """The first training step whose loss the last run of a home logged."""
    return query(
        f"select min(at_step) from metrics join steps using (step) where label = '{label}' and metrics.name = 'loss'"
        " and steps.run = (select max(run) from runs)",
        home,
    )[1][0][0]


def training_steps(home):
    """Label to the paths of (instances, tokenizer, checkpoint) of the training steps, in their order."""
    sql = (
        "select label, i.path, t.path, o.path from steps s"
        " join step_inputs si on si.step = s.step and si.kind = 'instances'"
        " join artifacts i on i.artifact = si.artifact"
        " join step_inputs st on st.step = s.step and st.kind = 'tokenizer'"
        " join artifacts t on t.artifact = st.artifact"
        " join step_outputs so on so.step = s.step join artifacts o on o.artifact = so.artifact"
        " where s.name = 'pretrain' order by s.started"
    )
    return {label: paths for label, *paths in query(sql, home)[1]}


def pretrain_in_a_group(home, out):
    """The same training without Ray: what each of two processes does."""
    process, start = Process.current(), None
    for (label, (instances, tokenizer, _)), stage in zip(
        training_steps(Home.open(home)).items(), ("warmup", "dense", "lory"), strict=True
    ):
        settings = {name: value for name, value in SETTINGS.items() if name in PretrainStageSettings.model_fields}
        chosen = PretrainStageSettings(**settings, checkpoint_every=2, pretrain_stage=stage)
        folder, work = Path(out) / label, Path(out) / "work" / label
        if process.is_main:
            folder.mkdir(parents=True)
            work.mkdir(parents=True)
        process.barrier()
        moments = start and str(start)
        train_stage(
            process, lambda kind, **values: None, instances, tokenizer, chosen.model_dump(), start and str(start),
            moments, str(work), str(folder),
        )  # fmt: skip
        start = start or folder
