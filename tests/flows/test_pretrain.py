"""Pre-training as a flow: every baseline next to Lory and its twin, scored alike, and a dense checkpoint as start."""

from types import SimpleNamespace

import pytest

import eclectus.flows.pretrain
from eclectus.flows.parameters import PretrainParameters
from eclectus.flows.run import open_run
from eclectus.storage.home import Home
from eclectus.tasks.corpus import CorpusSettings, write_corpus
from eclectus.tasks.evaluation.evaluate import EvaluateSettings, evaluate

pytestmark = pytest.mark.slow
SMALL = {
    "tokenizer_vocabulary": 512,
    "embedding_steps": 5,
    "instance_tokens": 64,
    "lory_segment": 16,
    "lory_experts": 4,
    "model_width": 32,
    "model_layers": 2,
    "model_heads": 2,
    "model_key_value_heads": 2,
    "model_feed_forward": 60,
    "pretrain_steps": 6,
    "pretrain_warmup_steps": 1,
    "dense_warmup": 0.34,
    "original_languages": ["en"],
    "expanded_languages": [],
    "training_workers": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("pretrain")
    write_corpus(
        root / "corpus", CorpusSettings(corpus_languages=("en",), corpus_english_bytes=40_000, corpus_expanded_bytes=1)
    )
    return SimpleNamespace(corpus=root / "corpus", home=Home.open(root / "home"))


def pretrained(world, **changes):
    """(the flow's result, step states by label, bits per byte by model)"""
    parameters = PretrainParameters(**{**SMALL, "sources": [str(world.corpus)], **changes})
    with open_run("pretrain", parameters, world.home) as run:
        made = eclectus.flows.pretrain.pretrain.whole(parameters)
        scores = {}
        for name, checkpoint in {"dense": made.dense, "lory": made.lory, **made.baselines}.items():
            scores[name] = evaluate(
                label=f"evaluate {name}",
                documents=made.curated.documents,
                tokenizer=made.curated.tokenizer,
                checkpoint=checkpoint,
                settings=EvaluateSettings(evaluation_context=16, training_workers=0, evaluation_sample_tokens=4),
            ).statistics["bits_per_byte"]["language"]["en"]
        return made, dict(run.states), scores


def test_one_setting_trains_every_baseline_next_to_lory_and_all_are_scored(world, monkeypatch):
    asked = ["prefix", "expert_choice", "top_k", "document_pools", "dense_equal_flops", "random"]
    made, states, scores = pretrained(world, pretrain_baselines=asked)
    assert scores.keys() == {"dense", "lory", *asked[:-1], "dense random", "lory random"}
    assert all(0 < each < 9 for each in scores.values())
    assert len({each.digest for each in (made.dense, made.lory, *made.baselines.values())}) == 9
    assert len({each.statistics["tokens"] for each in (made.dense, made.lory, *made.baselines.values())}) == 1
    assert states["train dense warm-up"] == "completed"

    fewer, states, _ = pretrained(world)
    assert (fewer.dense, fewer.lory, fewer.baselines) == (made.dense, made.lory, {})
    assert {states[label] for label in ("train dense", "train lory", "group", "pack original")} == {"reused"}


def test_a_dense_checkpoint_brings_its_tokenizer_and_takes_the_warm_ups_place(world, monkeypatch):
    first, _, before = pretrained(world)
    made, states, after = pretrained(world, dense_start=first.dense.path, pretrain_baselines=["prefix"])
    assert states["fetch dense start"] == "completed" and "train dense warm-up" not in states
    assert after.keys() == {"dense", "lory", "prefix"}
    assert all(score < before["dense"] for score in after.values()), "they go on from a trained model"
    assert made.lory.statistics["steps"] == SMALL["pretrain_steps"]
