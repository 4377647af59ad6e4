"""The models of pre-training born from slices of a dense checkpoint: those that are made in memory, bit by bit."""

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import save_file

from eclectus.models.checkpoints.door import open_model
from eclectus.models.checkpoints.proof import prove_start
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.pretraining import stages
from eclectus.models.pretraining.baselines import ExpertChoiceForCausalLM, top_k_from_dense
from eclectus.models.pretraining.checkpoint import stored_moments
from eclectus.models.pretraining.document_pools import document_pools_from_dense
from eclectus.models.sharding.blueprint import stock_blueprint
from eclectus.models.sharding.slices import whole_of
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.parallel import local, shard
from eclectus.models.training.process import Process
from tests.support.processes import run_group
from tests.support.tiny_training import LENGTH, plan, tiny_dense, write_instances

SEGMENT = LENGTH // 3
STAGES = {
    "lory": lambda *dense: stages.lory_from_dense(*dense, (), 4, seed=5, segment_length=SEGMENT),
    "lory of routing dense": lambda *dense: stages.lory_from_dense(*dense, (), 3, routing="dense"),
    "expert_choice": lambda *dense: stages.expert_choice_from_dense(*dense, (), 4, 5),
    "top_k": lambda *dense: stages.top_k_of_dense(*dense, (), 3, 2, 5),
    "document_pools": lambda *dense: stages.document_pools_of_dense(*dense, (), 2, 2, 5),
}
IN_MEMORY = {
    "lory": lambda dense: LoryForCausalLM.from_dense(dense, 4, SEGMENT, seed=5),
    "lory of routing dense": lambda dense: LoryForCausalLM.from_dense(dense, 3, routing="dense"),
    "expert_choice": lambda dense: ExpertChoiceForCausalLM.from_dense(dense, 4, seed=5),
    "top_k": lambda dense: top_k_from_dense(dense, 3, 2, seed=5),
    "document_pools": lambda dense: document_pools_from_dense(dense, 2, 2, seed=5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_instances(folder / "instances")
    dense = tiny_dense().eval()
    dense.save_pretrained(folder / "dense")
    generator = torch.Generator().manual_seed(1)
    moments = {}
    for name, parameter in dense.named_parameters():
        moments[f"{name}.exp_avg"] = torch.rand(parameter.shape, generator=generator)
        moments[f"{name}.exp_avg_sq"] = torch.rand(parameter.shape, generator=generator)
        moments[f"{name}.step"] = torch.tensor(7.0)
    save_file(moments, folder / "moments.safetensors")
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_a_model_read_in_slices_is_that_made_in_memory(folder, name):
    with stock_blueprint(folder / "dense") as dense:
        model = STAGES[name](dense, {}).blueprint.make()
    expected = IN_MEMORY[name](open_model(folder / "dense"))
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs) and type(model) is type(expected) and model.training == expected.training
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    ours, theirs = (each.config.to_dict() for each in (model, expected))
    differs = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differs <= {"_name_or_path", "dtype"}, differs


def test_moments_are_scaled_and_copied_as_the_weights_are(folder):
    with ExitStack() as files:
        moments = stored_moments(str(folder), files)
        assert not stored_moments(None, files)
        with stock_blueprint(folder / "dense") as dense:
            carried = STAGES["lory"](dense, moments).moments
        prefix = "model.layers.1.mlp."
        for what, scale in (("exp_avg", 1 / 4), ("exp_avg_sq", 1 / 16)):
            gate, up, down = (
                whole_of(moments[f"{prefix}{part}_proj.weight.{what}"]) for part in ("gate", "up", "down")
            )
            found = whole_of(carried[f"{prefix}experts.{what}"])
            assert torch.equal(found, (torch.cat([gate, up, down.t()]) * scale).expand(4, -1, -1))
            name = f"model.norm.weight.{what}"
            assert torch.equal(whole_of(carried[name]), whole_of(moments[name]))
        assert whole_of(carried[f"{prefix}experts.step"]).item() == 7.0
        assert not any("router" in name for name in carried)


def compare_births(folder):
    process, data = Process.current(), Instances(folder / "instances")
    for name, make in STAGES.items():
        with ExitStack() as files:
            dense = files.enter_context(stock_blueprint(folder / "dense"))
            made = make(dense, stored_moments(str(folder), files))
            born, late = made.blueprint.make(process, sharded=True), made.blueprint.make()
            if name != "expert_choice":
                proof = prove_start(born, folder / "dense", name, process=process)
                assert (proof is not None) == process.is_main
            shard(late, process)
            settings = plan(start=7, stop=9, sharded=True, checkpoint_every=99)
            ends = []
            for model, moments in (
                (born, made.moments),
                (late, {key: whole_of(value) for key, value in made.moments.items()}),
            ):
                work = folder / f"{name} work"
                after = train(model, data, made.objective, settings, process, work, lambda *_, **__: None, moments)
                ends.append({**dict(model.named_parameters()), **after})
        assert ends[0].keys() == ends[1].keys()
        for key, value in ends[0].items():
            assert torch.equal(local(value.detach()), local(ends[1][key].detach())), f"{name}: {key}"


def test_a_stage_born_sharded_trains_to_the_bits_of_one_that_was_whole(folder):
    run_group(2, compare_births, folder)
