"""Chaos: the plan is seeded, and a job that is killed four ways ends with the bits of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eclectus.flows.services.chaos import VICTIMS, draw_plan
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query

ROOT = Path(__file__).parents[3]
LABELS = ["train dense warm-up", "train dense", "train lory"]
SETTINGS = {
    "language_detector": "field", "expanded_languages": [], "embedding_steps": 2, "embedding_dimension": 16,
    "tokenizer_vocabulary": 300, "instance_tokens": 32, "lory_segment": 16, "model_width": 16, "model_layers": 1, "model_heads": 2,
    "model_key_value_heads": 2, "model_feed_forward": 16, "lory_experts": 2, "pretrain_steps": 120, "dense_warmup": 0.3,
    "pretrain_warmup_steps": 4, "lory_rewarm_steps": 4, "training_workers": 2, "log_every": 2,
}  # fmt: skip


def test_a_plan_is_the_same_for_a_seed_and_kills_everyone_before_anyone_twice():
    plan = draw_plan(3, 6, LABELS)
    assert plan == draw_plan(3, 6, LABELS) != draw_plan(4, 6, LABELS)
    assert {kill.victim for kill in plan} == set(VICTIMS) and len(plan) == 6
    assert [LABELS.index(kill.label) for kill in plan] == sorted(LABELS.index(kill.label) for kill in plan)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_job_killed_four_ways_ends_with_the_bits_of_one_left_alone_and_leaves_no_process(tmp_path):
    rows = ({"text": f"Document {n} tells of ship {n % 7} on day {n}.", "language": "en"} for n in range(120))
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(json.dumps(SETTINGS))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "eclectus", "--home", tmp_path / "home", "chaos", "--flow", "pretrain", "--seed", "1",
         "--config", tmp_path / "tiny.yaml", "--sources", tmp_path / "documents.jsonl"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "same bits after 4 kills" in done.stdout
    assert all(f"killed {victim} in '" in done.stdout for victim in VICTIMS), done.stdout
    (work,) = (tmp_path / "home" / "chaos").iterdir()
    ended = query("select state, count(*) from runs group by all", Home.open(work / "disturbed"))[1]
    assert dict(ended)["completed"] == 1 and sum(count for _, count in ended) >= 3
