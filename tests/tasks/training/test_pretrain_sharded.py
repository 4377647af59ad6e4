"""Every stage of pre-training over two processes in bfloat16: sharded it proves its start and ends as with copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eclectus.models.training.process import Process
from eclectus.tasks.training.pretrain import train_stage
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings
from tests.support.processes import run_group
from tests.support.small_world import make_world
from tests.support.tiny_training import stored_weights, write_instances

pytestmark = pytest.mark.slow
STAGES = ["warmup", "dense", "lory", "expert_choice", "top_k", "document_pools", "dense_equal_flops"]
SETTINGS = {
    "model_width": 32, "model_layers": 2, "model_heads": 2, "model_key_value_heads": 2, "model_feed_forward": 48,
    "lory_experts": 4, "lory_segment": 8, "pretrain_steps": 8, "pretrain_batch": 4, "pretrain_warmup_steps": 2,
    "dense_warmup": 0.25, "lory_rewarm_steps": 2, "training_workers": 2, "training_precision": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_instances(folder / "instances")
    run_group(2, train_all, str(folder), str(make_world(folder / "world").tokenizer.path))
    return folder


def train_all(folder, tokenizer):
    """The part of each of two processes."""
    process, folder, statistics = Process.current(), Path(folder), {}
    for sharded in (True, False):
        for stage in STAGES:
            settings = PretrainStageSettings(pretrain_stage=stage, training_sharded=sharded, **SETTINGS)
            out, work = folder / f"{stage} {sharded}", folder / f"work {stage} {sharded}"
            if process.is_main:
                out.mkdir(parents=True)
                work.mkdir(parents=True)
            process.barrier()
            start = None if settings.from_scratch else str(folder / f"warmup {sharded}")
            about = train_stage(
                process, lambda kind, **values: None, str(folder / "instances"), tokenizer,
                settings.model_dump(), start, start, str(work), str(out),
            )  # fmt: skip
            statistics[out.name] = about
    if process.is_main:
        (folder / "statistics.json").write_text(json.dumps(statistics))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_ends_sharded_as_it_does_with_copies(folder, stage):
    both, copied = stored_weights(folder / f"{stage} True"), stored_weights(folder / f"{stage} False")
    assert both.keys() == copied.keys()
    for name, value in both.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, copied[name], rtol=2e-2, atol=2e-3, msg=name)


def test_a_stage_proves_its_start_in_float32(folder):
    statistics = json.loads((folder / "statistics.json").read_text())
    for stage in ("dense", "lory", "top_k", "document_pools"):
        sharded, copied = (statistics[f"{stage} {how}"]["step_zero"] for how in (True, False))
        assert sharded.keys() == copied.keys() and sharded, stage
        assert sharded["max_abs_delta"] < 1e-4, "less than bfloat16 could do"
