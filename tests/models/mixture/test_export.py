"""Exports load in stock transformers of both generations, with equal logits, and the base is extracted bit by bit."""

import importlib.metadata
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from eclectus.models.checkpoints.families import UnsupportedModelError
from eclectus.models.checkpoints.tensor_files import CheckpointReader
from eclectus.models.mixture.experts import frozen_digest, set_trainable, split_experts
from eclectus.models.mixture.export import NotTheBaseError, export_checkpoint, extract_base
from eclectus.models.mixture.upcycle import upcycle
from tests.support.dense_bases import BASES, logits, tokens, write_base


def trained(root, name, stage="post_pretrain", dtype=torch.float32):
    """A base upcycled and trained a few steps, split and live; returns its directories and the model."""
    base = write_base(root / "base", name, dtype)
    upcycle(base, root / "moe", experts=4)
    model = split_experts(AutoModelForCausalLM.from_pretrained(root / "moe", dtype=torch.float32))
    set_trainable(model, stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.2)
    for step in range(3):
        batch = tokens(seed=step)
        out = model(input_ids=batch).logits
        cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    return base, root / "moe", model.eval()


def same_tensors(first, second):
    with CheckpointReader(first) as a, CheckpointReader(second) as b:
        assert a.specs == b.specs
        assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.specs)


@pytest.mark.parametrize("name", BASES)
def test_a_trained_model_exports_to_what_stock_transformers_saves_and_loads(tmp_path, name):
    base, _moe, model = trained(tmp_path, name)
    with torch.no_grad():
        expected = model(tokens()).logits
    assert (expected - logits(base, tokens())).abs().max() > 0.01
    export_checkpoint(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(tmp_path / "out", tokens()), expected, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "stock")
    same_tensors(tmp_path / "out", tmp_path / "stock")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5")["input_ids"] == [5]
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    assert json.loads((tmp_path / "out" / "upcycle.json").read_text())["experts"] == 4


@pytest.mark.parametrize("name", BASES)
def test_the_base_is_extracted_bit_by_bit_from_a_trained_model(tmp_path, name):
    base, _moe, model = trained(tmp_path, name)
    export_checkpoint(model, tmp_path / "out", max_shard_bytes=40_000)
    extract_base(tmp_path / "out", tmp_path / "back")
    same_tensors(base, tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back", tokens()), logits(base, tokens()))
    original = AutoModelForCausalLM.from_pretrained(base)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is type(original)


def test_a_bf16_base_is_extracted_bit_by_bit_after_training_in_fp32(tmp_path):
    base, _moe, model = trained(tmp_path, "llama", dtype=torch.bfloat16)
    for out, dtype in (("narrow", torch.bfloat16), ("wide", None)):
        export_checkpoint(model, tmp_path / out, dtype=dtype)
        extract_base(tmp_path / out, tmp_path / f"{out}-back")
        same_tensors(base, tmp_path / f"{out}-back")


def test_a_directory_saved_by_transformers_itself_becomes_complete(tmp_path):
    base, moe, model = trained(tmp_path, "qwen3")
    export_checkpoint(model, tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert "rope_theta" not in config
    export_checkpoint(tmp_path / "two", tmp_path / "three", side_files=moe)
    stored = json.loads((tmp_path / "three" / "config.json").read_text())
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] and stored["num_experts"] == 4
    same_tensors(tmp_path / "one", tmp_path / "three")
    extract_base(tmp_path / "three", tmp_path / "back")
    same_tensors(base, tmp_path / "back")


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_expert_names_are_those_that_servers_map(tmp_path, name):
    _base, _moe, model = trained(tmp_path, name)
    export_checkpoint(model, tmp_path / "out")
    block, matrices = (
        ("block_sparse_moe", ("w1", "w2", "w3"))
        if name == "mistral"
        else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    expected = {f"model.layers.1.{block}.experts.{e}.{m}.weight" for e in range(4) for m in matrices}
    with CheckpointReader(tmp_path / "out") as reader:
        assert expected <= set(reader.specs)
        assert f"model.layers.1.{block}.gate.weight" in reader.specs
        # vLLM fails on tensors without elements (an empty shared expert).
        assert all(spec.nbytes for spec in reader.specs.values())


def test_exporting_does_not_change_the_loaded_model(tmp_path):
    _base, _moe, model = trained(tmp_path, "llama")
    digest, before = frozen_digest(model), model(tokens()).logits
    export_checkpoint(model, tmp_path / "out")
    assert frozen_digest(model) == digest and torch.equal(model(tokens()).logits, before)


def test_an_export_generates_text(tmp_path):
    _base, _moe, model = trained(tmp_path, "llama tied")
    export_checkpoint(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generate(tokens(5, 1), max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_a_base_whose_weights_were_trained_is_not_extracted(tmp_path):
    _base, _moe, model = trained(tmp_path, "llama", stage="all")
    export_checkpoint(model, tmp_path / "out")
    with pytest.raises(NotTheBaseError, match="no longer the base's"):
        extract_base(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_misuse_is_refused_with_the_remedy(tmp_path):
    base, moe, model = trained(tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match="expected an upcycled one"):
        export_checkpoint(base, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="expected an upcycled one"):
        extract_base(base, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(model, moe)
    config = json.loads((moe / "config.json").read_text())
    del config["upcycled_from"]
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotTheBaseError, match="upcycled_from"):
        extract_base(moe, tmp_path / "out")


# The stock libraries of both generations: 4.57 with the dependencies that pip chooses, 5 with those installed here.
GENERATIONS = {"4.57": ["transformers==4.57.*", "sympy", "networkx", "jinja2"], "5": []}
# Linked instead of downloaded: 700 MB of PyTorch, which is not what is tested.
LINKED = ("torch", "torch-*.dist-info", "torchgen", "functorch", "nvidia", "triton")
SCRIPT = """
import importlib.util, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
assert not any(importlib.util.find_spec(name) for name in ("models", "tasks", "flows", "storage", "prefect"))
ids = torch.load(sys.argv[2] + "/ids.pt", weights_only=True)
for name in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(name)
    # A dense Qwen2 gets Qwen's own tokenizer class from transformers 5, whatever its files say.
    if model.config.model_type != "qwen2":
        assert tokenizer("w5")["input_ids"] == [5] and "w2" in tokenizer.all_special_tokens
    assert GenerationConfig.from_pretrained(name).max_new_tokens == 7
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, name + ".pt")
"""


def installed_with(name):
    """Paths in site-packages of an installed package and of everything that it requires."""
    seen, left, paths = set(), [name], set()
    while left:
        package = canonicalize_name(left.pop())
        if package in seen:
            continue
        seen.add(package)
        found = importlib.metadata.distribution(package)
        root = found.locate_file("")
        paths |= {root / file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}
        needed = [Requirement(text) for text in found.requires or ()]
        left += [each.name for each in needed if not each.marker or each.marker.evaluate({"extra": ""})]
    return paths


@pytest.fixture(scope="session")
def clean_python(pytestconfig):
    """By generation, the Python of a virtual environment with only that transformers, its dependencies and torch."""

    def make(generation):
        folder = pytestconfig.cache.mkdir(f"clean-{generation}")
        python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=False, clear=True)
            ours, own = Path(torch.__file__).parents[1], next(folder.glob("lib/python*/site-packages"))
            if wanted := GENERATIONS[generation]:
                pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
                subprocess.run([*pip, *wanted], check=True, timeout=250)
                paths = {path for pattern in LINKED for path in ours.glob(pattern)}
            else:
                paths = installed_with("transformers") | installed_with("torch")
            for path in paths:
                (own / path.name).symlink_to(path)
            (folder / "complete").touch()
        return python

    return make


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By folder, the logits of every kind of checkpoint: upcycled, trained and exported, the extracted base."""
    root = tmp_path_factory.mktemp("exports")
    torch.save(tokens(), root / "ids.pt")
    expected = {}
    for number, name in enumerate(BASES):
        (root / str(number)).mkdir()
        base, moe, model = trained(root / str(number), name)
        for kind, make in (("export", lambda out, m=model: export_checkpoint(m, out)), ("upcycled", moe.rename)):
            out = root / f"{number}-{kind}"
            make(out)
            expected[str(out)] = logits(out, tokens())
        back = root / f"{number}-back"
        extract_base(root / f"{number}-export", back)
        expected[str(back)] = logits(base, tokens())
    return root, expected


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_exports_and_bases_give_equal_logits_in_clean_environments(exports, clean_python, generation):
    root, expected = exports
    command = [str(clean_python(generation)), "-I", "-c", SCRIPT, generation, str(root), *expected]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, ours in expected.items():
        torch.testing.assert_close(torch.load(name + ".pt", weights_only=True), ours, rtol=0, atol=1e-5)
