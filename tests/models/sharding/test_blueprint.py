"""Models born sharded: a process reads its own part of the checkpoint, and trains to the bits of one sharded whole."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models.checkpoints.tensor_files import CheckpointError, CheckpointReader, TensorSpec, read_config
from eclectus.models.checkpoints.writing import write_checkpoint
from eclectus.models.extension.lory import extend_lory, post_pretrain_lory
from eclectus.models.extension.methods import (
    method_blueprint,
    open_method,
    prove_method,
    review_blueprint,
    untrained_digest,
)
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import next_token, post_pretrain
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.parallel import item, local, local_bounds, shard, whole
from eclectus.models.training.process import Process
from tests.support.processes import run_group
from tests.support.tiny_training import LENGTH, SHAPE, plan, tiny_dense, write_instances

METHODS = ["moe_lpr", "moe_all", "full", "lora", "llama_pro"]


def start_of(folder, method):
    if method == "lory":
        return folder / "wider"
    return folder / ("moe" if method.startswith("moe") else "dense")


def blueprint_of(folder, method):
    return method_blueprint("moe_lpr" if method == "lory" else method, start_of(folder, method), lora_rank=2, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("born")
    write_instances(folder / "instances")
    dense = tiny_dense()
    dense.save_pretrained(folder / "dense")
    upcycle(folder / "dense", folder / "moe", experts=4, max_shard_bytes=20_000)
    LoryForCausalLM.from_dense(dense, num_experts=2, segment_length=LENGTH // 3).save_pretrained(folder / "lory")
    extend_lory(folder / "lory", folder / "wider")
    return folder


def trained(folder, model, process, method):
    objective = post_pretrain_lory() if method == "lory" else next_token()
    if method.startswith("moe"):
        objective = post_pretrain(0.01, 2, "paper")
    settings = plan(stop=3, total=3, batch=12, learning_rate=1e-3, sharded=True, checkpoint_every=99)
    work = folder / f"{method} {process.world}"
    moments = train(model, Instances(folder / "instances"), objective, settings, process, work, lambda *_, **__: None)
    return {**dict(model.named_parameters()), **moments}


def compare_births(folder, methods):
    """In each process: a model born sharded against one that was whole in every process before it was sharded."""
    process = Process.current()
    for method in methods:
        with blueprint_of(folder, method) as blueprint:
            born, late = blueprint.make(process, sharded=True), blueprint.make()
        digest = untrained_digest(late)
        shard(late, process)
        expected = dict(late.named_parameters())
        for name, parameter in born.named_parameters():
            other = expected.pop(name)
            assert parameter.placements == other.placements and parameter.requires_grad == other.requires_grad, name
            assert torch.equal(local(parameter), local(other)), name
            sizes = [end - begin for begin, end in local_bounds(parameter)]
            assert parameter.numel() == 0 or tuple(sizes) == tuple(local(parameter).shape), name
        assert not expected and untrained_digest(born) == digest
        proof = prove_method(born, "moe_lpr" if method == "lory" else method, start_of(folder, method), process)
        assert (proof is not None) == process.is_main
        ends = trained(folder, born, process, method), trained(folder, late, process, method)
        assert ends[0].keys() == ends[1].keys()
        for name, value in ends[0].items():
            assert torch.equal(local(value.detach()), local(ends[1][name].detach())), f"{method}: {name}"


def test_a_model_born_sharded_trains_to_the_bits_of_one_that_was_whole(folder):
    run_group(2, compare_births, folder, [*METHODS, "lory"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_the_same_in_more_processes(folder, world):
    run_group(world, compare_births, folder, [*METHODS, "lory"])


def read_own_part(folder):
    process, block, read = Process.current(), CheckpointReader.block, []

    def counted(reader, name, bounds):
        found = block(reader, name, bounds)
        read.append(found.nbytes)
        return found

    CheckpointReader.block = counted
    with method_blueprint("moe_lpr", folder / "moe") as blueprint:
        model = blueprint.make(process, sharded=True)
        with CheckpointReader(folder / "moe") as reader:
            total = sum(spec.nbytes for spec in reader.specs.values())
    # The shares of stacks are equal: three new experts and one frozen one, in two processes.
    for name, parameter in model.named_parameters():
        if ".mlp.experts" in name:
            assert local(parameter).numel() * process.world == parameter.numel(), name
    assert sum(process.gather(sum(read))) == total
    assert max(process.gather(sum(read))) < 0.55 * total


def test_every_process_reads_its_own_part_and_the_shares_are_even(folder):
    run_group(2, read_own_part, folder)


def read_items(folder):
    process = Process.current()
    with method_blueprint("moe_all", folder / "moe") as blueprint:
        model, late = blueprint.make(process, sharded=True), dict(blueprint.make().named_parameters())
    for name, parameter in model.named_parameters():
        for number in (0, len(parameter) - 1):
            assert torch.equal(item(parameter, number), late[name][number]), name
            assert torch.equal(item(late[name], number), late[name][number])
        assert torch.equal(whole(parameter), late[name])


def test_one_row_or_matrix_of_a_sharded_tensor_is_gathered(folder):
    run_group(2, read_items, folder)


def damage(folder, out, change):
    with CheckpointReader(folder) as reader:
        tensors = {name: reader.tensor(name) for name in reader.specs}
        change(tensors)
        specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        write_checkpoint(out, read_config(folder), specs, tensors.__getitem__, folder)


def fail_alike(folder):
    process = Process.current()
    with method_blueprint("moe_lpr", folder / "nan") as blueprint, pytest.raises(CheckpointError) as found:
        blueprint.make(process, sharded=True)
    faults = set(process.gather(str(found.value)))
    assert len(faults) == 1 and "embed_tokens.weight holds NaN in row 60" in faults.pop()


def test_what_one_process_cannot_read_is_the_same_error_in_all(folder):
    (folder / "nan").mkdir()
    damage(folder / "moe", folder / "nan", lambda tensors: tensors["model.embed_tokens.weight"][60].fill_(torch.nan))
    run_group(2, fail_alike, folder)


def test_a_tensor_that_a_shard_file_lacks_is_named_before_anything_is_read(folder, tmp_path):
    with method_blueprint("moe_lpr", folder / "moe") as blueprint:
        blueprint.make()
    for path in (folder / "moe").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    about = json.loads(index.read_text())
    files = sorted(set(about["weight_map"].values()))
    name = next(name for name, file in about["weight_map"].items() if file == files[1])
    about["weight_map"][name] = files[0]
    index.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=f"{files[0]} lacks {name}"):
        method_blueprint("moe_lpr", tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"shard {files[1]} is missing"):
        review_blueprint(tmp_path)


def test_whole_and_in_memory_it_is_what_open_method_returns(folder):
    with blueprint_of(folder, "moe_lpr") as blueprint:
        assert all(parameter.is_meta for parameter in blueprint.model.parameters())
        made = blueprint.make().state_dict()
    opened = open_method("moe_lpr", folder / "moe").state_dict()
    assert made.keys() == opened.keys() and all(torch.equal(value, opened[name]) for name, value in made.items())
    assert isinstance(open_method("full", folder / "dense"), LlamaForCausalLM)


def resident():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])


def hold_a_share(folder):
    """Layers of 24 MB are gathered one by one; what stays is a half of each, and the outermost weights."""
    process = Process.current()
    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 7168, "num_hidden_layers": 8})
    if process.is_main:
        LlamaForCausalLM(config).save_pretrained(folder / "wide")
    process.barrier()
    with method_blueprint("full", folder / "wide") as blueprint:
        before, size = resident(), 4 * sum(value.numel() for value in blueprint.model.parameters())
        model = blueprint.make(process, sharded=True)
        with torch.no_grad():
            for _ in range(2):
                model(input_ids=torch.arange(8)[None])
    # Without it they stay in the heap: more than twice the whole.
    assert size > 180e6 and resident() - before < 0.9 * size, (size, resident() - before)


def test_gathered_layers_do_not_stay_in_memory(tmp_path):
    run_group(2, hold_a_share, tmp_path)
