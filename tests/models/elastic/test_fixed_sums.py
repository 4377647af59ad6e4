"""Sums in a fixed order: the same bits of weights and metrics on 1, 2 and 4 processes, and what cannot be summed so."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from eclectus.models.elastic.fixed_sums import TreeSum, copies_held, sum_over_processes
from eclectus.models.losses.objectives import balanced, next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from tests.support.processes import run_group
from tests.support.tiny_training import plan, tiny_dense, tiny_mixture, write_instances


def tree(values):
    """The sum of a power of two of floats, in pairs of pairs."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return tree(values[:half]) + tree(values[half:])


def vectors(count, size=7):
    torch.manual_seed(count)
    return [torch.randn(size) * 10 ** random.Random(i).uniform(-6, 6) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_step_is_added_up_as_a_binary_tree(count):
    values, total = vectors(count), TreeSum(count)
    for value in values:
        total.add(value.clone())
    assert torch.equal(total.take(), tree(values))


@pytest.mark.parametrize(("count", "world"), [(6, 1), (6, 2), (12, 2), (12, 4), (3, 1)])
def test_an_odd_factor_is_added_in_order_below_the_tree(count, world):
    values, run = vectors(count), count // (count & -count)
    runs = [sum(values[i + 1 : i + run], values[i]) for i in range(0, count, run)]
    each, parts = count // world, []
    for rank in range(world):
        share = TreeSum(count)
        for value in values[rank * each : (rank + 1) * each]:
            share.add(value.clone())
        parts.append(share.take())
    assert torch.equal(tree(parts), tree(runs))


@pytest.mark.parametrize("count", range(1, 17))
def test_so_many_copies_are_held(count):
    share, most = TreeSum(count), 0
    for value in vectors(count, 1):
        most = max(most, len(share._sums) + 1)
        share.add(value)
    assert copies_held(count) == most


def sum_in_a_group(folder):
    process, found = Process.current(), {}
    for size in (1, 2, 3, 5, 64):
        values = vectors(process.world, size)
        found[str(size)] = sum_over_processes(values[process.rank].clone(), process)
    save_file(found, folder / f"{process.world} {process.rank}")


@pytest.mark.parametrize("world", [2, 4])
def test_processes_end_with_the_sum_of_the_tree(tmp_path, world):
    run_group(world, sum_in_a_group, tmp_path)
    for rank in range(world):
        found = load_file(tmp_path / f"{world} {rank}")
        assert all(torch.equal(value, tree(vectors(world, int(size)))) for size, value in found.items())


# A mixture's balance loss needs statistics of the whole step.
MODELS = {"dense": (tiny_dense, next_token), "mixture": (tiny_mixture, balanced)}


def train_fixed(folder, name, stop=12):
    process, rows = Process.current(), []
    make, objective = MODELS[name]

    def report(kind, **values):
        if kind == "metrics":
            rows.append([values["step"], *(values["values"][each] for each in ("loss", "loss/a", "gradient_norm"))])

    model, chosen = make(), plan(batch=8, micro_batch=2, stop=stop, fixed_sums=True)
    work = folder / f"work {process.world}"
    train(model, Instances(folder / "instances"), objective(["a", "b"]), chosen, process, work, report)
    if process.is_main:
        ended = {name: value.detach() for name, value in model.named_parameters()}
        save_file(ended | {"metrics": torch.tensor(rows, dtype=torch.float64)}, folder / f"{name} {process.world}")


@pytest.mark.parametrize("name", MODELS)
def test_one_two_and_four_processes_end_with_the_same_bits_and_report_the_same_metrics(tmp_path, name):
    write_instances(tmp_path / "instances")
    for world in (1, 2, 4):
        run_group(world, train_fixed, tmp_path, name)
    one, *others = (load_file(tmp_path / f"{name} {world}") for world in (1, 2, 4))
    assert len(one["metrics"]) == 4
    for other in others:
        assert other.keys() == one.keys() and all(torch.equal(other[each], one[each]) for each in one)


def test_ddp_does_not_give_the_same_bits(tmp_path):
    """What the fixed order is for: without it, two processes end with others."""
    write_instances(tmp_path / "instances")
    for world in (1, 2):
        run_group(world, train_free, tmp_path)
    one, two = (load_file(tmp_path / f"free {world}") for world in (1, 2))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def train_free(folder):
    process, model = Process.current(), tiny_dense()
    work, chosen = folder / f"free work {process.world}", plan(batch=8, micro_batch=1)
    train(model, Instances(folder / "instances"), next_token(), chosen, process, work, lambda kind, **values: None)
    if process.is_main:
        save_file({name: each.detach() for name, each in model.named_parameters()}, folder / f"free {process.world}")


def test_a_step_of_fixed_sums_is_that_of_the_objective(tmp_path):
    """As without them, but for rounding."""
    data = Instances(write_instances(tmp_path / "instances"))
    ended = []
    for fixed in (True, False):
        model = tiny_dense()
        chosen = plan(batch=8, micro_batch=2, fixed_sums=fixed)
        train(model, data, next_token(), chosen, Process(), tmp_path / str(fixed), lambda kind, **values: None)
        ended.append(model.state_dict())
    for name, value in ended[0].items():
        torch.testing.assert_close(value, ended[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "world", "words"),
    [
        ({"batch": 8}, 3, "batch of 8 instances cannot be shared by 3 processes"),
        ({"batch": 6, "fixed_sums": True}, 3, "3 processes are no power of two"),
        ({"batch": 6, "micro_batch": 4, "fixed_sums": True}, 1, "no multiple of micro-batches of 4"),
        ({"batch": 8, "micro_batch": 4, "fixed_sums": True}, 4, "2 micro-batches of 4, too few for 4 processes"),
        ({"batch": 8, "fixed_sums": True, "sharded": True}, 2, "a sharded model has none"),
    ],
)
def test_what_cannot_be_shared_is_named(changed, world, words):
    with pytest.raises(ValueError, match=words):
        plan(**changed).check_sharing(world)
