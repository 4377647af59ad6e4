"""Real servers answer with exports of all families, in environments that the command makes itself.

They run where ECLECTUS_SERVERS names a folder for environments, or ECLECTUS_TEST_SERVERS is set: installed are 380 MB
for both generations of transformers (PyTorch is linked) and 170 MB for llama.cpp, in about 80 s, and 1.4 GB for vLLM,
which took 240 s, so it is asked where ECLECTUS_TEST_VLLM is set, or its environment is there already.
"""

import os
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
from tests.support.gguf_files import spread
from tests.support.tokenizers import byte_level

WANTED = os.environ.get(FOLDER_VARIABLE) or os.environ.get("ECLECTUS_TEST_SERVERS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not WANTED, reason="installs servers: set ECLECTUS_SERVERS or ECLECTUS_TEST_SERVERS"),
]
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


def certify(capsys, folder, servers, *words):
    capsys.readouterr()
    code = 0
    try:
        main(["--home", str(folder.parent / "none"), "certify", str(folder), "--servers", servers, *words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize(
    ("name", "dtype", "servers"),
    [
        ("llama", torch.bfloat16, "transformers-4.57,transformers-5,llama.cpp"),
        ("mistral", None, "transformers-4.57,llama.cpp"),
        ("qwen2", torch.bfloat16, "transformers-4.57,transformers-5"),
        ("qwen3", None, "transformers-4.57,llama.cpp"),
    ],
)
def test_mixtures_of_all_families_are_certified(tmp_path, capsys, name, dtype, servers):
    code, said = certify(capsys, export(tmp_path, name, dtype), servers)
    assert code == 0, said


def test_dense_models_and_dense_exports_of_lory_are_certified(tmp_path, capsys):
    dense = export_dense_checkpoint(write_base(tmp_path / "base", "qwen2"), tmp_path / "out")
    code, said = certify(capsys, dense, "transformers-4.57,llama.cpp")
    assert code == 0, said
    code, said = certify(capsys, lory_export(tmp_path / "lory"), "transformers-4.57")
    assert code == 0, said


def test_an_export_with_different_experts_per_layer_opens_with_its_code(tmp_path, capsys):
    code, said = certify(capsys, export(tmp_path, "llama", experts=[3, 2]), "transformers-5")
    assert code == 0, said


def test_a_wrong_expert_fails_in_every_server(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    out = export(tmp_path, "llama")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"] *= 1.05
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    code, said = certify(capsys, out, "transformers-4.57,llama.cpp", "--against", str(tmp_path / "moe"))
    assert code == 1 and said.count("NOT CERTIFIED: largest difference") == 2, said


def test_a_package_that_cannot_be_had_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "servers"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, said = certify(capsys, export(tmp_path, "llama"), "llama.cpp")
    [line] = [line for line in said.splitlines() if line.startswith("llama.cpp: not certified: ")]
    assert code == 1 and "cannot be installed: ERROR: No matching distribution" in line


@pytest.mark.parametrize(
    ("name", "dtype", "experts"),
    [
        ("llama", torch.bfloat16, 3),
        ("qwen2", None, 3),
        ("qwen3", None, 3),
        ("mistral", None, 3),
        ("llama", None, [3, 2]),
    ],
)
def test_vllm_answers_as_the_training_model(tmp_path, capsys, environments, name, dtype, experts):
    there = (environment_path(SERVERS["vllm"], environments) / COMPLETE).is_file()
    if not there and not os.environ.get("ECLECTUS_TEST_VLLM"):
        pytest.skip("vLLM takes 240 s to install: set ECLECTUS_TEST_VLLM")
    code, said = certify(capsys, export(tmp_path, name, dtype, experts), "vllm")
    assert code == 0, said
