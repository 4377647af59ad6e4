"""The training loop: resuming is exact, a gradient that is not finite stops it, split batches are equal."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import NextToken, lory, next_token
from eclectus.models.losses.step import Objective, Step
from eclectus.models.pretraining.baselines import ExpertChoiceForCausalLM
from eclectus.models.pretraining.blueprints import duplicated_moments
from eclectus.models.sharding.slices import InMemory
from eclectus.models.training import resume
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import TrainingFailed, train
from eclectus.models.training.parallel import recompute_blocks
from eclectus.models.training.process import Process
from tests.support.processes import run_group, run_process
from tests.support.tiny_training import LENGTH, plan, tiny_dense, write_instances


@pytest.fixture
def data(tmp_path):
    return Instances(write_instances(tmp_path / "instances"))


def silent(kind, **values):
    pass


def held(moments):
    return {name: InMemory(value) for name, value in moments.items()}


def trained(data, work, chosen=None, model=None, objective=None, report=silent, moments=None):
    model = model or tiny_dense()
    after = train(model, data, objective or next_token(), chosen or plan(), Process(), work, report, moments)
    return model.state_dict(), after


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Killed(Exception):
    pass


def killed_at(step):
    def report(kind, **values):
        if kind == "progress" and values["done"] == step:
            raise Killed

    return report


@pytest.mark.parametrize("step", range(1, 12))
def test_a_run_stopped_at_any_step_ends_with_bit_identical_weights_and_moments(data, tmp_path, step):
    weights, moments = trained(data, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        trained(data, tmp_path / "work", report=killed_at(step))
    # Other initial weights: all that counts comes from the checkpoint, where there is one.
    again, moments_again = trained(data, tmp_path / "work", model=tiny_dense(seed=0 if step <= 5 else 9))
    assert same(weights, again)
    assert same(moments, moments_again)


def killed_without_warning(folder, step):
    """Trains in a process of its own, which kills itself after `step` (0: never)."""

    def report(kind, **values):
        if kind == "progress" and values["done"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    weights, _ = trained(Instances(folder / "instances"), folder / "work", report=report)
    save_file(weights, folder / "end.safetensors")


def test_a_killed_process_resumes_bit_identically(data, tmp_path):
    assert run_process(killed_without_warning, tmp_path, 8) == -signal.SIGKILL
    assert json.loads((tmp_path / "work/latest/progress.json").read_text())["step"] == 5
    assert run_process(killed_without_warning, tmp_path, 0) == 0
    weights, _ = trained(data, tmp_path / "undisturbed")
    ended = load_file(tmp_path / "end.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in ended.items())


def test_an_incomplete_checkpoint_is_never_used(data, tmp_path):
    weights, _ = trained(data, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        trained(data, tmp_path / "work", report=killed_at(7))
    partial = tmp_path / "work/step-10"
    partial.mkdir()
    (partial / "trained.safetensors").write_bytes(b"half")
    again, _ = trained(data, tmp_path / "work")
    assert same(weights, again)


@pytest.mark.parametrize("damage", ["cut", "turned", "gone", "not json", "earlier version"])
def test_a_damaged_checkpoint_is_not_used_and_training_restarts(data, tmp_path, damage):
    weights, _ = trained(data, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        trained(data, tmp_path / "work", report=killed_at(7))
    file = tmp_path / "work/latest/trained-00001-of-00001.safetensors"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "turned":
        file.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif damage == "gone":
        file.unlink()
    elif damage == "not json":
        (tmp_path / "work/latest/progress.json").write_text("{")
    else:
        about = json.loads((tmp_path / "work/latest/progress.json").read_text())
        about.pop("format")
        (tmp_path / "work/latest/progress.json").write_text(json.dumps(about))
    reports = []
    again, _ = trained(data, tmp_path / "work", report=lambda kind, **values: reports.append((kind, values)))
    assert same(weights, again)
    ((step, text),) = [(values["step"], values["text"]) for kind, values in reports if kind == "damaged"]
    assert step == 0 and re.search("(is damaged|by another version).*begins again at step 0", text)


def test_a_checkpoint_of_another_model_or_stage_is_refused(data, tmp_path):
    with pytest.raises(Killed):
        trained(data, tmp_path / "work", report=killed_at(7))
    other = LoryForCausalLM.from_dense(tiny_dense(), 2, LENGTH // 3)
    with pytest.raises(ValueError, match=r"is of another model: it has .*mlp\.experts"):
        trained(data, tmp_path / "work", model=other, objective=lory())
    with pytest.raises(ValueError, match="is of a training that began at step 0, not 6"):
        trained(data, tmp_path / "work", plan(start=6))


class Spoiled(NextToken):
    """The next-token loss, until it was computed `after` times; then NaN."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def measure(self, done, statistic):
        loss, extra = super().measure(done, statistic)
        self.left -= 1
        return loss * (float("nan") if self.left < 0 else 1.0), extra


def test_a_loss_that_is_not_finite_names_step_and_batch_and_keeps_the_last_checkpoint(data, tmp_path):
    rows = data.rows_of_step(7, 4, 0).tolist()
    with pytest.raises(TrainingFailed) as failed:
        trained(data, tmp_path / "work", objective=Objective([Spoiled(after=7 * 2)]))
    assert f"not finite at training step 7 (instances {rows})" in str(failed.value)
    assert "last good checkpoint is kept" in str(failed.value)
    weights, _ = trained(data, tmp_path / "undisturbed")
    again, _ = trained(data, tmp_path / "work")
    assert same(weights, again)


def test_accumulated_micro_batches_equal_one_large_batch_also_with_padding(data, tmp_path):
    # Step 9 reads the last instance, which is half padding, and nine steps before it are whole.
    chosen = dict(start=7, stop=11, checkpoint_every=99, batch=4)
    assert data.batch(data.rows_of_step(9, 4, 0)).labels.min() < 0
    whole, _ = trained(data, tmp_path / "a", plan(**chosen, micro_batch=4))
    for size in (1, 2, 3):
        parts, _ = trained(data, tmp_path / str(size), plan(**chosen, micro_batch=size))
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5, msg=f"{name} at {size}")


def test_a_micro_batch_of_padding_has_no_weight(tmp_path):
    data = Instances(write_instances(tmp_path / "instances"))
    data.spans = data.spans[:-1]
    assert (data.batch(np.array([39])).labels == -100).all()
    chosen = dict(start=9, stop=10, checkpoint_every=99)
    parts, _ = trained(data, tmp_path / "a", plan(**chosen, micro_batch=1), objective=next_token(("a", "b")))
    whole, _ = trained(data, tmp_path / "b", plan(**chosen, micro_batch=4))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)


def train_in_a_group(folder):
    """What each of two processes does; rank 0 writes the weights and the metrics."""
    model, process, reported = tiny_dense(), Process.current(), []

    def report(kind, **values):
        if kind == "metrics":
            reported.append(values["values"])

    data, chosen = Instances(folder / "instances"), plan(stop=6, micro_batch=1)
    train(model, data, next_token(("a", "b")), chosen, process, folder / "work", report)
    if process.is_main:
        save_file(model.state_dict(), folder / "ddp.safetensors")
        (folder / "metrics.json").write_text(json.dumps(reported))


def test_two_processes_equal_one(data, tmp_path):
    metrics = []
    weights, _ = trained(
        data,
        tmp_path / "one",
        plan(stop=6, micro_batch=2),
        objective=next_token(("a", "b")),
        report=lambda kind, **values: metrics.append(values["values"]) if kind == "metrics" else None,
    )
    run_group(2, train_in_a_group, tmp_path)
    shared = load_file(tmp_path / "ddp.safetensors")
    for name, value in shared.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6, msg=name)
    for ours, theirs in zip(json.loads((tmp_path / "metrics.json").read_text()), metrics, strict=True):
        for name in ("loss", "loss/a", "loss/b", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_moments_are_passed_from_one_stage_to_the_next(data, tmp_path):
    """Two stages that hand over weights and moments are one run."""
    whole, moments = trained(data, tmp_path / "whole", plan(checkpoint_every=99))
    model = tiny_dense()
    _, half = trained(data, tmp_path / "first", plan(stop=6, checkpoint_every=99), model)
    both, moments_of_both = trained(data, tmp_path / "second", plan(start=6, checkpoint_every=99), model, moments=half)
    assert same(whole, both)
    assert same(moments, moments_of_both)


def test_the_first_step_after_duplication_is_the_dense_models(data, tmp_path):
    """With carried-over moments and equal weights, Lory's next step moves every copy as the dense FFN moves."""
    dense = tiny_dense()
    _, moments = trained(data, tmp_path / "warm", plan(stop=4, checkpoint_every=99), dense)
    model = LoryForCausalLM.from_dense(dense, 4, LENGTH // 3, router_initializer_range=1e-6)
    chosen = plan(start=4, stop=5, checkpoint_every=99)
    trained(data, tmp_path / "lory", chosen, model, lory(), moments=duplicated_moments(held(moments), 4))
    trained(data, tmp_path / "dense", chosen, dense, moments=moments)
    gate = dense.model.layers[0].mlp.gate_proj.weight
    for expert in model.model.layers[0].mlp.experts:
        # The gradient's share differs a little by segment, and AdamW's epsilon counts for more in a quarter of it.
        torch.testing.assert_close(expert[: len(gate)], gate, rtol=0, atol=2e-4)


def test_losses_by_domain_leave_the_loss_as_it_is_and_average_to_it(data):
    model = tiny_dense().eval()
    batch = data.batch(np.array([0, 39]))
    plain, _ = next_token()(model, batch)
    loss, terms = Step(next_token(("a", "b")), [batch], Process()).measure(model, 0)
    torch.testing.assert_close(loss, plain)
    both = terms["loss/a"], terms["loss/b"]
    torch.testing.assert_close(sum(term.total for term in both) / sum(term.count for term in both), plain.detach())
    assert sum(term.count for term in both) == (batch.labels[:, 1:] >= 0).sum()
    assert not any(term.total.requires_grad for term in terms.values())


def test_a_domain_without_tokens_is_not_logged(data, tmp_path):
    metrics = []

    def report(kind, **values):
        if kind == "metrics":
            metrics.append(values["values"])

    trained(data, tmp_path / "work", plan(stop=3), objective=next_token(("a", "b", "absent")), report=report)
    assert {"loss", "loss/a", "loss/b"} <= metrics[0].keys()
    assert 0 < metrics[0]["mfu"] < 1
    assert "loss/absent" not in metrics[0]


def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="batch of 4 instances cannot be shared by 3 processes"):
        train(tiny_dense(), data, next_token(), plan(), Process(world=3), tmp_path, silent)


def test_norms_and_embeddings_have_no_weight_decay(data, tmp_path):
    model = tiny_dense()
    unseen = model.model.embed_tokens.weight[0].clone()
    trained(data, tmp_path / "work", plan(weight_decay=1.0), model)
    assert torch.equal(model.model.embed_tokens.weight[0], unseen), "token 0 occurs nowhere but in padding"


def test_only_what_requires_gradients_has_moments_and_moves(data, tmp_path):
    model = tiny_dense()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "mlp" in name
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights, moments = trained(data, tmp_path / "work", model=model)
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == {name for name in before if "mlp" in name}
    assert all("mlp" in name for name in moments)


def test_routers_and_experts_have_their_own_learning_rates(data, tmp_path):
    """From zero moments AdamW's first step has the size of its rate, whatever the gradient, without weight decay."""
    before = LoryForCausalLM.from_dense(tiny_dense(), 4, LENGTH // 3, router_initializer_range=0.1)
    with torch.no_grad():  # equal experts give the routers no gradient
        for layer in before.model.layers:
            layer.mlp.experts += torch.randn_like(layer.mlp.experts) / 10
    start = {name: value.clone() for name, value in before.state_dict().items()}
    chosen = plan(start=4, stop=5, weight_decay=0.0, router_rate=3.0, expert_rate=0.5)
    after, _ = trained(data, tmp_path / "rates", chosen, before, lory())
    for part, scale in ((".router.", 3.0), (".mlp.experts", 0.5), ("q_proj", 1.0), ("embed_tokens", 1.0)):
        moved = max((after[name] - start[name]).abs().max().item() for name in start if part in name)
        assert moved == pytest.approx(scale * chosen.rate(4), rel=1e-2), part


@pytest.mark.parametrize("kind", ["dense", "lory", "expert_choice"])
def test_recomputed_activations_give_the_same_weights_to_the_bit(data, tmp_path, kind):
    def made():
        dense = tiny_dense()
        if kind == "expert_choice":
            return ExpertChoiceForCausalLM.from_dense(dense, 3)
        return LoryForCausalLM.from_dense(dense, 3, segment_length=8) if kind == "lory" else dense

    kept, _ = trained(data, tmp_path / "kept", plan(stop=3), made())
    for every in (1, 2):
        again, _ = trained(data, tmp_path / f"again {every}", plan(stop=3, recomputed=every), made())
        assert same(kept, again)


def test_every_second_layer_is_recomputed_when_asked():
    model = tiny_dense()
    recompute_blocks(model, 2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]


def fill_the_disk(folder):
    """The second checkpoint does not fit on the disk of process 1; a later run goes on from the first."""
    process, data = Process.current(), Instances(folder / "instances")
    write, calls = resume._write, []

    def full(path, tensors):
        calls.append(path)
        if process.rank == 1 and len(calls) > 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    def run(work, report=silent):
        model = tiny_dense()
        train(model, data, next_token(), plan(sharded=True), process, folder / work, report)
        return {name: parameter.to_local() for name, parameter in model.named_parameters()}

    undisturbed = run("undisturbed")
    resume._write = full
    with pytest.raises(TrainingFailed, match=r"step-10 cannot be written by process 1.*No space left.*free some space"):
        run("full")
    resume._write = write
    process.barrier()
    assert os.readlink(folder / "full/latest") == "step-5" and not (folder / "full/step-10").exists()
    again = run("full")
    assert all(torch.equal(value, undisturbed[name]) for name, value in again.items())


def test_a_disk_that_fills_in_one_process_is_named_by_all_and_the_checkpoint_before_is_kept(tmp_path):
    write_instances(tmp_path / "instances")
    run_group(2, fill_the_disk, tmp_path)
