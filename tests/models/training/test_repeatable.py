"""A base whose configuration asks for dropout trains to the same bits, repeated or resumed, and the user is told."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eclectus.models.extension.methods import open_method, save_method
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import lory, next_token, post_pretrain
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from eclectus.models.training.repeatable import switch_off_randomness
from tests.support.dense_bases import write_base
from tests.support.tiny_training import SHAPE, plan, write_instances


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense base with dropout, its mixture, and instances."""
    folder = tmp_path_factory.mktemp("dropout")
    write_instances(folder / "instances")
    write_base(folder / "dense", "llama")
    config = json.loads((folder / "dense/config.json").read_text())
    (folder / "dense/config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    upcycle(folder / "dense", folder / "moe", experts=3)
    return folder


def opened(folder, method):
    """(model, objective) as the steps make them; `lory` and `dense` start from a dense checkpoint of the user's."""
    if method in ("lory", "dense"):
        dense = LlamaForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
        return (dense, next_token()) if method == "dense" else (LoryForCausalLM.from_dense(dense, 3, 8), lory())
    if method in ("moe_lpr", "moe_all"):
        return open_method(method, folder / "moe"), post_pretrain(0.1, 2, "paper")
    return open_method(method, folder / "dense", lora_rank=2), next_token()


@pytest.mark.parametrize("method", ["dense", "lory", "full", "lora", "llama_pro", "moe_lpr", "moe_all"])
def test_training_twice_and_resumed_training_end_with_the_same_bits(folder, tmp_path, method, caplog):
    warned = []

    def trained(work, seed, killed=False):
        # Whatever draws from the global generator draws other numbers each time.
        torch.manual_seed(seed)
        model, objective = opened(folder, method)
        assert "0.1" in str(
            [module.config.attention_dropout for module in model.modules() if hasattr(module, "config")]
        )

        def report(kind, **values):
            warned.extend([values["text"]] if kind == "warning" else [])
            if killed and kind == "progress" and values["done"] == 3:
                raise Killed

        settings = plan(stop=4, micro_batch=4, checkpoint_every=2)
        train(model, Instances(folder / "instances"), objective, settings, Process(), tmp_path / work, report)
        return model

    first, second = trained("one", 1), trained("two", 2)
    with pytest.raises(Killed):
        trained("three", 3, killed=True)
    resumed = trained("three", 4)
    for other in (second, resumed):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert len(warned) == 4 and "attention_dropout 0.1" in warned[0] and warned[0] in caplog.text
    if method not in ("dense", "lory"):
        save_method(first, tmp_path / "out", folder / "dense")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.attention_dropout == 0.0


def test_dropout_modules_and_router_noise_are_switched_off_by_name():
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=3, router_jitter_noise=0.2)
    model = MixtralForCausalLM(config)
    model.model.layers[0].extra_dropout = nn.Dropout(0.3)
    assert switch_off_randomness(model) == {"router_jitter_noise": 0.2, "extra_dropout": 0.3}
    assert switch_off_randomness(model) == {}
    tokens = torch.arange(20)[None]
    first, second = (model.train()(input_ids=tokens).logits for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(model.model.layers[0].extra_dropout(torch.ones(9)), torch.ones(9))


def test_a_model_without_randomness_is_left_as_it_is_without_a_word(tmp_path, caplog):
    kinds = []
    write_instances(tmp_path / "instances")
    write_base(tmp_path / "dense", "qwen2")
    model = open_method("full", tmp_path / "dense")
    train(
        model,
        Instances(tmp_path / "instances"),
        next_token(),
        plan(stop=1),
        Process(),
        tmp_path / "work",
        lambda kind, **_: kinds.append(kind),
    )
    assert set(kinds) == {"metrics", "progress"} and not caplog.records
