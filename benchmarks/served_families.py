"""Which server answers as the training model does: every family that is exported, in float32 and in bfloat16.

    python benchmarks/served_families.py --work WORK [--families qwen3moe,lory] [--servers vllm,llama.cpp]

Tiny random models (2 layers, width 64, weights so wide that an error in any of them shows), exported in both types and
certified (tasks/certify/certify.py). A cell has the largest difference of a log-probability computed in float32, and
the mean one in bfloat16; in brackets, how many greedy texts are equal, if not all; bold: not certified. Servers are
installed on demand, in $ECLECTUS_SERVERS. What is in WORK/results.json is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.mixture.export import export_checkpoint, export_dense_checkpoint
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining.export_dense import export_dense
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks.certify.certify import Asked, Certification, as_statistics, certify_checkpoint
from eclectus.tasks.certify.prompts import TEXTS
from eclectus.tasks.certify.servers import SERVERS, chosen_servers
from eclectus.tasks.export.mixture import seal

SHAPE: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 300,
    "eos_token_id": 301,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 20000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}
LLAMA = LlamaConfig(**SHAPE, rope_parameters=LLAMA3)
# Prompts and text together are longer than the window.
MISTRAL = MistralConfig(**SHAPE, sliding_window=48)
QWEN2 = Qwen2Config(**SHAPE, tie_word_embeddings=True)
QWEN3 = Qwen3Config(**SHAPE, tie_word_embeddings=True)


def _mixture(config: PreTrainedConfig, experts: int | list[int] = 3) -> Callable[[Path, torch.dtype], Path]:
    """A mixture of a random base whose experts differ, exported."""

    def make(root: Path, dtype: torch.dtype) -> Path:
        upcycle(_base(root, config), root / "moe", experts=experts, init="drop")
        return export_checkpoint(root / "moe", root / "out", dtype=dtype)

    return make


def _dense(config: PreTrainedConfig) -> Callable[[Path, torch.dtype], Path]:
    return lambda root, dtype: export_dense_checkpoint(_base(root, config), root / "out", dtype)


def _lory(root: Path, dtype: torch.dtype) -> Path:
    """The dense export of a Lory model of two experts that differ."""
    dense = LlamaForCausalLM.from_pretrained(_base(root, LLAMA))
    model = LoryForCausalLM.from_dense(dense, num_experts=2, segment_length=8)
    model.name_or_path = str(root / "base")
    for layer in model.model.layers:
        layer.mlp.experts.data[1].normal_(0, 0.2)
    export_dense(model, root / "wide", weights=torch.tensor([[0.7, 0.3], [0.2, 0.8]]))
    return export_dense_checkpoint(root / "wide", root / "out", dtype)


FAMILIES: dict[str, tuple[str, Callable[[Path, torch.dtype], Path]]] = {
    "mixtral-llama": ("Mixtral from Llama (llama3 positions)", _mixture(LLAMA)),
    "mixtral-mistral": ("Mixtral from Mistral (sliding window)", _mixture(MISTRAL)),
    "qwen2moe": ("Qwen2Moe (tied)", _mixture(QWEN2)),
    "qwen3moe": ("Qwen3Moe (tied)", _mixture(QWEN3)),
    "layered": ("3 and 2 experts per layer, from Llama", _mixture(LLAMA, [3, 2])),
    "lory": ("dense export of Lory", _lory),
    "dense-llama": ("dense Llama", _dense(LLAMA)),
    "dense-qwen2": ("dense Qwen2 (tied)", _dense(QWEN2)),
    "mixtral-yarn": ("Mixtral from Llama (YaRN)", _mixture(LlamaConfig(**SHAPE, rope_parameters=YARN))),
    "qwen3moe-yarn": ("Qwen3Moe (YaRN)", _mixture(Qwen3Config(**SHAPE, rope_parameters=YARN))),
    "mixtral-linear": ("Mixtral from Llama (linear positions)", _mixture(LlamaConfig(**SHAPE, rope_parameters=LINEAR))),
    "dense-mistral": ("dense Mistral (sliding window)", _dense(MISTRAL)),
    "dense-qwen3": ("dense Qwen3 (tied)", _dense(QWEN3)),
}


def _base(root: Path, config: PreTrainedConfig) -> Path:
    """A random base in root/base, with a byte-level tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_(0, 0.2)
    model.save_pretrained(root / "base")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXTS.values(), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    bpe.add_special_tokens(["<s>", "</s>"])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **named).save_pretrained(root / "base")
    return root / "base"


def _certified(root: Path, out: Path, server: str) -> dict[str, Any]:
    """Statistics of a certification by one server; a refusal by the command itself stands under it."""
    try:
        found, _, _ = certify_checkpoint(Home(root / "none"), str(out), Asked([SERVERS[server]], True), print)
    except EclectusError as error:
        found = Certification(str(out), unavailable={server: str(error)})
    return as_statistics(found)


def _cell(result: dict[str, Any]) -> str:
    """The figures of one export in one server, or why there are none."""
    told = []
    for each in result["servers"]:
        figure = each["max_difference"] if each["dtype"] == "float32" else each["mean_difference"]
        text = f"{'' if each['dtype'] == 'float32' else each['dtype'] + ' '}{figure:.2g}"
        text += "" if each["equal_texts"] == each["texts"] else f" ({each['equal_texts']}/{each['texts']})"
        told.append(text if each["certified"] else f"**{text}: {'; '.join(each['faults'])}**")
    return ", ".join(told) or f"no: {' '.join(result['unavailable'].values())}"


def table(results: dict[str, Any], servers: list[str]) -> str:
    """The results as Markdown, a row for each family and type."""
    lines = [f"| model | stored in | {' | '.join(servers)} |", f"|---|---|{'---|' * len(servers)}"]
    for family, (title, _) in FAMILIES.items():
        for stored in ("float32", "bfloat16"):
            cells = [results.get(f"{family} {stored} {server}") for server in servers]
            if any(cells):
                shown = " | ".join(_cell(each) if each else "" for each in cells)
                lines.append(f"| {title} | {stored} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of results (default: a temporary one)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, with commas")
    parser.add_argument("--servers", help="names, with commas (default: all)")
    parser.add_argument("--types", default="float32,bfloat16", help="that weights are stored in, with commas")
    chosen = parser.parse_args()
    servers = [server.name for server in chosen_servers(chosen.servers)]
    work = chosen.work or Path(tempfile.mkdtemp(prefix="served-"))
    work.mkdir(parents=True, exist_ok=True)
    path = work / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for family in chosen.families.split(","):
        for dtype in (getattr(torch, name) for name in chosen.types.split(",")):
            keys = {f"{family} {str(dtype).removeprefix('torch.')} {server}": server for server in servers}
            if missing := {key: server for key, server in keys.items() if key not in results}:
                with tempfile.TemporaryDirectory() as temporary:
                    out = FAMILIES[family][1](Path(temporary), dtype)
                    seal(out, None)
                    for key, server in missing.items():
                        print(f"{key}, load {os.getloadavg()[0]:.0f}", flush=True)
                        results[key] = _certified(Path(temporary), out, server)
                        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, servers))


if __name__ == "__main__":
    main()
