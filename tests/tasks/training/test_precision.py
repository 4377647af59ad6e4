"""`training_precision: auto` is decided before the key is made, by the model's size and one measurement of the CPU."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from eclectus.storage.artifact import Artifact
from eclectus.tasks.settings import Settings
from eclectus.tasks.training import precision, run_training
from eclectus.tasks.training.extend_settings import ExtendStageSettings
from eclectus.tasks.training.precision import LARGE, Probe, dense_parameters, faster_precision
from eclectus.tasks.training.pretrain_settings import PretrainStageSettings

LARGE_SHAPE = dict(model_width=512, model_layers=8, model_feed_forward=1536, model_heads=8, model_key_value_heads=8)


@pytest.fixture
def measured(monkeypatch):
    """What the probe would find; raises if it is asked and nothing was set."""
    found = SimpleNamespace(gain=None, cuda=False)

    def probe():
        assert found.gain is not None, "nothing should be measured"
        return Probe(found.gain, "made up", found.cuda)

    monkeypatch.setattr(run_training, "probe", probe)
    return found


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps({"vocabulary": 4096}))
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    return {name: Artifact("any", "0" * 12, str(tmp_path)) for name in ("instances", "checkpoint")}


def pretraining(**changes):
    return PretrainStageSettings(pretrain_stage="dense", **changes)


def extension(**changes):
    return ExtendStageSettings(extend_stage="post_pretrain", original_languages=["en"], **changes)


def test_a_small_model_is_float32_everywhere_and_its_key_is_as_before(measured, inputs):
    settings = pretraining().decided(inputs)
    assert settings.training_precision == "auto"
    assert "training_precision" not in settings.key_values()


@pytest.mark.parametrize(
    ("gain", "chosen"), [(2.2, "bfloat16"), (1.1, "float32"), (0.003, "float32"), (0.0, "float32")]
)
def test_a_large_model_trains_in_what_is_faster_here_and_the_key_says_which(measured, inputs, gain, chosen):
    measured.gain = gain
    for settings in (pretraining(**LARGE_SHAPE), extension()):
        decided = settings.decided(inputs)
        assert decided.training_precision == decided.key_values()["training_precision"] == chosen
        assert decided.plan(start=0, stop=1, total=1, batch=1, learning_rate=1.0, warmup=0).precision == chosen


def test_a_chosen_precision_and_gpus_need_no_measurement(measured, inputs):
    for name in ("float32", "bfloat16"):
        assert extension(training_precision=name).decided(inputs).key_values()["training_precision"] == name
    assert extension(training_gpus=True).decided(inputs).training_precision == "auto"


def test_without_workers_a_gpu_of_this_machine_trains_in_its_own_precision(measured, inputs):
    measured.gain, measured.cuda = 0.003, True
    assert extension(training_workers=0).decided(inputs).training_precision == "auto"
    assert extension(training_workers=2).decided(inputs).training_precision == "float32"


def test_all_models_of_a_pre_training_have_one_precision(measured, inputs):
    measured.gain = 2.0
    chosen = {
        PretrainStageSettings(pretrain_stage=stage, **LARGE_SHAPE).decided(inputs).training_precision
        for stage in ("warmup", "dense", "lory", "top_k", "dense_equal_flops")
    }
    assert chosen == {"bfloat16"}
    assert {pretraining(model_preset=name).decided(inputs).training_precision for name in ("30m", "1.5b")} == chosen
    assert pretraining(model_preset="laptop").decided(inputs).training_precision == "auto"


def test_a_checkpoint_that_is_not_made_yet_is_not_measured_for(measured, tmp_path):
    for path in (str(tmp_path / "missing"), "\0planned:train"):
        assert extension().decided({"checkpoint": Artifact("checkpoint", "0" * 12, path)}).training_precision == "auto"


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_is_that_of_the_dense_model_also_where_it_has_experts(tied):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=100)
    shape |= dict(num_key_value_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert dense_parameters(model.config.to_dict()) == matrices
    mixture = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4))
    assert dense_parameters(mixture.config.to_dict()) == matrices
    assert dense_parameters({}) == dense_parameters({"hidden_size": "wide"}) == 0


@pytest.mark.parametrize(
    "answer", [OSError("no process"), subprocess.CalledProcessError(-4, "probe"), "no json", "{}", "[1]"]
)
def test_a_cpu_on_which_the_probe_fails_trains_in_float32_and_says_so(monkeypatch, answer):
    def run(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    found = precision._measured()
    assert faster_precision(found) == "float32"
    assert "cannot be measured" in found.words


def test_one_measurement_serves_later_runs(monkeypatch, tmp_path):
    answers = [Probe(2.5, "fast"), Probe(0.1, "never asked")]
    monkeypatch.setattr(precision, "_measured", lambda: answers.pop(0))
    monkeypatch.setattr(precision, "_file", lambda: tmp_path / "probe.json")
    assert precision.known_probe() is None
    for _ in range(2):
        precision._probe_in.cache_clear()
        assert precision.probe() == precision.known_probe() == Probe(2.5, "fast")
    precision._probe_in.cache_clear()
    (tmp_path / "probe.json").write_text("torn")
    assert precision.probe() == Probe(0.1, "never asked")
    precision._probe_in.cache_clear()


def test_other_settings_decide_nothing():
    class Plain(Settings):
        size: int = 3

    assert Plain().decided({}) == Plain()
    assert LARGE == 30_000_000
