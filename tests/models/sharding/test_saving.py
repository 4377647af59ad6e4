"""Checkpoints of sharded models: each process writes a part, and no process holds the whole; stock, whole or absent."""

import errno
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from eclectus.models.checkpoints import writing
from eclectus.models.checkpoints.proof import checked, logits_of, probes_for
from eclectus.models.checkpoints.tensor_files import CheckpointError, CheckpointReader, TensorSpec, read_config
from eclectus.models.checkpoints.writing import write_tensors
from eclectus.models.extension.lory import extend_lory
from eclectus.models.extension.methods import method_blueprint, open_method, save_method
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining import stages
from eclectus.models.pretraining.checkpoint import save_trained
from eclectus.models.sharding.blueprint import stock_blueprint
from eclectus.models.training.parallel import local
from eclectus.models.training.process import Process
from tests.support.processes import run_group
from tests.support.tiny_training import LENGTH, tiny_dense

METHODS = ["moe_lpr", "moe_all", "full", "lora", "llama_pro", "lory"]
STAGES = {
    "dense": lambda dense: stages.Stage(dense, {}, None),
    "lory stage": lambda dense: stages.lory_from_dense(dense, {}, (), 3, segment_length=LENGTH // 3),
    "expert_choice": lambda dense: stages.expert_choice_from_dense(dense, {}, (), 4, 5),
    "top_k": lambda dense: stages.top_k_of_dense(dense, {}, (), 3, 2, 5),
    "document_pools": lambda dense: stages.document_pools_of_dense(dense, {}, (), 2, 2, 5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    dense = tiny_dense()
    dense.save_pretrained(folder / "dense")
    upcycle(folder / "dense", folder / "moe", experts=4)
    LoryForCausalLM.from_dense(dense, num_experts=2, segment_length=LENGTH // 3).save_pretrained(folder / "lory")
    extend_lory(folder / "lory", folder / "wider")
    run_group(2, save_all, folder)
    return folder


def start_of(folder, method):
    return folder / ("wider" if method == "lory" else "moe" if method.startswith("moe") else "dense")


def blueprint_of(folder, method):
    return method_blueprint("moe_lpr" if method == "lory" else method, start_of(folder, method), lora_rank=2, seed=3)


@torch.no_grad()
def moved(model):
    """As if it had been trained: every trained value changes by a known amount, wherever it lies."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            local(parameter.detach()).mul_(1.25).add_(0.015625)
    return model


def save_all(folder):
    process = Process.current()
    for method in METHODS:
        with blueprint_of(folder, method) as blueprint:
            model = moved(blueprint.make(process, sharded=True))
        save_method(model, folder / f"sharded {method}", start_of(folder, method), process)
    for name, make in STAGES.items():
        with stock_blueprint(folder / "dense") as dense:
            model = moved(make(dense).blueprint.make(process, sharded=True))
        moments = {f"{key}.exp_avg": value.detach() for key, value in model.named_parameters()}
        moments |= {f"{key}.step": torch.tensor(3.0) for key in dict(model.named_parameters())}
        save_trained(model, folder / "dense", folder / f"sharded {name}", moments, process)


def tensors_in(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.tensor(name) for name in reader.specs}


def same_checkpoint(ours, theirs):
    found, expected = tensors_in(ours), tensors_in(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert read_config(ours) == read_config(theirs)
    names = {path.name for path in ours.iterdir()}, {path.name for path in theirs.iterdir()}
    differs = {name for name in names[0] ^ names[1] if not name.startswith(("model", "moments"))}
    assert not differs
    sizes = [path.stat().st_size for path in sorted(ours.glob("model-*.safetensors"))]
    assert len(sizes) == 2 and min(sizes) > 0.6 * max(sizes)
    model = AutoModelForCausalLM.from_pretrained(ours)
    probes = probes_for(model.config, 1)
    checked(
        "opened", logits_of(model, probes), logits_of(AutoModelForCausalLM.from_pretrained(theirs), probes), 0, probes
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_extension_is_written_as_a_whole_one(folder, method):
    options = {"lora_rank": 2, "seed": 3}
    model = moved(open_method("moe_lpr" if method == "lory" else method, start_of(folder, method), **options))
    save_method(model, folder / f"whole {method}", start_of(folder, method))
    same_checkpoint(folder / f"sharded {method}", folder / f"whole {method}")
    if method.startswith("moe"):
        ours, theirs = (
            json.loads((folder / f"{who} {method}" / "upcycle.json").read_text()) for who in ("sharded", "whole")
        )
        assert ours == theirs and ours["original_weights"] == ("unchanged" if method == "moe_lpr" else "changed")


@pytest.mark.parametrize("name", STAGES)
def test_a_sharded_stage_of_pre_training_is_written_as_a_whole_one(folder, name):
    with stock_blueprint(folder / "dense") as dense:
        model = moved(STAGES[name](dense).blueprint.make())
    save_trained(model, folder / "dense", folder / f"whole {name}", None, Process())
    same_checkpoint(folder / f"sharded {name}", folder / f"whole {name}")


def count_held(folder):
    """What a process holds of a tensor beyond its shards, while it writes: one matrix of one expert."""
    process = Process.current()
    with method_blueprint("moe_lpr", folder / "moe") as blueprint:
        model = blueprint.make(process, sharded=True)
    largest, gather = [], torch.distributed.all_gather

    def counted(parts, value, **options):
        largest.append(sum(part.nbytes for part in parts))
        return gather(parts, value, **options)

    torch.distributed.all_gather = counted
    save_method(model, folder / f"counted {process.world}", folder / "moe", process)
    inner, width = model.config.intermediate_size, model.config.hidden_size
    assert largest and max(largest) <= 2 * inner * width * 4


def test_one_expert_at_a_time_is_gathered(folder):
    run_group(2, count_held, folder)


def fill_the_disk(folder):
    process, write = Process.current(), writing._FileSequence.write

    def full(self, spec, tensor):
        if process.rank == 1 and "layers.1" in spec.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, spec, tensor)

    writing._FileSequence.write = full
    with method_blueprint("moe_lpr", folder / "moe") as blueprint:
        model = blueprint.make(process, sharded=True)
    with pytest.raises(
        CheckpointError, match="cannot be written by process 1: No space left on device; nothing was kept"
    ):
        save_method(model, folder / "full", folder / "moe", process)
    process.barrier()
    assert not (folder / "full").exists() and not list(folder.glob(".full*"))


def test_a_disk_that_fills_in_one_process_is_named_by_all_and_nothing_is_left(folder):
    run_group(2, fill_the_disk, folder)


def refuse_folder(folder):
    process = Process.current()
    with method_blueprint("moe_lpr", folder / "moe") as blueprint:
        model = blueprint.make(process, sharded=True)
    with pytest.raises(ValueError, match="exists already: remove it or choose another place"):
        save_method(model, folder / "moe", folder / "moe", process)


def test_a_folder_that_is_not_new_is_refused_by_all(folder):
    run_group(2, refuse_folder, folder)


def die_while_writing(folder, out):
    process, write = Process.current(), writing._FileSequence.write

    def fatal(self, spec, tensor):
        if process.rank == 0 and "layers.1" in spec.name:
            os.kill(os.getpid(), 9)
        write(self, spec, tensor)

    writing._FileSequence.write = fatal
    with method_blueprint("moe_lpr", folder / "moe") as blueprint:
        model = blueprint.make(process, sharded=True)
    save_method(model, out, folder / "moe", process)


def test_a_kill_while_shards_are_written_leaves_no_checkpoint(folder, tmp_path):
    with pytest.raises(AssertionError, match="-9"):
        run_group(2, die_while_writing, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_divided_evenly_and_one_process_writes_what_it_always_wrote(tmp_path):
    specs = [TensorSpec(f"t{i}", torch.float32, (i % 3 + 1, 4)) for i in range(9)]
    values = {spec.name: torch.randn(spec.shape) for spec in specs}
    divided = writing._divided(specs, 3, 10**9)
    assert [rank for rank, _ in divided] == [0, 1, 2]
    loads = [sum(spec.nbytes for spec in held) for _, held in divided]
    assert max(loads) - min(loads) <= 48
    assert sorted(spec.name for _, held in divided for spec in held) == sorted(values)
    for limit, count in ((10**9, 1), (100, 3)):
        out = tmp_path / str(limit)
        out.mkdir()
        write_tensors(out, specs, values.__getitem__, limit)
        assert len(list(out.glob("*.safetensors"))) == count
        assert all(torch.equal(value, values[name]) for name, value in tensors_in(out).items())
        shutil.rmtree(out)
