"""Real servers answer with exports of all families, in environments that the command makes itself.

Transformers 4.57 and llama.cpp are always asked: both are installed in a minute (380 MB with PyTorch linked; 61 s were
measured on two busy cores), and skipped only where pip reaches no package index. Transformers 5, which is this
installation's and is asked in its process by the other tests, and vLLM, which takes minutes and 2.8 GB, are asked where
ECLECTUS_TEST_SERVERS is set or their environments are there already ($ECLECTUS_SERVERS).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from eclectus.flows.cli.main import main
from eclectus.models.mixture.export import export_checkpoint, export_dense_checkpoint
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining.export_dense import export_dense
from eclectus.tasks.certify.environments import COMPLETE, FOLDER_VARIABLE, environment_path
from eclectus.tasks.certify.servers import SERVERS
from tests.support.checkpoint_kinds import pretrained
from tests.support.command_line import run_command
from tests.support.gguf_files import spread
from tests.support.tokenizers import byte_level

LIGHT = ("transformers-4.57", "llama.cpp")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Heads as wide as vLLM's attention for CPUs asks.
SHAPE = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 300,
    "eos_token_id": 301,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASES = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SHAPE, head_dim=32, sliding_window=48),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
}


@pytest.fixture(scope="session", autouse=True)
def environments(pytestconfig):
    """Kept between sessions, unless the user has a folder of them."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or pytestconfig.cache.mkdir("servers"))
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(folder)
    yield folder
    if before is None:
        os.environ.pop(FOLDER_VARIABLE)


@pytest.fixture
def asked(environments, package_index, capsys):
    """A function that certifies an export: (exit code, what was said)."""

    def certify(folder, servers, *words):
        for name in servers.split(","):
            if not (environment_path(SERVERS[name], environments) / COMPLETE).is_file():
                if name not in LIGHT and not os.environ.get("ECLECTUS_TEST_SERVERS"):
                    pytest.skip(f"{name} takes minutes to install: set ECLECTUS_TEST_SERVERS")
                if not package_index:
                    pytest.skip("no package index is reached")
        return certified(capsys, folder, servers, *words)

    return certify


@pytest.fixture(scope="session")
def package_index():
    """Whether pip reaches one: what it cannot install is our fault then."""
    command = [sys.executable, "-m", "pip", "index", "--retries", "1", "versions", "xllamacpp"]
    return subprocess.run(command, capture_output=True, timeout=600, check=False).returncode == 0


def write_base(folder, name):
    torch.manual_seed(0)
    spread(AutoModelForCausalLM.from_config(BASES[name], dtype=torch.float32)).save_pretrained(folder)
    return byte_level(folder)


def export(root, name, dtype=None, experts=3):
    """An export of a mixture whose experts differ."""
    upcycle(write_base(root / "base", name), root / "moe", experts=experts, init="drop")
    return export_checkpoint(root / "moe", root / "out", dtype=dtype)


def lory_export(root):
    lory, _ = pretrained("lory")(root)
    model = AutoModelForCausalLM.from_pretrained(lory)
    export_dense(model, root / "dense", weights=torch.tensor([[0.7, 0.3], [0.2, 0.8]]))
    for path in (root / "dense").glob("*token*"):
        path.unlink()
    return root / "dense"


def certified(capsys, folder, servers, *words):
    home = folder.parent / "none"
    code, *said = run_command(capsys, "--home", home, "certify", folder, "--servers", servers, *words)
    return code, "".join(said)


@pytest.mark.parametrize(
    ("name", "dtype", "servers"),
    [
        ("llama", None, "transformers-4.57,llama.cpp"),
        ("mistral", torch.bfloat16, "transformers-4.57,llama.cpp"),
        ("qwen2", torch.bfloat16, "transformers-4.57"),
        ("qwen3", torch.bfloat16, "transformers-4.57,llama.cpp"),
        ("llama", torch.bfloat16, "transformers-5"),
        ("llama", torch.bfloat16, "vllm"),
        ("mistral", None, "vllm"),
        ("qwen2", None, "vllm"),
        ("qwen3", None, "vllm"),
    ],
)
def test_mixtures_of_all_families_are_certified(asked, tmp_path, name, dtype, servers):
    code, said = asked(export(tmp_path, name, dtype), servers)
    assert code == 0, said


@pytest.mark.parametrize("server", ["transformers-5", "vllm"])
def test_an_export_with_different_experts_per_layer_opens_with_its_code(asked, tmp_path, server):
    code, said = asked(export(tmp_path, "llama", experts=[3, 2]), server)
    assert code == 0, said


def test_dense_models_and_dense_exports_of_lory_are_certified(asked, tmp_path):
    dense = export_dense_checkpoint(write_base(tmp_path / "base", "qwen2"), tmp_path / "out")
    code, said = asked(dense, "transformers-4.57,llama.cpp")
    assert code == 0, said
    code, said = asked(lory_export(tmp_path / "lory"), "transformers-4.57")
    assert code == 0, said


def test_a_wrong_expert_fails_in_every_server(asked, tmp_path):
    from safetensors.torch import load_file, save_file

    out = export(tmp_path, "llama")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"] *= 1.05
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    code, said = asked(out, "transformers-4.57,llama.cpp", "--against", str(tmp_path / "moe"))
    assert code == 1 and said.count("NOT CERTIFIED: largest difference") == 2, said


def test_a_gguf_file_is_certified_as_it_is_and_a_cut_one_is_refused(asked, tmp_path):
    out = tmp_path / "out"
    export(tmp_path, "llama")
    home = ["--home", str(tmp_path / "none")]
    main([*home, "export", str(tmp_path / "moe"), str(tmp_path / "gguf"), "--format", "gguf", "--dtype", "bfloat16"])
    code, said = asked(tmp_path / "gguf", "llama.cpp", "--against", str(out))
    assert code == 0 and "in bfloat16: certified" in said, said
    [file] = (tmp_path / "gguf").glob("*.gguf")
    (tmp_path / "gguf" / "export.json").unlink()
    os.truncate(file, file.stat().st_size * 2 // 3)
    code, said = asked(tmp_path / "gguf", "llama.cpp", "--against", str(out))
    assert code == 2 and len(said.splitlines()) == 1 and f"{file} cannot be read as GGUF" in said, said


def test_a_package_that_cannot_be_had_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "servers"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, said = certified(capsys, export(tmp_path, "llama"), "llama.cpp")
    [line] = [line for line in said.splitlines() if line.startswith("llama.cpp: not certified: ")]
    assert code == 1 and "cannot be installed: ERROR: No matching distribution" in line
