"""Baselines: equal to the base before training, only their own part trains, their checkpoints load as stock."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eclectus.models.extension.methods import (
    RECIPES,
    MixedInstances,
    add_lora,
    expand_blocks,
    open_method,
    save_method,
    untrained_digest,
)
from eclectus.models.losses.objectives import next_token, next_token_loss, one_stage, post_pretrain
from eclectus.models.losses.router_losses import balance_loss, language_prior_loss
from eclectus.models.mixture.experts import frozen_digest
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.loop import Plan, train
from eclectus.models.training.process import Process
from tests.support.dense_bases import logits, tokens, write_base

FOUR = ("llama tied", "mistral", "qwen2", "qwen3 tied")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp("bases")
            base = write_base(root / "base", name)
            upcycle(base, root / "moe", experts=4)
            made[name] = base, root / "moe"
        return made[name]

    return make


def write_instances(place, count, languages, length=16, seed=0):
    place.mkdir()
    random = np.random.default_rng(seed)
    random.integers(0, 96, (count, length), dtype=np.uint16).tofile(place / "tokens.bin")
    half = length // 2
    spans = [(i * half, half, i, i % len(languages), 0) for i in range(2 * count)]
    np.save(place / "spans.npy", np.array(spans, np.int64))
    about = {"length": length, "vocabulary": 96, "end_of_document": 1, "languages": languages, "domains": ["web"]}
    stored = {"file": "tokens.bin", "dtype": "uint16", "offset": 0, "rows": count, "columns": length}
    about["matrices"] = {"input_ids": stored}
    (place / "instances.json").write_text(json.dumps(about))
    return Instances(place)


@pytest.mark.parametrize("name", FOUR)
def test_block_expansion_computes_the_same_before_training(bases, name):
    base = AutoModelForCausalLM.from_pretrained(bases(name)[0], dtype=torch.float32)
    before = base(tokens()).logits
    deeper = expand_blocks(base, 1)
    assert len(deeper.model.layers) == deeper.config.num_hidden_layers == 3
    torch.testing.assert_close(deeper(tokens()).logits, before, rtol=0, atol=1e-6)
    assert all("layers.2." in name for name, parameter in deeper.named_parameters() if parameter.requires_grad)


def test_new_blocks_are_spaced_evenly():
    from eclectus.models.extension.methods import _block_origins

    assert [new for _, new in _block_origins(4, 2)] == [False, False, True, False, False, True]
    assert [origin for origin, new in _block_origins(6, 4) if new] == [0, 2, 3, 5]
    assert len(_block_origins(30, 15)) == 45


@pytest.mark.parametrize("count", [0, 3])
def test_more_new_blocks_than_blocks_are_refused(bases, count):
    with pytest.raises(ValueError, match="choose 1 to 2"):
        expand_blocks(AutoModelForCausalLM.from_pretrained(bases("qwen2")[0]), count)


@pytest.mark.parametrize("method", [m for m in RECIPES if m != "one_stage"])
def test_each_method_trains_its_part_alone_and_writes_a_stock_checkpoint(bases, method, tmp_path):
    dense, moe = bases("llama tied")
    start = moe if RECIPES[method].start == "upcycled" else dense
    model = open_method(method, start, lora_rank=2)
    torch.testing.assert_close(model(input_ids=tokens()).logits, logits(dense, tokens()), rtol=0, atol=1e-5)
    still = untrained_digest(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = write_instances(tmp_path / "data", 8, ["el", "tr"])
    plan = Plan(0, 3, 3, batch=4, micro_batch=2, learning_rate=1e-2, warmup=0, weight_decay=0.5)
    objective = post_pretrain(0.01, 2, "paper") if start == moe else next_token()
    train(model, data, objective, plan, Process(), tmp_path / "work", lambda *_, **__: None)
    assert untrained_digest(model) == still
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    save_method(model, tmp_path / "out", dense)
    trained = model(input_ids=tokens()).logits
    torch.testing.assert_close(logits(tmp_path / "out", tokens()), trained, rtol=0, atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_all_trained_changes_expert_0_and_the_stages_do_not(bases):
    moe = bases("mistral")[1]
    trained = {name for name, p in open_method("moe_all", moe).named_parameters() if p.requires_grad}
    assert any("frozen_gate_up" in name for name in trained) and any("q_proj" in name for name in trained)
    ours = open_method("moe_lpr", moe)
    assert not any("frozen" in name or "q_proj" in name for name, p in ours.named_parameters() if p.requires_grad)
    assert frozen_digest(ours)


def test_adapters_start_at_zero_and_are_reproducible(bases):
    dense = bases("qwen2")[0]
    first, second = (add_lora(AutoModelForCausalLM.from_pretrained(dense), 2, seed=5) for _ in range(2))
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in first.named_parameters() if p.requires_grad} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_one_stage_is_the_sum_of_all_losses(bases, tmp_path):
    model = open_method("one_stage", bases("llama tied")[1])
    batch = write_instances(tmp_path / "data", 4, ["en", "tr"]).batch(np.arange(4))
    total, parts = one_stage(0.5, 2, "paper", 2.0, "paper", [0])(model, batch)
    output = model(input_ids=batch.tokens, output_router_logits=True)
    expected = (
        next_token_loss(output.logits, batch.labels)
        + 0.5 * balance_loss(output.router_logits, 2)
        + 2.0 * language_prior_loss(output.router_logits, batch.languages == 0)
    )
    torch.testing.assert_close(total, expected)
    logged = {"router_entropy", "expert_load@0", "expert_load@1"}
    assert set(parts) - logged == {"next_token_loss", "balance_loss", "lpr_loss"}


def test_mixed_instances_keep_share_order_and_labels(tmp_path):
    first, second = (
        write_instances(tmp_path / "a", 10, ["el", "tr"]),
        write_instances(tmp_path / "b", 3, ["en", "tr"], seed=1),
    )
    mixed = MixedInstances(first, second, 0.25)
    rows = [mixed.rows_of_step(step, 6, 0) for step in range(20)]
    assert sum((row >= 10).sum() for row in rows) == 30
    assert all(len(row) == 6 for row in rows)
    # No row comes again before its set was read.
    assert len(set(np.concatenate(rows[:2]).tolist())) == 12
    assert [row.tolist() for row in rows] == [mixed.rows_of_step(step, 6, 0).tolist() for step in range(20)]
    batch = mixed.batch(np.array([11, 0, 12]))
    assert torch.equal(batch.tokens[1], first.batch(np.array([0])).tokens[0])
    assert torch.equal(batch.tokens[2], second.batch(np.array([2])).tokens[0])
    names = [[mixed.languages[i] for i in row.unique().tolist()] for row in batch.languages]
    assert names == [["tr", "en"], ["el", "tr"], ["tr", "en"]]


def test_sets_of_another_tokenizer_and_invalid_shares_are_refused(tmp_path):
    first = write_instances(tmp_path / "a", 4, ["el"])
    with pytest.raises(ValueError, match="differ in length"):
        MixedInstances(first, write_instances(tmp_path / "b", 4, ["en"], length=32), 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        MixedInstances(first, first, 1.0)


def test_an_unknown_method_names_those_there_are(bases):
    with pytest.raises(ValueError, match="'loramoe': choose moe_lpr, full, lora"):
        open_method("loramoe", bases("mistral")[0])


def test_padding_does_not_count_in_the_balance(bases):
    model = open_method("moe_lpr", bases("mistral")[1])
    ids = tokens(16, 2)
    labels = ids.clone()
    labels[1, 4:] = -100
    padded = Batch(ids, labels, *(torch.zeros_like(ids).masked_fill(labels == -100, -1) for _ in range(3)))
    _, logged = post_pretrain(0.5, 2, "paper")(model, padded)
    output = model(input_ids=ids, output_router_logits=True)
    real = [logits[(labels != -100).flatten()] for logits in output.router_logits]
    torch.testing.assert_close(logged["balance_loss"], balance_loss(real, 2))
