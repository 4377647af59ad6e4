"""The order in which a training read its instances, from what the lineage keeps of its settings."""

import json

import pytest

from eclectus.tasks.rights.exposure import _order
from eclectus.tasks.training.extend_settings import ExtendStageSettings
from eclectus.tasks.training.extend_stage import plan_of as plan_of_stage
from eclectus.tasks.training.pretrain import plan_of
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings

STAGES = ["warmup", "dense", "lory", "expert_choice", "top_k", "document_pools", "dense_equal_flops"]
ODD = {"seed": 5, "dense_warmup": 0.3, "pretrain_steps": 90, "pretrain_batch": 6, "training_workers": 0}
BUDGETS = {
    "post_pretrain_steps": 11, "post_pretrain_batch": 6, "review_steps": 7, "review_batch": 3, "seed": 5,
    "training_workers": 0,
}  # fmt: skip


def kept(settings):
    """As the lineage has them."""
    return json.loads(json.dumps(settings.key_values()))


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("start", ["", "somebody/model"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_order_of_a_pre_training_follows_from_what_its_key_holds(stage, start, reordered):
    settings = PretrainStageSettings(pretrain_stage=stage, dense_start=start, reordered=reordered, **ODD)
    plan = plan_of(settings)
    assert _order("pretrain", kept(settings)) == (plan.start, plan.stop, 6, 5, int(reordered))


@pytest.mark.parametrize("method", ["moe_lpr", "one_stage", "lora", "llama_pro", "full"])
@pytest.mark.parametrize("stage", ["post_pretrain", "review"])
def test_the_order_of_an_extension_follows_from_what_its_key_holds(stage, method):
    settings = ExtendStageSettings(extend_stage=stage, extension_method=method, original_languages=["en"], **BUDGETS)
    plan = plan_of_stage(settings, settings.budget.steps)
    assert _order("extend", kept(settings)) == (0, plan.stop, plan.batch, 5, 0)
    assert (plan.stop, plan.batch) == ((11, 6) if stage == "post_pretrain" else (7, 3))
