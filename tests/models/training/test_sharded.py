"""Training over several processes: sharded (FSDP2) or copied (DDP), equal to one process, and any number resumes it."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from eclectus.models.extension.methods import method_blueprint, review_blueprint, save_method
from eclectus.models.lory.ffn import LoryFFN
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses.objectives import lory, next_token, post_pretrain, review
from eclectus.models.mixture.export import extract_base
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining.routing_profiles import routing_profiles
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import train
from eclectus.models.training.process import Process
from eclectus.tasks.training.unchanged_weights import UnchangedWeights
from tests.support.processes import run_group
from tests.support.tiny_training import LENGTH, plan, stored_weights, tiny_dense, write_instances

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow
KILLED_AT = 7
# Two micro-batches in a step of each of four processes.
FOUR = {"sharded": True, "batch": 8, "micro_batch": 1}


class Killed(Exception):
    pass


def tiny_lory(seed=0):
    # A router of 4 x 16 and experts of 4 x ..: neither divides by 3; one width is cut unevenly on purpose.
    # Its experts are views of one FFN, as the stages make them: training copies them.
    shape = dict(num_experts=3, segment_length=LENGTH // 3, router_initializer_range=0.3)
    return LoryForCausalLM.from_dense(tiny_dense(seed), seed=seed, shared_memory=True, **shape)


def kill(kind, **values):
    if kind == "progress" and values["done"] == KILLED_AT:
        raise Killed


def run(folder, process, work, report=lambda kind, **values: None, seen=None, **changes):
    """One training of a Lory model with AdamW's state, from the checkpoint under `work`, if any. seen: gets dtypes."""
    model = tiny_lory()
    if seen is not None:
        watch_gathered(model, seen)
    after = train(model, Instances(folder / "instances"), lory(), plan(**changes), process, folder / work, report)
    return model, after


def extend(folder, name, process, sharded, precision="float32"):
    """Both stages of an extension and a baseline; the digests of what is frozen are computed while it is sharded."""

    def stage(blueprint, method, objective, out, start):
        work = folder / f"{name} {out} work"
        with blueprint:
            unchanged = UnchangedWeights(blueprint, method, process, sharded)
            if precision == "bfloat16":
                unchanged.hold_in_bfloat16()
                watch_gathered(unchanged.model, seen)
            data = Instances(folder / "instances")
            settings = plan(learning_rate=1e-3, sharded=sharded, precision=precision)
            train(unchanged.model, data, objective, settings, process, work, lambda kind, **values: None)
            unchanged.check(settings.stop)
            if sharded or process.is_main:
                assert unchanged.restore(settings.stop) in (None, made["base_digest"])
                together = process if sharded else None
                save_method(unchanged.model, folder / f"{name} {out}", folder / start, together)
        process.barrier()

    made, seen = json.loads((folder / "moe" / "upcycle.json").read_text()), {}
    objectives = post_pretrain(0.01, 2, "paper"), review(0.5, "paper", [0])
    stage(method_blueprint("moe_lpr", folder / "moe"), "moe_lpr", objectives[0], "stage 1", "moe")
    stage(review_blueprint(folder / f"{name} stage 1"), "moe_lpr", objectives[1], "stage 2", "moe")
    stage(method_blueprint("lora", folder / "dense", lora_rank=2), "lora", next_token(), "lora", "dense")
    return seen


def watch_gathered(model, seen):
    """Notes the dtypes that a norm, a router, a projection and the residual stream have while the model computes."""
    layer = next(module for module in model.modules() if hasattr(module, "input_layernorm"))
    parts = {
        "norm": layer.input_layernorm,
        "projection": layer.self_attn.o_proj,
        "router": getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None),
    }
    for name, part in parts.items():
        if part is not None and hasattr(part, "weight"):
            part.register_forward_hook(lambda it, *_, name=name: seen.update({name: str(it.weight.dtype)}))
    if isinstance(layer.mlp, LoryFFN):
        layer.mlp.register_forward_hook(lambda it, *_: seen.update(experts=str(it.experts.dtype)))
    layer.register_forward_hook(lambda _, given, output: seen.update(residual=str(output.dtype)))


def in_both_processes(folder):
    """The part of each of two processes; rank 0 writes the results."""
    from eclectus.models.pretraining.checkpoint import save_trained
    from tests.models.training.test_sharded import Killed

    process, metrics, profiles, seen = Process.current(), [], {}, {"lory": {}}

    def finish(name, work, **changes):
        def report(kind, **values):
            metrics.append(values["values"]) if kind == "metrics" and name == "sharded" else None

        model, after = run(folder, process, work, report, **changes)
        precision = changes.get("precision", "auto")
        profiles[name] = routing_profiles(model, Instances(folder / "instances"), 2, process, precision=precision)
        save_trained(model, folder, folder / name, after, process)

    finish("sharded", "a", sharded=True)
    finish("kept", "g", sharded=True, kept=True)
    finish("ahead", "h", sharded=True, ahead=2)
    finish("reduced once", "i", sharded=True, reduced_once=True, recomputed=2)
    finish("copied", "b", sharded=False)
    finish("bf16 sharded", "j", sharded=True, precision="bfloat16", seen=seen["lory"])
    finish("bf16 copied", "k", sharded=False, precision="bfloat16")
    finish("sharded within documents", "e", sharded=True, document_mask=True)
    finish("copied within documents", "f", sharded=False, document_mask=True)
    for work in ("c", "d"):
        # The report goes to every process here, so all of them stop.
        with contextlib.suppress(Killed):
            run(folder, process, work, kill, sharded=True)
    finish("sharded again", "c", sharded=True)
    finish("from one process", "one", sharded=True)
    extend(folder, "both", process, sharded=True)
    for sharded in (True, False):
        seen[str(sharded)] = extend(folder, f"bf16 {sharded}", process, sharded, "bfloat16")
    if process.is_main:
        (folder / "seen.json").write_text(json.dumps(seen))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "profiles.json").write_text(json.dumps(profiles))


def in_four_processes(folder):
    """The part of each of four processes, of which each two hold the model between them."""
    from eclectus.models.pretraining.checkpoint import save_trained

    process = dataclasses.replace(Process.current(), replicas=2)
    for name, work in (("four", "four work"), ("four again", "four killed")):
        if name == "four again":
            with contextlib.suppress(Killed):
                run(folder, process, work, kill, **FOUR)
        model, after = run(folder, process, work, **FOUR)
        save_trained(model, folder, folder / name, after, process)
    extend(folder, "four", process, sharded=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    write_instances(folder / "instances")
    with pytest.raises(Killed):
        run(folder, Process(), "one", kill)
    tiny_dense().save_pretrained(folder / "dense")
    upcycle(folder / "dense", folder / "moe", experts=3)
    script = "import sys, pathlib\nfrom tests.models.training.test_sharded import in_both_processes\n"
    (folder / "both.py").write_text(script + "in_both_processes(pathlib.Path(sys.argv[1]))\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "both.py", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    model, after = run(folder, Process(), "alone")
    return {**model.state_dict(), **after}


@pytest.fixture(scope="module")
def four(folder):
    run_group(4, in_four_processes, folder)


def ended(folder, name):
    return {**stored_weights(folder / name), **stored_weights(folder / name, "moments")}


@pytest.mark.parametrize("name", ["sharded", "copied"])
def test_two_processes_end_as_one_does_within_documents(folder, alone, name):
    model, _ = run(folder, Process(), "alone within documents", document_mask=True)
    both, changed = stored_weights(folder / f"{name} within documents"), 0.0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(both[key], value, rtol=1e-3, atol=1e-5, msg=key)
        changed = max(changed, (value - alone[key]).abs().max().item())
    assert changed > 1e-3, "the mask matters"


@pytest.mark.parametrize("name", ["sharded", "copied", "sharded again", "from one process", "reduced once"])
def test_two_processes_end_as_one_does(folder, alone, name):
    both = ended(folder, name)
    assert both.keys() == alone.keys()
    for key, value in both.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["kept", "ahead"])
def test_when_weights_are_gathered_does_not_change_a_bit(folder, name):
    expected, found = ended(folder, "sharded"), ended(folder, name)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_sharded_training_that_was_killed_ends_bit_identically(folder):
    undisturbed, again = ended(folder, "sharded"), ended(folder, "sharded again")
    assert all(torch.equal(value, again[key]) for key, value in undisturbed.items())


def test_every_process_writes_its_own_part_and_one_process_resumes_from_both(folder, alone):
    files = sorted(path.name for path in (folder / "d/latest/").glob("trained-*"))
    assert files == ["trained-00001-of-00002.safetensors", "trained-00002-of-00002.safetensors"]
    sizes = [(folder / "d/latest" / name).stat().st_size for name in files]
    assert min(sizes) > 0.2 * max(sizes)
    model, after = run(folder, Process(), "d")
    for key, value in {**model.state_dict(), **after}.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5, msg=key)


def test_two_replicas_of_two_processes_end_as_one_process_does_and_resume_to_the_bit(folder, four):
    model, after = run(folder, Process(), "alone of eight", batch=8, micro_batch=4)
    found, again = ended(folder, "four"), ended(folder, "four again")
    for key, value in {**model.state_dict(), **after}.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert all(torch.equal(value, again[key]) for key, value in found.items())


def test_two_replicas_write_their_progress_once_and_extend_as_two_processes_do(folder, four):
    files = sorted(path.name for path in (folder / "four killed/latest/").glob("trained-*"))
    assert files == ["trained-00001-of-00002.safetensors", "trained-00002-of-00002.safetensors"]
    for name in ("stage 1", "stage 2", "lora"):
        ours, theirs = (stored_weights(folder / f"{who} {name}") for who in ("four", "both"))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


def test_what_was_sharded_is_saved_as_the_plain_class(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "sharded")
    assert type(loaded) is LoryForCausalLM
    assert loaded.config.architectures == ["LoryForCausalLM"]
    assert not isinstance(loaded, LlamaForCausalLM)


def test_routing_by_domain_does_not_depend_on_the_number_of_processes(folder):
    model = LoryForCausalLM.from_pretrained(folder / "sharded")
    expected = routing_profiles(model, Instances(folder / "instances"), 3, Process())
    assert expected["domain"].keys() == {"a", "b"}
    for name in ("sharded", "copied"):
        found = json.loads((folder / "profiles.json").read_text())[name]
        for domain, weights in expected["domain"].items():
            torch.testing.assert_close(
                torch.tensor(found["domain"][domain]), torch.tensor(weights), rtol=1e-2, atol=1e-3
            )


def test_sharded_metrics_are_those_of_one_process(folder):
    metrics = []
    run(folder, Process(), "metrics", lambda kind, **values: metrics.append(values) if kind == "metrics" else None)
    for ours, theirs in zip(json.loads((folder / "metrics.json").read_text()), metrics, strict=True):
        for name in ("loss", "router_entropy", "expert_utilisation", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs["values"][name], abs=1e-4), name


def test_matrices_are_gathered_in_bfloat16_and_nothing_else(folder):
    seen = json.loads((folder / "seen.json").read_text())
    expected = {"norm": "float32", "router": "float32", "projection": "bfloat16", "residual": "float32"}
    assert seen["True"] == {name: f"torch.{dtype}" for name, dtype in expected.items()}
    assert seen["lory"] == seen["True"] | {"experts": "torch.bfloat16"}


def test_lory_trains_in_bfloat16_with_shards_as_with_copies(folder):
    both, copied = (ended(folder, f"bf16 {how}") for how in ("sharded", "copied"))
    moved = 0.0
    for key, value in both.items():
        assert value.dtype == torch.float32, key
        torch.testing.assert_close(value, copied[key], rtol=2e-2, atol=2e-3, msg=key)
    for key, value in tiny_lory().state_dict().items():
        moved = max(moved, (both[key] - value).abs().max().item())
    assert moved > 2e-2, "what is compared has been trained"


def test_a_sharded_extension_is_that_of_one_process_and_leaves_the_base_as_it_was(folder):
    extend(folder, "alone", Process(), sharded=False)
    for name in ("stage 1", "stage 2", "lora"):
        both, alone = (stored_weights(folder / f"{who} {name}") for who in ("both", "alone"))
        assert both.keys() == alone.keys()
        for key, value in both.items():
            torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")
        halved, copied = (stored_weights(folder / f"bf16 {sharded} {name}") for sharded in (True, False))
        for key, value in halved.items():
            torch.testing.assert_close(value, copied[key], rtol=1e-2, atol=2e-3, msg=f"{name}: {key}")
    extract_base(folder / "both stage 2", folder / "back")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("dense", "back"))
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
