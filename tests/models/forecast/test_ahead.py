"""A forecast in a training: reported before its first step and at its end, and no bit of the training changes."""

import os

import pytest
import torch

from eclectus.models.forecast import ahead as module
from eclectus.models.forecast.ahead import look_ahead
from eclectus.models.forecast.fit import Room, check_fit
from eclectus.models.forecast.job import Job
from eclectus.models.losses import objectives
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from eclectus.models.training.resume import TrainingFailed
from tests.support.processes import run_group
from tests.support.tiny_training import LENGTH, plan, tiny_dense, write_instances

LARGE = 10**15


def trained(tmp_path, wanted, flops=LARGE, **changed):
    """(final weights, what was reported)."""
    data, said = Instances(write_instances(tmp_path / "data")), []

    def report(kind, **values):
        said.append((kind, values))

    blueprint = Blueprint.of(tiny_dense())
    objective, chosen = objectives.next_token(data.domains), plan(**changed)
    job = Job.on(data, blueprint.model, objective, chosen, Process())
    found = look_ahead(job, Process(), report, tmp_path / f"work {wanted}", flops, blueprint.values, wanted)
    model = blueprint.make()
    with found:
        train(model, data, objective, chosen, Process(), tmp_path / f"work {wanted}", found.report)
    return {name: each.detach().clone() for name, each in model.named_parameters()}, said


def test_a_forecast_changes_no_bit_of_a_training(tmp_path):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with_forecast, said = trained(tmp_path, "auto")
    # tiny_dense sets the seed of its own weights.
    without, silent = trained(tmp_path, "never")
    assert with_forecast.keys() == without.keys()
    assert all(torch.equal(with_forecast[name], without[name]) for name in without)
    assert [kind for kind, _ in said if kind in ("forecast", "came_true")] == ["forecast", "came_true"]
    assert not any(kind in ("forecast", "came_true") for kind, _ in silent)
    assert state.shape == torch.get_rng_state().shape


def test_the_probe_leaves_the_global_random_state(tmp_path):
    data = Instances(write_instances(tmp_path / "data"))
    job = Job.on(data, Blueprint.of(tiny_dense()).model, objectives.next_token(), plan(), Process())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    look_ahead(job, Process(), lambda *_, **__: None, tmp_path, LARGE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_forecast_comes_first_and_names_what_holds_memory(tmp_path):
    _, said = trained(tmp_path, "always", flops=1)
    kinds = [kind for kind, _ in said]
    assert kinds.index("forecast") < kinds.index("progress") < kinds.index("came_true") == len(kinds) - 1
    values, actual = said[kinds.index("forecast")][1]["values"], said[-1][1]
    assert values["memory"] == sum(values["memory_by"].values())
    assert values["steps"] == actual["steps"] == 12 and values["seconds"] > 0 and actual["seconds"] > 0
    weights = 4 * sum(each.numel() for each in tiny_dense().parameters())
    held = values["memory_by"]
    assert held["gradients"] == weights and held["moments"] == 2 * weights
    assert weights <= held["parameters"] <= weights + 1000, "and buffers"
    assert actual["memory"] == pytest.approx(values["memory"], rel=0.15), "mostly PyTorch, both times"


def test_a_short_training_is_not_forecast_by_default(tmp_path):
    assert not any(kind == "forecast" for kind, _ in trained(tmp_path, "auto", flops=1)[1])


def test_a_training_that_does_not_fit_ends_before_its_model_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "room_here", lambda _: Room(10_000, "this machine"))
    with pytest.raises(TrainingFailed, match=r"does not fit in memory: a process takes about .* this machine has 0 MB"):
        trained(tmp_path, "always")


def test_the_cheapest_setting_that_makes_it_fit_is_named():
    model = Blueprint.of(tiny_dense()).model
    job = Job(model, objectives.next_token(), plan(batch=8, micro_batch=4), 2, 24)

    def fits(**room):
        """The advice where a process needs 10 bytes for an instance of a micro-batch and shares 100."""

        def needs(changed):
            kept = changed.micro_batch * (5 if changed.plan.recomputed else 10)
            return kept + (100 // changed.world if changed.sharded else 100)

        return check_fit(job, needs, Room(room["bytes"], "it"))

    assert fits(bytes=140) is None
    assert "; micro_batch 2 would fit" in fits(bytes=125)
    assert "; training_recompute true with micro_batch 1 would fit" in fits(bytes=106)
    assert "; training_sharded true would fit" in fits(bytes=95)
    assert "; training_sharded true with training_workers 8, each with that memory would fit" in fits(bytes=20)
    assert "no number of workers makes it fit" in fits(bytes=1)


def test_seconds_of_a_probe_are_those_of_the_slowest_process():
    class Two(Process):
        def gather(self, value):
            return [value, 2.0]

    from eclectus.models.forecast.probe import _slowest

    assert _slowest(1.0, Two()) == 2.0 and _slowest(3.0, Two()) == 3.0


def test_two_forked_processes_measure_together():
    from eclectus.models.forecast.fork import measure_here

    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    job = Job(Blueprint.of(tiny_dense()).model, objectives.next_token(), plan(), 2, 24)
    measured, program = measure_here(job, 1)
    assert measured.exchange > 0 and measured.micro > 0 and program > 50_000_000


def measure_sharded(layers):
    """In each of two processes: every model that the probe measures is sharded over both, and only then."""
    from eclectus.models.forecast import probe
    from eclectus.models.training.parallel import is_sharded

    config = tiny_dense().config
    config.num_hidden_layers = layers
    process, prepare, seen = Process.current(), probe.prepare, []

    def watched(model, plan, process):
        prepare(model, plan, process)
        seen.append(is_sharded(model))

    # By its cuts.
    probe.prepare, probe.SHORT = watched, -1.0
    for sharded in (True, False):
        job = Job(
            Blueprint.of_config(config).model, objectives.next_token(), plan(sharded=sharded), process.world, LENGTH
        )
        measured = probe.measure(job, process)
        assert len(seen) == 3 and all(each == sharded for each in seen)
        assert measured.cpu.trained == sum(each.numel() for each in job.model.parameters())
        # What sharded processes exchange is part of a micro-batch.
        assert (probe.step_seconds(job, measured, 1000)["exchange"] == 0) == sharded
        seen.clear()


def test_a_sharded_training_is_measured_sharded():
    run_group(2, measure_sharded, 9)


def test_a_large_model_is_measured_by_a_few_of_its_layers(monkeypatch):
    from eclectus.models.forecast import probe

    config = tiny_dense().config
    config.num_hidden_layers = 9
    job = Job(Blueprint.of_config(config).model, objectives.next_token(), plan(), 1, 24)
    monkeypatch.setattr(probe, "SHORT", -1.0)
    by_cuts = probe.measure(job, Process())
    monkeypatch.setattr(probe, "SHORT", 99.0)
    whole = probe.measure(job, Process())
    assert (by_cuts.layers, whole.layers) == (3, 9)
    # Times of tiny layers, on a machine that does other things too: the order must be right.
    assert 0.2 < by_cuts.cpu.micro / whole.cpu.micro < 5
