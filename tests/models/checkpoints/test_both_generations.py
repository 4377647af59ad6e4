"""Every kind of checkpoint opens with equal logits in transformers 4.57 and 5, in environments with nothing else."""

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
from transformers import AutoConfig, AutoModelForCausalLM

from eclectus.models.checkpoints.writing import with_both_generations
from tests.support.checkpoint_kinds import KINDS, live_logits
from tests.support.dense_bases import tokens

# What the config classes of transformers 4.57 take where config.json has no such key.
DEFAULTS_457 = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "head_dim": 128},
    "mixtral": {"rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
}
# Kinds that the fast test makes; families and rotary types are tested below and in the slow test.
FAST = (
    "dense twin, llama3",
    "dense twin, longrope",
    "dense_equal_flops",
    "top_k",
    "lory",
    "extended lory",
    "dense export of lory",
    "fetched gguf",
    "upcycled mistral",
    "trained and exported qwen2",
    "extracted qwen3",
    "extended again",
    "full",
    "lora",
    "llama_pro",
    "moe_all",
    "export of full",
)


@pytest.mark.parametrize("kind", FAST)
def test_config_and_tokenizer_say_to_transformers_4_57_what_the_model_computes_with(kind, tmp_path):
    folder, expected = KINDS[kind].make(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(live_logits(loaded), expected, rtol=0, atol=1e-5)
    if KINDS[kind].opens_in == "both":
        as_457_reads_it(json.loads((folder / "config.json").read_text()), AutoConfig.from_pretrained(folder))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
    assert isinstance(tokenizer.get("extra_special_tokens", {}), dict)
    if kind != "fetched gguf":
        assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7


def as_457_reads_it(stored, config):
    """Asserts that the stored keys, read by the rules of 4.57's classes, are the values of the loaded config."""
    family = config.model_type
    read = {"rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False} | DEFAULTS_457[family] | stored
    rope = dict(config.rope_parameters)
    assert read["rope_theta"] == rope.pop("rope_theta")
    if rope["rope_type"] == "longrope":
        assert read["original_max_position_embeddings"] == rope["original_max_position_embeddings"]
    assert (read["rope_scaling"] or {"rope_type": "default"}) == rope
    heads = config.hidden_size // config.num_attention_heads
    assert read.get("head_dim", heads) == (getattr(config, "head_dim", None) or heads)
    assert read["tie_word_embeddings"] == config.tie_word_embeddings
    assert read["torch_dtype"] == str(config.dtype).removeprefix("torch.")
    assert read["architectures"][0].lower().startswith(family.replace("_", ""))
    if "moe" in family or family == "mixtral":
        experts = read["num_local_experts" if family == "mixtral" else "num_experts"]
        assert experts == config.num_local_experts and read["num_experts_per_tok"] == config.num_experts_per_tok
    if "moe" in family:
        assert read["moe_intermediate_size"] == config.moe_intermediate_size and read["norm_topk_prob"] is True
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for key in (*needed, "intermediate_size", "max_position_embeddings", "rms_norm_eps", "hidden_act"):
        assert stored[key] == getattr(config, key), key


@pytest.mark.parametrize(
    ("old", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}},
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
    ],
)
def test_a_config_of_transformers_4_gets_the_keys_of_5_and_keeps_its_own(old, rope):
    both = with_both_generations(old | {"torch_dtype": "bfloat16"})
    assert {key: both["rope_parameters"][key] for key in rope} == rope
    assert both["rope_theta"] == rope["rope_theta"] and both["dtype"] == both["torch_dtype"] == "bfloat16"
    assert (both["rope_scaling"] or {}).get("factor") == rope.get("factor")
    assert with_both_generations(both) == both


def test_new_values_replace_stale_ones_of_the_other_generation():
    both = with_both_generations(
        {
            "dtype": "float16",
            "torch_dtype": "float32",
            "rope_theta": 1.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 2.0},
        }
    )
    assert both["torch_dtype"] == "float16" and both["rope_theta"] == 2.0 and both["rope_scaling"] is None


# The stock libraries of both generations: 4.57 with the dependencies that pip chooses, 5 with those installed here.
GENERATIONS = {"4.57": ["transformers==4.57.*", "sympy", "networkx", "jinja2"], "5": []}
# Linked instead of downloaded: 700 MB of PyTorch, which is not what is tested.
LINKED = ("torch", "torch-*.dist-info", "torchgen", "functorch", "nvidia", "triton")
SCRIPT = """
import importlib.util, json, sys, torch, traceback, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__
ours = ("eclectus", "models", "tasks", "flows", "storage", "prefect")
assert not any(importlib.util.find_spec(name) for name in ours)
ids, results = torch.load("ids.pt", weights_only=True), {}

def read(name):
    own = name == "export of layered" or ("lory" in name and "export" not in name)
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, trust_remote_code=own)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(name)
    if name != "fetched gguf":
        # A dense Qwen2 gets Qwen's own tokenizer class from transformers 5, whatever its files say.
        if model.config.model_type != "qwen2":
            assert tokenizer("w5")["input_ids"] == [5] and "w2" in tokenizer.all_special_tokens
        assert GenerationConfig.from_pretrained(name).max_new_tokens == 7
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, name + ".pt")

for name in sys.argv[2:]:
    try:
        read(name)
        results[name] = ""
    except Exception:
        results[name] = traceback.format_exc()
print("\\n" + json.dumps(results))
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
def kinds(tmp_path_factory):
    """(a folder with one checkpoint for each kind, named like it, and the logits by kind)."""
    root, expected = tmp_path_factory.mktemp("kinds"), {}
    torch.save(tokens(), root / "ids.pt")
    for number, (name, kind) in enumerate(KINDS.items()):
        folder, expected[name] = kind.make(root / str(number))
        folder.rename(root / name)
    return root, expected


@pytest.fixture(scope="module")
def opened(kinds, clean_python):
    """By generation: the error with which each kind failed to open in a clean environment, empty if it opened."""
    results = {}

    def run(generation):
        if generation not in results:
            root, fitting = kinds[0], [name for name in KINDS if opens_in(name, generation)]
            command = [str(clean_python(generation)), "-I", "-c", SCRIPT, generation, *fitting]
            done = subprocess.run(command, capture_output=True, text=True, cwd=root)
            assert done.returncode == 0, done.stderr[-2000:]
            results[generation] = json.loads(done.stdout.splitlines()[-1])
        return results[generation]

    return run


def opens_in(name, generation):
    return KINDS[name].opens_in in ("both", generation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "kind"),
    [(generation, kind) for generation in GENERATIONS for kind in KINDS if opens_in(kind, generation)],
)
def test_equal_logits_in_a_clean_environment(kinds, opened, generation, kind):
    root, expected = kinds
    assert not opened(generation)[kind]
    theirs = torch.load(root / f"{kind}.pt", weights_only=True)
    torch.testing.assert_close(theirs, expected[kind], rtol=0, atol=1e-5)
    (root / f"{kind}.pt").unlink()
