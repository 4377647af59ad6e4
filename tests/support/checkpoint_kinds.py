"""Every kind of checkpoint that the product writes: how a tiny one is made, its logits, and what opens it.

A writer that is added without a kind here is not tested in transformers 4.57, and there the damage is silent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from eclectus.models.checkpoints.dense_base import DenseBase
from eclectus.models.extension.lory import extend_lory
from eclectus.models.extension.methods import open_method, save_method
from eclectus.models.mixture.experts import set_trainable, split_experts
from eclectus.models.mixture.export import export_checkpoint, export_dense_checkpoint, extract_base
from eclectus.models.mixture.extend_again import extend_again
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining import stages
from eclectus.models.pretraining.checkpoint import save_trained
from eclectus.models.pretraining.export_dense import export_dense
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.training.parallel import copy_shared_experts
from eclectus.models.training.process import Process
from tests.support.dense_bases import BASES, LLAMA3_ROPE, SHAPE, logits, tokens, write_base, write_gguf

ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 20000.0},
    "linear": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 20000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": LLAMA3_ROPE,
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 20000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
}


@dataclass(frozen=True)
class Kind:
    """make: writes a checkpoint below a folder; returns it and the logits on `tokens()`, computed without it."""

    make: Callable[[Path], tuple[Path, Tensor]]
    opens_in: Literal["both", "5", "eclectus"] = "both"
    """Stock transformers 4.57 and 5; 5 with the code in the checkpoint; this package only."""


@torch.no_grad()
def live_logits(model: Any, **arguments: Any) -> Tensor:
    return model.eval()(input_ids=tokens(), **arguments).logits


def trained_mixture(root: Path, name: str, dtype: torch.dtype = torch.float32, **upcycled: Any) -> PreTrainedModel:
    """A base in root/base, upcycled in root/moe and trained a few steps: split and live."""
    write_base(root / "base", name, dtype)
    upcycle(root / "base", root / "moe", **{"experts": 4, **upcycled})
    model = split_experts(AutoModelForCausalLM.from_pretrained(root / "moe", dtype=torch.float32))
    return _trained(model, "post_pretrain").eval()


def _trained(model: Any, stage: str | None = None) -> Any:
    if stage is not None:
        set_trainable(model, stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.2)
    for step in range(2):
        batch = tokens(seed=step)
        out = model(input_ids=batch).logits
        cross_entropy(out[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    return model


def _upcycled(name: str, **settings: Any) -> Callable[[Path], tuple[Path, Tensor]]:
    def make(root: Path) -> tuple[Path, Tensor]:
        base = write_base(root / "base", name)
        upcycle(base, root / "moe", experts=4, **settings)
        return root / "moe", logits(base, tokens())

    return make


def _exported(name: str) -> Callable[[Path], tuple[Path, Tensor]]:
    def make(root: Path) -> tuple[Path, Tensor]:
        model = trained_mixture(root, name)
        return export_checkpoint(model, root / "export"), live_logits(model)

    return make


def _extracted(name: str) -> Callable[[Path], tuple[Path, Tensor]]:
    def make(root: Path) -> tuple[Path, Tensor]:
        export, _ = _exported(name)(root)
        return extract_base(export, root / "back"), logits(root / "base", tokens())

    return make


def _extended_again(root: Path) -> tuple[Path, Tensor]:
    base = write_base(root / "base", "llama tied")
    upcycle(base, root / "moe", experts=2)
    extend_again(root / "moe", root / "more", new_experts=1, calibration=tokens(8, 4), largest_share=1.0)
    # Trained and saved: as extended, few tokens already choose the new expert.
    model = open_method("moe_lpr", root / "more")
    _trained(model)
    save_method(model, root / "out", root / "more")
    return root / "out", live_logits(model)


def _moe_all(root: Path) -> tuple[Path, Tensor]:
    base = write_base(root / "base", "llama")
    upcycle(base, root / "moe", experts=2)
    model = _trained(open_method("moe_all", root / "moe"))
    save_method(model, root / "out", root / "moe")
    return root / "out", live_logits(model)


def _layered(root: Path) -> tuple[Path, Tensor]:
    base = write_base(root / "base", "llama")
    upcycle(base, root / "moe", experts=[3, 2])
    return root / "moe", logits(base, tokens())


def _layered_export(root: Path) -> tuple[Path, Tensor]:
    moe, expected = _layered(root)
    return export_checkpoint(moe, root / "export"), expected


def _method(method: str, name: str) -> Callable[[Path], tuple[Path, Tensor]]:
    def make(root: Path) -> tuple[Path, Tensor]:
        base = write_base(root / "base", name)
        model = _trained(open_method(method, base, lora_rank=2, new_blocks=1))
        save_method(model, root / "out", base)
        return root / "out", live_logits(model)

    return make


def _dense_export(method: str, name: str) -> Callable[[Path], tuple[Path, Tensor]]:
    def make(root: Path) -> tuple[Path, Tensor]:
        trained, expected = _method(method, name)(root)
        return export_dense_checkpoint(trained, root / "exported"), expected

    return make


def small_llama(rope: dict[str, Any], tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=dict(rope), tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    return model


def pretrained(stage: str, rope: str = "theta", tied: bool = False) -> Callable[[Path], tuple[Path, Tensor]]:
    """A stage of pre-training that starts from a checkpoint, whose side files it keeps."""

    def make(root: Path) -> tuple[Path, Tensor]:
        start = write_base(root / "start", "llama")
        dense, domains = small_llama(ROPES[rope], tied), ["a"]
        model: Any = dense
        if stage == "dense_equal_flops":
            model = type(dense)(stages.equal_flops_config(dense.config, 2, 40, segment_length=8))
        elif stage == "lory":
            model = stages.lory_from_dense(Blueprint.of(dense), {}, domains, 2, segment_length=8).blueprint.make()
        elif stage == "expert_choice":
            model = stages.expert_choice_from_dense(Blueprint.of(dense), {}, domains, 2, 0).blueprint.make()
        elif stage == "top_k":
            model = stages.top_k_of_dense(Blueprint.of(dense), {}, domains, 2, 2, 0).blueprint.make()
        elif stage == "document_pools":
            model = stages.document_pools_of_dense(Blueprint.of(dense), {}, domains, 2, 2, 0).blueprint.make()
            model.config.selection = "causal"
        copy_shared_experts(model)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.data.normal_(0, 0.2)
        save_trained(model, start, root / "out", None, Process())
        return root / "out", live_logits(model)

    return make


def _lory_export(root: Path) -> tuple[Path, Tensor]:
    folder, _ = pretrained("lory", "llama3")(root)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    export_dense(model, root / "dense", weights=weights)
    return root / "dense", live_logits(model, expert_weights=weights)


def _extended_lory(root: Path) -> tuple[Path, Tensor]:
    folder, expected = pretrained("lory")(root)
    extend_lory(folder, root / "wider")
    return root / "wider", expected


def _fetched_gguf(root: Path) -> tuple[Path, Tensor]:
    root.mkdir(parents=True, exist_ok=True)
    write_gguf(root / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(root, gguf_file="tiny.gguf", dtype=torch.float32)
    (root / "fetched").mkdir()
    DenseBase.from_gguf(root / "tiny.gguf").save(root / "fetched")
    return root / "fetched", live_logits(model)


KINDS: dict[str, Kind] = {
    **{f"dense twin, {rope}": Kind(pretrained("dense", rope)) for rope in ROPES},
    "dense twin, tied": Kind(pretrained("dense", tied=True)),
    "dense_equal_flops": Kind(pretrained("dense_equal_flops")),
    "top_k": Kind(pretrained("top_k")),
    "expert_choice": Kind(pretrained("expert_choice"), "eclectus"),
    "document_pools": Kind(pretrained("document_pools"), "eclectus"),
    "lory": Kind(pretrained("lory"), "5"),
    "extended lory": Kind(_extended_lory, "5"),
    "dense export of lory": Kind(_lory_export),
    "fetched gguf": Kind(_fetched_gguf),
    **{f"upcycled {name}": Kind(_upcycled(name)) for name in BASES},
    **{f"trained and exported {name}": Kind(_exported(name)) for name in BASES},
    **{f"extracted {name}": Kind(_extracted(name)) for name in BASES},
    "extended again": Kind(_extended_again),
    "layered": Kind(_layered, "eclectus"),
    "export of layered": Kind(_layered_export, "5"),
    "full": Kind(_method("full", "mistral")),
    "lora": Kind(_method("lora", "qwen2")),
    "llama_pro": Kind(_method("llama_pro", "qwen3")),
    "moe_all": Kind(_moe_all),
    "export of full": Kind(_dense_export("full", "llama tied")),
}
