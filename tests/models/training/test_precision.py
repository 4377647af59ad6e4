"""Training in bfloat16: what is held in which type, that frozen weights come back bit by bit, and the probe."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from eclectus.models.extension.methods import open_method, open_review, save_method, untrained_digest
from eclectus.models.losses import objectives
from eclectus.models.losses.step import Step, targets_of
from eclectus.models.mixture.experts import frozen_digest, moe_blocks, set_trainable
from eclectus.models.mixture.grouped_gemm import _side_by_side
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.sharding.slices import in_memory
from eclectus.models.training.instances import IGNORED, Instances
from eclectus.models.training.loop import train
from eclectus.models.training.precision import FrozenWeights, autocast, bfloat16_gain, compute_dtype, keep_routers_fp32
from eclectus.models.training.process import Process
from tests.support.tiny_training import batch_of, plan, tiny_dense, write_instances

CPU = torch.device("cpu")
HALF = "bfloat16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    write_instances(folder / "instances")
    tiny_dense().save_pretrained(folder / "dense")
    upcycle(folder / "dense", folder / "moe", experts=3)
    return folder


def opened(folder, method):
    return open_method(method, folder / ("dense" if method in ("full", "lora", "llama_pro") else "moe"))


def objective_of(model):
    routed = hasattr(model.config, "num_experts_per_tok")
    return objectives.post_pretrain(0.01, 2, "paper") if routed else objectives.next_token(["a", "b"])


def trained(folder, model, work, precision=HALF, report=lambda kind, **values: None, **changes):
    held = FrozenWeights(model, in_memory(model)) if precision == HALF else None
    settings = plan(precision=precision, learning_rate=1e-3, **changes)
    train(model, Instances(folder / "instances"), objective_of(model), settings, Process(), work, report)
    if held:
        held.restore()
    return model


def test_auto_is_bfloat16_on_cuda_and_float32_on_a_cpu():
    assert compute_dtype("auto", torch.device("cuda")) == compute_dtype(HALF, CPU) == torch.bfloat16
    assert compute_dtype("auto", CPU) == compute_dtype("float32", torch.device("cuda")) == torch.float32
    with pytest.raises(ValueError, match="float16"):
        compute_dtype("float16", CPU)


@pytest.mark.parametrize("method", ["moe_lpr", "full", "lora", "llama_pro", "moe_all"])
def test_what_does_not_train_is_held_in_bf16_and_leaves_the_training_bit_by_bit(folder, tmp_path, method):
    model = opened(folder, method)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    digest, frozen = untrained_digest(model), {n for n, p in model.named_parameters() if not p.requires_grad}
    held = FrozenWeights(model, in_memory(model))
    for name, parameter in model.named_parameters():
        matrix = name in frozen and parameter.ndim > 1 and "gate.weight" not in name
        assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), name
    settings = plan(precision=HALF, learning_rate=1e-3, stop=3, total=3)
    train(
        model,
        Instances(folder / "instances"),
        objective_of(model),
        settings,
        Process(),
        tmp_path / "work",
        lambda kind, **values: None,
    )
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) and (name not in frozen or not parameter.requires_grad)
    held.restore()
    assert untrained_digest(model) == digest
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and not changed & frozen


def test_a_written_checkpoint_holds_the_base_of_fp32_as_it_was(folder, tmp_path):
    model = opened(folder, "moe_lpr")
    base = json.loads((folder / "moe" / "upcycle.json").read_text())["base_digest"]
    held = FrozenWeights(model, in_memory(model))
    # The values of this base are no bf16 values, so that rounding would be seen.
    assert frozen_digest(model) != base
    held.restore()
    save_method(model, tmp_path / "out", folder / "moe")
    assert frozen_digest(open_method("moe_lpr", tmp_path / "out")) == base
    reviewed = open_review(tmp_path / "out")
    held = FrozenWeights(reviewed, in_memory(reviewed))
    held.restore()
    assert frozen_digest(reviewed) == base


def test_a_base_of_bf16_values_is_restored(folder):
    model = opened(folder, "moe_lpr")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    digest = untrained_digest(model)
    held = FrozenWeights(model, in_memory(model))
    assert untrained_digest(model) != digest
    held.restore()
    assert untrained_digest(model) == digest
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["moe_lpr", "full"])
def test_a_killed_bf16_training_ends_with_the_bits_of_an_undisturbed_one(folder, tmp_path, method):
    class Killed(Exception):
        pass

    def kill(kind, **values):
        if kind == "progress" and values["done"] == 7:
            raise Killed

    expected = trained(folder, opened(folder, method), tmp_path / "a").state_dict()
    with pytest.raises(Killed):
        trained(folder, opened(folder, method), tmp_path / "b", report=kill)
    found = trained(folder, opened(folder, method), tmp_path / "b").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_bf16_training_ends_near_fp32s(folder, tmp_path):
    ends = {}
    for precision in ("float32", HALF):
        start = dict(opened(folder, "moe_lpr").named_parameters())
        model = trained(folder, opened(folder, "moe_lpr"), tmp_path / precision, precision)
        moved = [(value - start[name]).flatten() for name, value in model.named_parameters() if value.requires_grad]
        ends[precision] = torch.cat(moved)
    assert not torch.equal(ends["float32"], ends[HALF])
    assert F.cosine_similarity(ends["float32"], ends[HALF], dim=0) > 0.98


def test_routers_losses_and_the_residual_stream_are_fp32(folder, tmp_path):
    model, seen = opened(folder, "moe_lpr").train(), {}
    FrozenWeights(model, in_memory(model))
    keep_routers_fp32(model)
    block = next(moe_blocks(model))[1]
    model.model.layers[1].register_forward_pre_hook(lambda _, arguments: seen.update(residual=arguments[0].dtype))
    tokens = torch.arange(1, 25).view(1, -1)
    with autocast(CPU, HALF):
        output = model(input_ids=tokens, output_router_logits=True)
        loss, _ = objective_of(model)(model, batch_of(tokens))
    assert (seen["residual"], output.logits.dtype) == (torch.float32, torch.bfloat16)
    assert loss.dtype == output.router_logits[0].dtype == torch.float32
    with torch.no_grad():
        hidden = torch.randn(5, block.gate.weight.shape[1])
        exact = F.linear(hidden, block.gate.weight)
        with autocast(CPU, HALF):
            assert torch.equal(block.gate(hidden)[0], exact)


def test_new_experts_are_cast_once_in_front_of_the_frozen_ones(folder, tmp_path):
    model = opened(folder, "moe_lpr")
    FrozenWeights(model, in_memory(model))
    experts = next(moe_blocks(model.to(CPU)))[1].experts
    both = _side_by_side(experts.new_down, experts.frozen_down, torch.bfloat16)
    assert both.data_ptr() == experts.frozen_down.untyped_storage().data_ptr()
    assert torch.equal(both, torch.cat([experts.new_down.bfloat16(), experts.frozen_down]))
    version = experts.frozen_down._version
    with torch.no_grad():
        experts.new_down.mul_(2)
    again = _side_by_side(experts.new_down, experts.frozen_down, torch.bfloat16)
    assert torch.equal(again[0], experts.new_down[0].bfloat16())
    assert experts.frozen_down._version == version


def test_the_head_computes_the_tokens_that_have_a_target_and_no_other(folder):
    model, rows = opened(folder, "full"), []
    tokens = torch.arange(1, 49).view(2, -1)
    batch = batch_of(tokens)
    labels = tokens.clone()
    labels[0, 5:9], labels[1, 12:] = IGNORED, IGNORED
    batch = dataclasses.replace(batch, labels=labels)
    model.lm_head.register_forward_hook(lambda _, __, output: rows.append(output.flatten(0, 1).shape[0]))
    for domains in ([], ["a"]):
        loss, _ = objectives.next_token(domains)(model, batch)
        expected = objectives.next_token_loss(model(input_ids=tokens).logits, labels)
        torch.testing.assert_close(loss, expected)
    assert rows == [23 - 4 + 11, 48] * 2
    assert [each.tolist() for each in targets_of(torch.full((2, 4), IGNORED))] == [[], []]


def test_a_batch_without_a_target_has_no_loss_and_a_gradient_of_zero(folder):
    model = opened(folder, "full")
    empty = dataclasses.replace(batch_of(torch.ones(1, 8, dtype=torch.int64)), labels=torch.full((1, 8), IGNORED))
    loss, _ = Step(objectives.next_token(["a"]), [empty], Process()).measure(model, 0)
    loss.backward()
    assert loss == 0 and not model.lm_head.weight.grad.any()


def test_the_probe_is_a_number_of_this_machine():
    assert bfloat16_gain(0.05) > 0
    command = [sys.executable, "-m", "eclectus.models.training.precision"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["gain"] != 0


@pytest.mark.parametrize("trained", ["post_pretrain", "review", "all"])
def test_no_activation_is_kept_that_only_frozen_weights_need(folder, trained):
    """A projection's weight gradient needs its input, so that is kept where the weight trains and nowhere else."""
    model, kept, inputs = opened(folder, "moe_lpr"), [], {}
    set_trainable(model, trained)

    def remember(name):
        # The tensors, not their addresses, which others would get.
        return lambda _, arguments: inputs.update({name: arguments[0]})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(remember(f"{name}.weight"))

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = objective_of(model)(model, batch_of(torch.arange(1, 25).view(1, -1)))
    loss.backward()
    of_weights = dict(model.named_parameters())
    assert {name for name in inputs if of_weights[name].requires_grad} == (set(inputs) if trained == "all" else set())
    # The experts' own products, and the norms, keep what they need of the stream that the projections read.
    projections = [name for name in inputs if ".self_attn." in name and "o_proj" not in name]
    assert projections
    addresses = {tensor.data_ptr() for tensor in kept}
    for name in projections:
        assert (inputs[name].data_ptr() in addresses) == (trained == "all"), name
    for name, parameter in of_weights.items():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
